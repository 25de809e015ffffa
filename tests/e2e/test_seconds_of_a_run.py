"""The classes of a run add up to what a stopwatch beside it says, to 1% and a process's end.

The stopwatch is the test's own, around the whole of a run. A machine that is busy may take half a
second to start or to bury a process, which is no second of a run; on runs of minutes it is nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness import BAD_DATA, TINY, Fault, Launch, records, run, start, wait_for_step

from monitoring.goodput import Goodput, goodput_of_run

SECONDS_A_BATCH = 0.1
SLOW = Fault(seconds_a_batch=SECONDS_A_BATCH)
_PROCESS_SECONDS = 0.5


class Stopwatch:
    seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds += time.monotonic() - started


@pytest.fixture(autouse=True)
def _ranks_can_be_forked(tmp_path: Path) -> None:
    """Start the server that forks ranks, which takes seconds that belong to no run."""
    assert Launch(_nothing, log=tmp_path / "nothing").wait() == (0,)


def _nothing() -> int:
    return 0


def assert_adds_up(folder: Path, stopwatch: Stopwatch) -> Goodput:
    found = goodput_of_run(folder)
    spent = found.seconds_by_class()
    print(f"stopwatch {stopwatch.seconds:.2f} s, wall {found.wall_seconds:.2f} s: {spent}")
    assert min(spent.values()) >= 0.0
    slack = 0.01 * stopwatch.seconds + _PROCESS_SECONDS
    assert sum(spent.values()) == pytest.approx(stopwatch.seconds, abs=slack)
    return found


def test_plain_run_with_saves_and_evaluations(tmp_path: Path) -> None:
    folder, stopwatch = tmp_path / "run", Stopwatch()
    with stopwatch.running():
        run([*TINY, "data.validation_interval_steps=10"], folder, fault=SLOW).expect(0)
    found = assert_adds_up(folder, stopwatch)
    assert found.data_wait == pytest.approx(40 * SECONDS_A_BATCH, rel=0.2)
    events = records(folder / "events.jsonl")
    for kind, seconds in (
        ("evaluation", found.evaluation),
        ("checkpoint_saved", found.checkpoint_stall),
    ):
        told = sum(event["seconds"] for event in events if event["kind"] == kind)
        assert seconds == pytest.approx(told, abs=0.1 + 0.01 * stopwatch.seconds), kind
    assert found.restart == found.rewind == found.recomputed == found.skipped_tokens == 0.0


def test_rewind_kill_and_gap(tmp_path: Path) -> None:
    folder, stopwatch, gap_seconds = tmp_path / "run", Stopwatch(), 3.0
    arguments = [*TINY, *BAD_DATA]
    with stopwatch.running():
        launch = start(arguments, folder, fault=SLOW)
        wait_for_step(launch, folder, 33, attempt=0)
        launch.kill()
        time.sleep(gap_seconds)
        run(arguments, folder, fault=SLOW).expect(0)
    found = assert_adds_up(folder, stopwatch)
    assert found.num_attempts == 2
    assert gap_seconds <= found.restart < gap_seconds + SECONDS_A_BATCH + 2.0
    assert found.rewind > 0.0
    assert found.skipped_tokens > 0.0, "the bad batches that it had trained on"
    assert found.recomputed > 0.0, "what came before them, and what the kill cost"
