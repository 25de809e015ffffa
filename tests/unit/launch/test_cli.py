"""The command line: what it prints, what it refuses, and what it may import."""

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch import cli
from launch.errors import LaunchError
from launch.paths import training_entry

ROOT = training_entry().parent.parent


@pytest.fixture(autouse=True)
def _small_conf(conf_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.compose.conf_folder", lambda: conf_dir)
    monkeypatch.setattr("launch.explain.conf_folder", lambda: conf_dir)
    monkeypatch.chdir(tmp_path)


def _trimtab(*arguments: str) -> str:
    result = CliRunner().invoke(cli.build_app(), list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_local_dry_run_prints_the_torchrun_command() -> None:
    output = _trimtab("launch", "exp=falcon_like", "cluster.processes_per_node=2", "--dry-run")
    assert shlex.split(output) == [
        "OMP_NUM_THREADS=1",
        "PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=300",
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "--max-restarts=3",
        str(training_entry()),
        "+exp=falcon_like",
        "cluster.processes_per_node=2",
    ]


def test_slurm_dry_run_prints_the_script_and_writes_nothing(tmp_path: Path, conf_dir: Path) -> None:
    output = _trimtab(
        "launch", "--dry-run", "cluster=slurm", "cluster.nodes=2", "+exp=falcon_like", "~run.name"
    )
    assert output.startswith("#!/usr/bin/env bash\n")
    assert "#SBATCH --nodes=2\n" in output
    assert "    +exp=falcon_like\n" in output
    assert "#SBATCH --output=runs/falcon_like/logs/%x-%j.out\n" in output
    assert "    ++run.name=falcon_like\n" in output
    assert list(tmp_path.iterdir()) == [conf_dir]


def test_slurm_writes_the_script_and_submits_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = tmp_path / "tools"
    _tool(tools / "sbatch", 'cp "$2" seen; ls -d runs/demo/logs; echo "12;ci"')
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    assert "submitted job" in _trimtab("launch", "cluster=slurm")
    written = tmp_path / "runs" / "demo" / "launch" / "job.sbatch"
    assert written.read_text() == (tmp_path / "seen").read_text()
    assert [p.name for p in written.parent.iterdir()] == ["job.sbatch"]


def test_refusal_of_sbatch_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _tool(tmp_path / "tools" / "sbatch", 'echo "invalid partition" >&2; exit 1')
    monkeypatch.setenv("PATH", f"{tmp_path / 'tools'}:/usr/bin:/bin")
    with pytest.raises(LaunchError, match=r"sbatch refused .*job\.sbatch: invalid partition"):
        _trimtab("launch", "cluster=slurm")


def test_missing_sbatch_is_one_line_and_exit_code_2(
    tmp_path: Path,
    conf_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["trimtab", "launch", "cluster=slurm"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("trimtab: cluster.kind=slurm but sbatch is not on PATH")
    assert list(tmp_path.iterdir()) == [conf_dir]


def test_local_run_becomes_the_command_with_its_exit_code(tmp_path: Path) -> None:
    python = tmp_path / "python"
    _tool(python, 'echo "$OMP_NUM_THREADS" "$@"; exit 7')
    code = (
        "from launch import local\n"
        f"local.run([{str(python)!r}, '-m', 'a b'], {{'OMP_NUM_THREADS': '3'}})"
    )
    done = _python(code)
    assert (done.returncode, done.stdout) == (7, "3 -m a b\n")


@pytest.mark.parametrize(
    ("tool", "expected"),
    [
        ('echo \'{"exit_code": 75}\' >"$TRIMTAB_OUTCOME"; exit 1', 75),
        ('echo \'{"exit_code": 0}\' >"$TRIMTAB_OUTCOME"; exit 1', 1),
        ('echo torn >"$TRIMTAB_OUTCOME"; exit 4', 4),
        ("exit 0", 0),
        ("kill -9 $$", 137),
    ],
)
def test_exit_code_is_what_the_ranks_have_written_down(
    tool: str, expected: int, tmp_path: Path
) -> None:
    _tool(tmp_path / "python", tool)
    code = f"from launch import local; print(local.supervise([{str(tmp_path / 'python')!r}], {{}}))"
    assert _python(code).stdout == f"{expected}\n"


def test_each_signal_is_passed_on_once(tmp_path: Path) -> None:
    body = "trap 'echo usr1' USR1; trap 'echo term; exit 5' TERM; echo ready"
    _tool(tmp_path / "python", f"{body}; for i in $(seq 500); do sleep 0.05; done")
    code = (
        "import sys; from launch import local;"
        f"sys.exit(local.supervise([{str(tmp_path / 'python')!r}], {{}}))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGUSR1)
        assert child.stdout.readline() == "usr1\n"
        child.send_signal(signal.SIGTERM)
        assert child.stdout.read() == "term\n"
    assert child.returncode == 5


def test_a_second_interrupt_ends_what_does_not_end_by_itself(tmp_path: Path) -> None:
    body = "trap 'echo int' INT; echo ready; for i in $(seq 500); do sleep 0.05; done"
    _tool(tmp_path / "python", body)
    code = (
        "import sys; from launch import local;"
        f"sys.exit(local.supervise([{str(tmp_path / 'python')!r}], {{}}))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGINT)
        assert child.stdout.readline() == "int\n"
        time.sleep(1.1)
        child.send_signal(signal.SIGINT)
        assert child.wait(timeout=5) == 130


def test_program_that_cannot_start_is_named() -> None:
    done = _python("from launch import local\nlocal.supervise(['/no/python'], {})")
    assert "LaunchError: /no/python cannot be started: No such file" in done.stderr
    done = _python("from launch import local\nlocal.run(['/no/python'], {})")
    assert "LaunchError: /no/python cannot be started: No such file" in done.stderr


def test_explain_marks_the_winner() -> None:
    output = _trimtab("explain", "optim.lr", "+exp=falcon_like", "optim.lr=6e-4")
    assert output.splitlines() == [
        "   2e-2  conf/optim/muon.yaml:2       # Muon's own",
        "   3e-4  conf/exp/falcon_like.yaml:6  # Falcon, table 16",
        "*  6e-4  command line",
    ]


def test_explain_of_a_group_shows_one_line_a_leaf() -> None:
    output = _trimtab("explain", "run", "~run.name", "+run.tag=a")
    assert [line.split() for line in output.splitlines()] == [
        ["run.name", "(deleted)", "command", "line"],
        ["run.tag", "a", "command", "line"],
    ]


def test_incidents_joins_intent_and_done_and_survives_a_torn_line(tmp_path: Path) -> None:
    intent = {
        "incident": 1,
        "phase": "intent",
        "time": "2026-01-01T00:00:00Z",
        "rule": "rewind",
        "reason": "loss spike",
        "verdict": "spike",
        "onset_step": 40,
        "detected_step": 42,
        "target_step": 30,
        "target_checkpoint": "step-30",
        "skip": [960, 1344],
    }
    _journal(
        tmp_path, json.dumps(intent), '{"incident": 1, "phase": "done"}', '{"incident": 2, "ph'
    )
    heading, row, reason, note = _trimtab("incidents", "demo").splitlines()
    assert heading.split()[:3] == ["#", "try", "when"]
    assert row.split()[:3] == ["1", "1", "2026-01-01"]
    assert row.endswith("rewind  spike    40->42        30       384      done")
    assert reason == "    loss spike; samples [960, 1344) skipped"
    assert note == "1 torn line(s) in the journal left out"


def test_run_without_a_journal_had_no_incidents(tmp_path: Path) -> None:
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "run.json").write_text("{}")
    assert _trimtab("incidents", "demo") == "no incidents\n"


def test_report_prints_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "monitoring.report.write_report", lambda run, output: output or run / "report.html"
    )
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    assert _trimtab("report", "demo") == "runs/demo/report.html\n"
    assert _trimtab("report", "runs/demo", "--output", "page.html") == "page.html\n"


def test_report_that_cannot_be_written_is_a_launch_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(run: Path, output: Path | None) -> Path:
        raise PermissionError(13, "Permission denied", str(output))

    monkeypatch.setattr("monitoring.report.write_report", refuse)
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    with pytest.raises(LaunchError, match=r"no report of demo: .*Permission denied"):
        _trimtab("report", "demo")


def test_version_is_printed() -> None:
    assert _trimtab("--version").startswith("trimtab")


def test_help_imports_neither_torch_nor_what_only_commands_need() -> None:
    done = _python(
        "import sys\nimport launch.cli\nlaunch.cli.build_app()\n"
        "print([m for m in ('torch', 'hydra', 'omegaconf', 'jinja2', 'rich', 'train')"
        " if m in sys.modules])"
    )
    assert done.stdout == "[]\n", done.stderr


def test_launching_never_imports_torch_or_train() -> None:
    modules = [p.stem for p in (ROOT / "launch").glob("*.py") if p.stem != "__init__"]
    lines = [f"import launch.{name}" for name in modules]
    done = _python(
        "\n".join(["import sys", *lines, "print({'torch', 'train'} & set(sys.modules))"])
    )
    assert done.stdout == "set()\n", done.stderr


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )


def _journal(folder: Path, *lines: str) -> None:
    run = folder / "runs" / "demo"
    run.mkdir(parents=True)
    (run / "journal.jsonl").write_text("\n".join(lines))


def _tool(path: Path, body: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
