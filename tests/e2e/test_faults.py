"""Signals, hangs, crashes, full memory, in real processes: what a run leaves and goes on from."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import (
    MAIN,
    TINY,
    Fault,
    Launch,
    assert_same_tensors,
    checkpoints,
    environment,
    losses_by_step,
    metrics,
    place,
    records,
    run,
    start,
    summary,
    wait_for_step,
)

from train.health.heartbeats import process_start

SLOW = Fault(seconds_a_batch=0.05)
QUICK = (*TINY, "health.heartbeat_seconds=0.3", "health.hang_seconds=2", "health.hang_factor=2")
QUICK += ("health.max_same_failures=3",)


def outcome(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "outcome.json").read_text())
    return loaded


def pids(launch: Launch) -> list[int]:
    return [int(process.pid) for process in launch._ranks]


def begin(
    target: Callable[[list[str]], int],
    folder: Path,
    *more: str,
    arguments: tuple[str, ...] = QUICK,
    num_ranks: int = 1,
) -> Launch:
    """Start ranks that run `target` with the arguments of a run."""
    log = folder.parent / f"{folder.name}.output"
    return Launch(target, [*arguments, *more, *place(folder)], log=log, num_ranks=num_ranks)


def main(arguments: list[str]) -> int:
    from train.main import main as train_main

    sys.argv = [MAIN, *arguments]
    return train_main()


def at_batch(number: int, rank: int, act: Callable[[], object]) -> None:
    """Do something on one rank when it asks for its batch of that number, from 1."""
    from train.data.read_ahead import ReadAhead

    if int(os.environ.get("RANK", "0")) != rank:
        return
    count = 0
    original = ReadAhead.at

    def at(self: ReadAhead, cursor: int, num_samples: int) -> Any:
        nonlocal count
        count += 1
        if count == number:
            act()
        return original(self, cursor, num_samples)

    ReadAhead.at = at  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("number", "num_ranks", "code", "exit_code"),
    [
        (signal.SIGTERM, 1, "preempted", 75),
        (signal.SIGUSR1, 2, "preempted", 75),
        (signal.SIGINT, 1, "interrupted", 130),
    ],
)
def test_a_signal_saves_stops_and_the_same_command_ends_with_the_same_bits(
    number: signal.Signals,
    num_ranks: int,
    code: str,
    exit_code: int,
    tmp_path: Path,
    clean_single: Any,
    clean_ddp: Any,
) -> None:
    folder = tmp_path / "run"
    launch = start(TINY, folder, num_ranks=num_ranks, fault=SLOW)
    wait_for_step(launch, folder, 5, attempt=0)
    os.kill(pids(launch)[-1], number)  # one rank alone
    assert launch.wait() == (exit_code,) * num_ranks, launch.output()
    last = checkpoints(folder)[-1]
    ended = outcome(folder)
    assert (ended["code"], ended["exit_code"], ended["attempt"]) == (code, exit_code, 0)
    assert last.name.startswith(f"step-{ended['step']:08d}")
    assert ended["step"] % 5, "saved where no checkpoint was due"
    assert summary(folder)["reason_code"] == code

    run(TINY, folder, num_ranks=num_ranks).expect(0)
    clean = clean_single if num_ranks == 1 else clean_ddp
    assert [record["step"] for record in metrics(folder)] == list(range(1, 41)), "none twice"
    assert losses_by_step(folder) == losses_by_step(clean.folder)
    assert_same_tensors(checkpoints(folder)[-1], checkpoints(clean.folder)[-1])
    assert outcome(folder)["code"] == "completed"
    assert [end["code"] for end in outcome(folder)["previous"]] == [code]


def hang_in_the_data(arguments: list[str]) -> int:
    at_batch(10, 1, lambda: time.sleep(600))
    return main(arguments)


@pytest.mark.parametrize("victim", [None, 1, 0])
def test_a_hang_is_found_its_rank_named_and_the_run_ends_and_goes_on(
    victim: int | None, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    if victim is None:
        launch = begin(hang_in_the_data, folder, num_ranks=2)
        blamed, phase = 1, "data"
    else:
        launch = begin(slow_main, folder, num_ranks=2)
        wait_for_step(launch, folder, 8, attempt=0)
        os.kill(pids(launch)[victim], signal.SIGSTOP)
        blamed, phase = victim, "step"
    codes = wait_for_all(launch)
    expected = [75, 75]
    if victim is not None:
        expected[victim] = -signal.SIGKILL
    assert codes == tuple(expected), launch.output()
    hang = json.loads((folder / "hangs" / "attempt-0" / "hang.json").read_text())
    assert hang["ranks"] == [blamed]
    assert phase in (hang["phase"], *(b["phase"] for b in hang["heartbeats"] if b["rank"] == 1))
    assert outcome(folder)["code"] == "hang"
    assert f"rank {blamed}" in outcome(folder)["reason"] or victim == 0
    (event,) = [record for record in records(folder / "events.jsonl") if record["kind"] == "hang"]
    assert event["ranks"] == [blamed] and event["seconds"] >= 2
    stacks = sorted(path.name for path in (folder / "hangs" / "attempt-0").glob("rank-*.txt"))
    alive = {0, 1} - {victim}
    assert stacks == [f"rank-{rank}.txt" for rank in sorted(alive)]
    text = (folder / "hangs" / "attempt-0" / "rank-1.txt").read_text() if 1 in alive else ""
    assert victim is not None or "in hang_in_the_data" in text
    if victim is None:
        run(TINY, folder, num_ranks=2).expect(0)
        assert losses_by_step(folder)[40]


def test_a_stopped_rank_is_named_and_ended_when_a_collective_times_out_first(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    patient = ("health.hang_seconds=100", "engine.timeout_seconds=4")
    launch = begin(slow_main, folder, *patient, num_ranks=2)
    wait_for_step(launch, folder, 8, attempt=0)
    os.kill(pids(launch)[1], signal.SIGSTOP)
    assert wait_for_all(launch) == (75, -signal.SIGKILL), launch.output()
    assert "rank 1 (process" in outcome(folder)["reason"]


def slow_main(arguments: list[str]) -> int:
    from faults import install

    install(SLOW, Path("/"))
    return main(arguments)


def wait_for_all(launch: Launch, seconds: float = 60) -> tuple[int, ...]:
    """Return the exit codes once every rank has ended by itself."""
    for process in launch._ranks:
        process.join(timeout=seconds)
        if process.exitcode is None:
            launch.kill()
            raise TimeoutError(launch.output())
    return tuple(int(process.exitcode) for process in launch._ranks)


def fail_at_batch_4(arguments: list[str]) -> int:
    def fail() -> None:
        raise ValueError(f"sensor {time.time()} is broken")

    at_batch(4, 0, fail)
    return main(arguments)


def die_at_batch_4(arguments: list[str]) -> int:
    at_batch(4, 0, lambda: os.kill(os.getpid(), signal.SIGKILL))
    return main(arguments)


@pytest.mark.parametrize(
    "target", [die_at_batch_4, pytest.param(fail_at_batch_4, marks=pytest.mark.slow)]
)
def test_the_same_failure_three_times_stops_the_run_until_something_changes(
    target: Callable[[list[str]], int], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    for _ in range(3):
        assert wait_for_all(begin(target, folder)) in ((1,), (-9,))
    launch = begin(target, folder)
    assert wait_for_all(launch) == (3,), launch.output()
    said = "ValueError: sensor" if target is fail_at_batch_4 else "it died without a word"
    assert "the last 3 attempts all ended at step" in launch.output()
    assert f"in the same way: {said}" in launch.output()
    assert outcome(folder)["code"] == "crash_loop"
    assert wait_for_all(begin(main, folder)) == (3,), "again without a change"
    launch = begin(main, folder, "health.max_same_failures=4")
    assert wait_for_all(launch) == (0,), launch.output()


def main_with_little_memory(arguments: list[str]) -> int:
    def limit() -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 300 * 2**20,) * 2)

    at_batch(2, int(os.environ.get("WORLD_SIZE", "1")) - 1, limit)
    return main(arguments)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_out_of_memory_is_one_message_that_says_what_to_change(
    num_ranks: int, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    big = ("schedule.batch_samples=2048", "schedule.batch_ramp_steps=0", "data.sequence_length=64")
    launch = begin(main_with_little_memory, folder, *big, "run.steps=50", num_ranks=num_ranks)
    assert wait_for_all(launch) == (1,) * num_ranks, launch.output()
    share = 2048 // num_ranks
    assert f"rank {num_ranks - 1} (cpu on " in launch.output()
    assert f"engine.micro_batch_samples={share // 2} (now {share} of" in launch.output()
    assert "Traceback" not in launch.output()
    assert outcome(folder)["code"] == "out_of_memory"
    assert "ran out of memory after step 1" in outcome(folder)["reason"]


def die_when_loading_the_last(arguments: list[str]) -> int:
    from train.engines.torch_engine import TorchEngine

    original = TorchEngine.load

    def load(self: TorchEngine, folder: Path) -> None:
        if "step-00000010" in folder.name:
            os.kill(os.getpid(), signal.SIGKILL)
        original(self, folder)

    TorchEngine.load = load  # type: ignore[method-assign]
    return main(arguments)


def test_a_checkpoint_whose_load_ends_the_process_twice_is_given_up(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    at_once = "checkpoint.is_async=false"  # so that it is whole when the process dies
    assert wait_for_all(begin(die_at_batch_12, folder, at_once)) == (-9,)
    assert checkpoints(folder)[-1].name.startswith("step-00000010")
    for _ in range(2):
        assert wait_for_all(begin(die_when_loading_the_last, folder)) == (-9,)
    launch = begin(die_when_loading_the_last, folder)
    assert wait_for_all(launch) == (0,), launch.output()
    assert "has ended the process 2 times; it is quarantined" in launch.output()
    assert not (folder / "checkpoints" / ".loading.json").exists()


def die_at_batch_12(arguments: list[str]) -> int:
    at_batch(12, 0, lambda: os.kill(os.getpid(), signal.SIGKILL))
    return main(arguments)


def slow_forward_on_rank_1(arguments: list[str]) -> int:
    from train.models.decoder import Decoder

    original = Decoder.forward

    def forward(self: Decoder, *inputs: Any, **named: Any) -> Any:
        if int(os.environ.get("RANK", "0")) == 1 and len(metrics_of(arguments)) > 15:
            time.sleep(0.03)
        return original(self, *inputs, **named)

    Decoder.forward = forward  # type: ignore[method-assign]
    return main(arguments)


def metrics_of(arguments: list[str]) -> list[dict[str, Any]]:
    found = {a.partition("=")[0]: a.partition("=")[2] for a in arguments}
    return metrics(Path(found["run.dir"]) / found["run.name"])


def test_a_slow_rank_is_named_once(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    launch = begin(
        slow_forward_on_rank_1,
        folder,
        *("health.straggler_interval_steps=5", "health.straggler_sigma=20"),
        num_ranks=2,
        arguments=TINY,
    )
    assert wait_for_all(launch) == (0, 0), launch.output()
    told = [record for record in records(folder / "events.jsonl") if record["kind"] == "straggler"]
    told = [record for record in told if record["what"] == "a forward"]
    assert [record["rank"] for record in told] == [1], launch.output()
    assert 20 <= told[0]["step"] <= 30
    assert "rank 1 (cpu on " in launch.output()


class Agent:
    """torchrun's agent of one "host", in an elastic launch of one or two."""

    def __init__(self, folder: Path, port: int) -> None:
        elastic = ["--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=5", "--rdzv-id=a-launch"]
        place_ = [f"--rdzv-endpoint=localhost:{port}", "--rdzv-conf=last_call_timeout=2"]
        more = ("run.steps=2000", "checkpoint.interval_steps=20", "engine.timeout_seconds=30")
        with (folder.parent / "agents.log").open("a") as log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=c10d"),
                    *(*elastic, *place_, MAIN, *TINY, *more, *place(folder)),
                ],
                env={
                    **environment(),
                    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
                    "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
                },
                stdout=log,
                stderr=log,
            )

    def power_off(self) -> None:
        """SIGKILL the agent; the kernel does the same to its ranks."""
        self._process.kill()
        self._process.wait()

    def ask_for_the_end(self) -> None:
        self._process.send_signal(signal.SIGUSR1)
        self._process.wait(timeout=60)


