"""Requests of an operator: what is written, what is refused at once, and the wait for an answer."""

import fcntl
import getpass
import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from launch import cli, control
from launch.control import Kind, Liveness, Request
from launch.errors import LaunchError
from train.amounts import Amount


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A stopped run at step 400 with good checkpoints of steps 100 and 300."""
    folder = tmp_path / "runs" / "demo"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    (folder / ".lock").write_text(f"process 1 on {socket.gethostname()}\n")
    for name, health in (
        ("step-00000100-clock-00000100", "good"),
        ("step-00000200-clock-00000200", "quarantined"),
        ("step-00000300-clock-00000350", "good"),
        ("step-00000400-clock-00000450", "candidate"),
    ):
        checkpoint = folder / "checkpoints" / name
        checkpoint.mkdir(parents=True)
        (checkpoint / "manifest.json").write_text("{}")
        (checkpoint / "health.json").write_text(json.dumps({"health": health, "reason": ""}))
    (folder / "checkpoints" / "step-00000050-clock-00000050").mkdir()  # half copied
    return folder


@pytest.fixture
def start_run(run: Path) -> Iterator[Callable[..., None]]:
    """Start a process that holds the run's folder and answers requests with what it is given."""
    spawn = multiprocessing.get_context("fork")
    started: list[tuple[multiprocessing.process.BaseProcess, Event]] = []

    def start(answer: dict[str, object] | None = None, *, lives_seconds: float = 30) -> None:
        ready, end = spawn.Event(), spawn.Event()
        process = spawn.Process(target=_live, args=(run, answer, ready, end, lives_seconds))
        process.start()
        started.append((process, end))
        assert ready.wait(10)

    yield start
    for process, end in started:
        end.set()
        process.join(10)


def _live(
    run: Path, answer: dict[str, object] | None, ready: Event, end: Event, lives_seconds: float
) -> None:
    with (run / ".lock").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        ready.set()
        deadline = time.monotonic() + lives_seconds
        while not end.wait(0.02) and time.monotonic() < deadline:
            for path in (run / "control" / "requests").glob("*.json"):
                if answer is not None:
                    (run / "control" / "answers").mkdir(exist_ok=True)
                    (run / "control" / "answers" / path.name).write_text(json.dumps(answer))
                    path.unlink()
    os._exit(0)  # pytest's own clean-up belongs to the parent


def _trimtab(*arguments: str) -> Result:
    return CliRunner().invoke(cli.build_app(), list(arguments))


def _requests(run: Path) -> list[dict[str, object]]:
    paths = sorted((run / "control" / "requests").iterdir())
    return [json.loads(path.read_text()) for path in paths]


def _refusal(*arguments: str) -> str:
    result = _trimtab(*arguments)
    assert isinstance(result.exception, LaunchError), result.output
    return str(result.exception)


# What is written.