def wait_for_world(folder: Path, starts: int, world_size: int) -> None:
    """Return when that many attempts have begun and the last one, of so many ranks, trains."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        begun = [r for r in records(folder / "events.jsonl") if r["kind"] == "run_start"]
        stepped = metrics(folder)
        if len(begun) >= starts and stepped and begun[-1]["world_size"] == world_size:
            here = [r for r in stepped if r["attempt"] == begun[-1]["attempt"]]
            if len(here) > 25:
                return
        time.sleep(0.05)
    raise TimeoutError((folder.parent / "agents.log").read_text()[-5000:])


@pytest.mark.slow
def test_a_lost_host_is_done_without_and_taken_in_again_with_the_same_data(tmp_path: Path) -> None:
    folder, port = tmp_path / "run", free_port()
    agents = [Agent(folder, port)]
    try:
        time.sleep(1)  # it holds the store of the rendezvous
        agents.append(Agent(folder, port))
        wait_for_world(folder, 1, 2)
        agents[1].power_off()
        wait_for_world(folder, 2, 1)
        agents.append(Agent(folder, port))
        wait_for_world(folder, 3, 2)
        agents[0].ask_for_the_end()
    finally:
        for agent in agents:
            agent.power_off()
    ended = outcome(folder)
    assert (ended["code"], ended["attempt"]) == ("preempted", 2)
    cursors: dict[int, set[int]] = {}
    for record in metrics(folder):
        cursors.setdefault(record["step"], set()).add(record["cursor"])
    assert sorted(cursors) == list(range(1, ended["step"] + 1)), "no step is missing"
    assert all(len(found) == 1 for found in cursors.values()), "each step reads the same data"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_a_killed_agent_leaves_no_rank_behind(tmp_path: Path) -> None:
    code = """