def test_request_is_one_whole_file_that_names_its_operator(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(getpass, "getuser", lambda: "ada")
    before = time.time()
    result = _trimtab("rewind", str(run), "--to", "320", "--skip", "1B")
    assert result.exit_code == 0
    (fields,) = _requests(run)
    assert before <= float(str(fields.pop("unix_seconds"))) <= time.time()
    assert fields == {
        "kind": "rewind",
        "to_step": 320,
        "amount": "1B tokens",
        "incident": None,
        "is_far": False,
        "operator": f"ada@{socket.gethostname()}",
    }
    assert "is not running: it is carried out when the run is started again" in result.output
    assert "trimtab incidents" in result.output


def test_requests_sort_by_the_time_at_which_they_were_made(run: Path) -> None:
    paths = [
        control.leave(run, Request(kind=Kind.SKIP, amount=f"{count} batches"))
        for count in range(1, 6)
    ]
    assert sorted(paths) == paths


@pytest.mark.parametrize(
    ("arguments", "kind", "amount"),
    [
        (("rewind", "--to", "300"), "rewind", None),
        (("rewind", "--to", "300", "--skip", "seen"), "rewind", "seen"),
        (("rewind", "--to", "300", "--skip", "300 batches"), "rewind", "300 batches"),
        (("skip", "--tokens", "200M"), "skip", "200M tokens"),
        (("skip", "--batches", "300"), "skip", "300 batches"),
        (("skip", "--steps", "1_000"), "skip", "1_000 steps"),
    ],
)
def test_amounts_are_written_as_the_run_reads_them(
    run: Path, arguments: tuple[str, ...], kind: str, amount: str | None
) -> None:
    command, *options = arguments
    assert _trimtab(command, str(run), *options).exit_code == 0
    (fields,) = _requests(run)
    assert (fields["kind"], fields["amount"]) == (kind, amount)


@pytest.mark.parametrize("text", ["1B", "1.5b tokens", ".5M tokens", " 300 Batches", "7 steps"])
def test_run_reads_the_amounts_that_are_accepted_here(text: str) -> None:
    assert Amount.parse(control.read_amount(text)).value >= 1


def test_run_can_take_a_request_of_another_user_off_its_list(run: Path) -> None:
    run.chmod(0o2775)
    path = control.leave(run, Request(kind=Kind.SKIP, amount="1 batches"))
    assert path.parent.stat().st_mode & 0o7777 == 0o2775


def test_operator_without_a_name_has_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> str:
        raise KeyError("getpwuid(): uid not found: 4711")

    monkeypatch.setattr(getpass, "getuser", fail)
    assert control.operator() == f"uid{os.getuid()}@{socket.gethostname()}"


# What is refused at once.


@pytest.mark.parametrize("text", ["", "1000", "one batch", "1G", "-3 steps", "1e9 tokens", "."])
def test_what_is_no_amount_is_refused_with_the_accepted_forms(run: Path, text: str) -> None:
    message = _refusal("rewind", str(run), "--to", "300", "--skip", text)
    assert message.startswith(f"{text!r} is no amount")
    assert '"1B tokens", "300 batches" or "100 steps"; a bare 1B is tokens' in message


@pytest.mark.parametrize("text", ["0 tokens", "0.4 batches", "9999T", f"{'9' * 400} steps"])
def test_amount_beyond_reason_is_refused(run: Path, text: str) -> None:
    assert "is nothing, or more than" in _refusal("rewind", str(run), "--to", "9", "--skip", text)


@pytest.mark.parametrize("options", [(), ("--tokens", "1M", "--steps", "3")])
def test_skip_needs_exactly_one_amount(run: Path, options: tuple[str, ...]) -> None:
    message = _refusal("skip", str(run), *options)
    assert "use one of --tokens 200M, --batches 300 and --steps 100" in message


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("-1", "--to -1: a run begins at step 0"),
        ("99", "no good checkpoint at or before step 99; good ones are of steps 100, 300"),
        ("401", "step 401 lies ahead: the run goes on at step 400; good ones are of steps 100, 3"),
    ],
)
def test_step_that_a_stopped_run_cannot_reach_is_refused(
    run: Path, step: str, message: str
) -> None:
    assert message in _refusal("rewind", str(run), "--to", step)
    assert not (run / "control").exists()


def test_of_many_good_steps_the_last_are_named(run: Path) -> None:
    for step in range(500, 530):
        folder = run / "checkpoints" / f"step-{step:08d}-clock-{step:08d}"
        folder.mkdir()
        (folder / "manifest.json").touch()
        (folder / "health.json").write_text('{"health": "good"}')
    message = _refusal("rewind", str(run), "--to", "5")
    assert "of steps ..., 518, 519, 520" in message


def test_run_without_a_good_checkpoint_says_so(run: Path) -> None:
    for path in run.glob("checkpoints/*/health.json"):
        path.write_text("torn")
    message = _refusal("rewind", str(run), "--to", "300")
    assert message.endswith("step 300; none of its checkpoints is good yet")


def test_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    message = _refusal("skip", str(tmp_path), "--tokens", "1M")
    assert "holds no run.json" in message


def test_same_request_twice_is_refused_and_another_is_not(run: Path) -> None:
    assert _trimtab("skip", str(run), "--tokens", "1M").exit_code == 0
    message = _refusal("skip", str(run), "--tokens", "1M")
    (path,) = (run / "control" / "requests").iterdir()
    assert message.startswith(f"{path} asks for the same")
    assert _trimtab("skip", str(run), "--tokens", "2M").exit_code == 0


def test_folder_that_cannot_be_written_is_named(run: Path) -> None:
    (run / "control").write_text("a file")
    assert "cannot be written" in _refusal("skip", str(run), "--tokens", "1M")


@pytest.mark.parametrize(
    ("incident", "message"),
    [
        ("7", "incident 7 is not in the journal; incidents that skipped: 2, 3, 10"),
        ("1", "incident 1 skipped nothing; incidents that skipped: 2, 3, 10"),
        ("5", "incident 5 skipped nothing"),
        ("3", "what incident 3 skipped is put back already"),
        ("10", "incident 10 was cut short"),
    ],
)
def test_incident_that_cannot_be_put_back_is_refused(
    run: Path, incident: str, message: str
) -> None:
    _write_journal(run)
    assert message in _refusal("unskip", str(run), "--incident", incident)


def test_incident_that_skipped_can_be_put_back(run: Path) -> None:
    _write_journal(run)
    assert _trimtab("unskip", str(run), "--incident", "2").exit_code == 0
    (fields,) = _requests(run)
    assert (fields["kind"], fields["incident"]) == ("unskip", 2)


def _write_journal(run: Path) -> None:
    records: list[dict[str, object]] = [
        {"incident": 1, "rung": "replay", "skip": [8, 8], "target_checkpoint": "a"},
        {"incident": 2, "rung": "skip", "skip": [8, 16], "target_checkpoint": "a"},
        {"incident": 3, "rung": "skip_ahead", "skip": [40, 48]},
        {"incident": 4, "rung": "unskip", "skip": [50, 50], "returned": [90, 40, 48]},
        {"incident": 5, "rung": "skip", "skip": [8, 99], "phase": "observed"},
        {"incident": 10, "rung": "skip", "skip": [60, 70], "phase": "intent"},
    ]
    lines = [json.dumps({"phase": "done", "attempt": 1, **record}) for record in records]
    (run / "journal.jsonl").write_text("\n".join(lines) + "\n")


# Whether it is alive.


def test_run_that_holds_its_folder_is_running(run: Path, start_run: Callable[..., None]) -> None:
    assert control.liveness(run) is Liveness.STOPPED
    start_run()
    assert control.liveness(run) is Liveness.RUNNING


def test_looking_makes_no_file_and_keeps_no_lock(run: Path) -> None:
    (run / ".lock").unlink()
    assert control.liveness(run) is Liveness.STOPPED
    assert not (run / ".lock").exists()
    (run / ".lock").touch()
    assert control.liveness(run) is Liveness.STOPPED
    with (run / ".lock").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_lock_of_another_host_tells_nothing(run: Path) -> None:
    (run / ".lock").write_text("process 12 on another-host\n")
    assert control.liveness(run) is Liveness.UNKNOWN
    result = _trimtab("skip", str(run), "--tokens", "1M", "--wait", "0.1")
    assert result.exit_code == 0
    assert "cannot be told from this host" in result.output


# The wait.


def test_accepted_request_prints_the_answer(run: Path, start_run: Callable[..., None]) -> None:
    start_run({"is_accepted": True, "message": "incident 4: as you wish", "unix_seconds": 1.0})
    result = _trimtab("rewind", str(run), "--to", "12", "--skip", "seen")
    assert (result.exit_code, result.stdout) == (0, "incident 4: as you wish\n")
    assert "waiting up to 60 s" in result.stderr


def test_refused_request_is_exit_code_2_with_the_reason(
    run: Path,
    start_run: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    start_run({"is_accepted": False, "message": "there is no good checkpoint"})
    monkeypatch.setattr(sys, "argv", ["trimtab", "rewind", str(run), "--to", "1"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    assert f"trimtab: {run} refused: there is no good checkpoint\n" in capsys.readouterr().err


def test_live_run_judges_by_itself_which_states_it_has(
    run: Path, start_run: Callable[..., None]
) -> None:
    start_run({"is_accepted": True, "message": "from memory"})
    assert _trimtab("rewind", str(run), "--to", "99").stdout == "from memory\n"


def test_no_wait_leaves_the_request_to_a_live_run(
    run: Path, start_run: Callable[..., None]
) -> None:
    start_run()
    result = _trimtab("skip", str(run), "--tokens", "1M", "--wait", "0")
    assert result.exit_code == 0
    assert "the run has not answered yet" in result.output
    assert len(_requests(run)) == 1


def test_wait_ends_in_time_and_keeps_the_request(run: Path, start_run: Callable[..., None]) -> None:
    start_run()
    result = _trimtab("skip", str(run), "--tokens", "1M", "--wait", "0.3")
    assert "the run has not answered yet" in result.stdout
    assert len(_requests(run)) == 1


def test_wait_ends_with_the_run(
    run: Path, start_run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "_LOOK_SECONDS", 0.05)
    start_run(lives_seconds=0.3)
    path = control.leave(run, Request(kind=Kind.SKIP, amount="1 steps"))
    ticks: list[float] = []
    found = control.wait(run, path, seconds=60, alive=Liveness.RUNNING, tick=ticks.append)
    assert found is None
    assert ticks[-1] < 30


def test_interrupted_wait_leaves_the_request_and_says_so(
    run: Path, start_run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    start_run()
    monkeypatch.setattr(control, "wait", interrupt)
    result = _trimtab("skip", str(run), "--tokens", "1M")
    assert result.exit_code == 130
    (path,) = (run / "control" / "requests").iterdir()
    assert f"to take it back before, remove {path}" in result.stderr


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"is_accepted": true}'])
def test_answer_that_cannot_be_read_is_none_yet(run: Path, text: str) -> None:
    (run / "control" / "answers").mkdir(parents=True)
    (run / "control" / "answers" / "a.json").write_text(text)
    assert control.read_answer(run, Path("a.json")) is None