import os, sys, time
from train.health.orphans import die_with_launcher
die_with_launcher()
print(os.getpid(), flush=True)
time.sleep(60)
"""
    (tmp_path / "rank.py").write_text(code)
    launcher = subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            str(tmp_path / "rank.py"),
        ],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert launcher.stdout is not None
    rank = int(launcher.stdout.readline())
    launcher.kill()
    killed = time.monotonic()
    while Path(f"/proc/{rank}").exists() and process_start(rank):
        assert time.monotonic() < killed + 5, "it lives on"
        time.sleep(0.01)
    launcher.wait()
    launcher.stdout.close()


@pytest.mark.slow
def test_torchrun_starts_the_ranks_again_at_once_after_one_has_died(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with (tmp_path / "log").open("w") as log:
        agent = subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                *("--nproc-per-node=2", "--max-restarts=1", MAIN),
                *(*TINY, "run.steps=400", *place(folder)),
            ],
            env=environment(),
            stdout=log,
            stderr=log,
        )
    try:
        deadline = time.monotonic() + 60
        while len(metrics(folder)) < 8:
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.02)
        ranks = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
        os.kill(int(ranks[-1]), signal.SIGKILL)
        assert agent.wait(timeout=90) == 0, (tmp_path / "log").read_text()[-5000:]
    finally:
        agent.kill()
        agent.wait()
    assert {record["attempt"] for record in metrics(folder)} == {0, 1}
    assert outcome(folder)["code"] == "completed"
    assert outcome(folder)["previous"][0]["code"] == "failed"
