"""A run that was killed and started again is, bit for bit, a run that was never killed."""

from __future__ import annotations

import json
import random
import secrets
import shutil
from pathlib import Path
from typing import Any

import pytest
from harness import (
    TINY,
    Fault,
    Launch,
    assert_same_tensors,
    checkpoints,
    command,
    losses_by_clock,
    metrics,
    records,
    run,
    start,
    summary,
    wait_for_step,
)

SLOW = Fault(seconds_a_batch=0.02)


def kill_at_step(folder: Path, step: int, *, num_ranks: int, attempt: int) -> None:
    launch: Launch = start(TINY, folder, num_ranks=num_ranks, fault=SLOW)
    wait_for_step(launch, folder, step, attempt=attempt)
    launch.kill()
    assert launch.wait() == (-9,) * num_ranks
    assert not (folder / "summary.json").exists(), "it was killed before its end"


def assert_same_run(folder: Path, reference: Any) -> None:
    assert losses_by_clock(folder) == losses_by_clock(reference.folder)
    assert checkpoints(folder)[-1].name == checkpoints(reference.folder)[-1].name
    assert_same_tensors(checkpoints(folder)[-1], checkpoints(reference.folder)[-1])
    for key in ("step", "cursor", "clock", "tokens_seen", "validation_loss_nats"):
        assert summary(folder)[key] == summary(reference.folder)[key]


def random_steps(count: int) -> list[int]:
    seed = secrets.randbelow(2**32)
    steps = sorted(random.Random(seed).sample(range(2, 36), count))
    print(f"seed {seed}: killed at steps {steps}")
    return steps


def test_single_process_killed_at_random_steps_ends_as_if_never_killed(
    tmp_path: Path, clean_single: Any
) -> None:
    folder = tmp_path / "run"
    for attempt, step in enumerate(random_steps(3)):
        kill_at_step(folder, step, num_ranks=1, attempt=attempt)
    run(TINY, folder).expect(0)
    assert_same_run(folder, clean_single)


def test_two_ranks_killed_at_a_random_step_end_as_if_never_killed(
    tmp_path: Path, clean_ddp: Any
) -> None:
    folder = tmp_path / "run"
    (step,) = random_steps(1)
    kill_at_step(folder, step, num_ranks=2, attempt=0)
    run(TINY, folder, num_ranks=2).expect(0)
    assert_same_run(folder, clean_ddp)


def test_kill_in_the_middle_of_a_save_leaves_nothing_that_looks_whole(
    tmp_path: Path, clean_single: Any
) -> None:
    folder = tmp_path / "run"
    run(TINY, folder, fault=Fault(kill_at="in_save_of_step_20")).expect(-9)
    assert [path.name for path in checkpoints(folder)][-1] == "step-00000015-clock-00000015"
    assert list((folder / "checkpoints").glob(".saving-*")), "the kill did leave something"
    result = run(TINY, folder).expect(0)
    assert "resumed at step 15" in result.output
    assert not list((folder / "checkpoints").glob(".*"))
    assert_same_run(folder, clean_single)


def test_run_goes_on_with_another_number_of_ranks(tmp_path: Path, clean_single: Any) -> None:
    """Killed as a single process, goes on as ddp: the same samples, the losses within 1e-4."""
    folder, samples = tmp_path / "run", tmp_path / "samples"
    run(TINY, folder, fault=Fault(kill_at="in_save_of_step_20")).expect(-9)
    run(TINY, folder, num_ranks=2, fault=Fault(samples=samples)).expect(0)
    reference = {record["clock"]: record for record in metrics(clean_single.folder)}
    resumed = [record for record in metrics(folder) if record["attempt"] == 1]
    assert [record["step"] for record in resumed] == list(range(16, 41))
    for record in resumed:
        assert record["loss_nats"] == pytest.approx(reference[record["clock"]]["loss_nats"], 1e-4)
    everything, rest = (
        [record for record in records(Path(f"{log}.0")) if record["kind"] == "batch"]
        for log in (clean_single.samples, samples)
    )
    assert rest == everything[15:]


def test_metrics_of_a_resumed_run_continue_the_file(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(TINY, folder, fault=Fault(kill_at="in_save_of_step_20")).expect(-9)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "cursor"')  # what a kill in the middle of a write leaves
    run(TINY, folder).expect(0)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    unreadable = [line for line in lines if not _is_json(line)]
    assert len(unreadable) == 1, "the torn line was ended, and nothing was glued to it"
    steps = [(record["attempt"], record["step"]) for record in metrics(folder)]
    # The report of a step comes with the next one, so the one of step 20 was not written yet.
    assert steps[-25:] == [(1, step) for step in range(16, 41)]


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def test_finished_run_ends_at_once_and_trains_nothing(tmp_path: Path, clean_single: Any) -> None:
    folder = tmp_path / "clean-single"
    shutil.copytree(clean_single.folder, folder)
    before = metrics(folder)
    result = run(TINY, folder).expect(0)
    assert metrics(folder) == before
    assert "resumed at step 40" in result.output
    assert summary(folder)["reason"] == "completed"
    assert (
        summary(folder)["validation_loss_nats"]
        == summary(clean_single.folder)["validation_loss_nats"]
    )


def test_overwrite_starts_over(tmp_path: Path, clean_single: Any) -> None:
    folder = tmp_path / "clean-single"
    shutil.copytree(clean_single.folder, folder)
    result = run([*TINY, "run.overwrite=true", "optim.lr=2e-2"], folder).expect(0)
    assert "started" in result.output
    assert {record["attempt"] for record in metrics(folder)} == {0}
    losses = losses_by_clock(folder)
    assert len(losses) == 40
    assert losses != losses_by_clock(clean_single.folder)


def test_torchrun_from_another_working_folder_is_the_same_run(
    tmp_path: Path, clean_ddp: Any
) -> None:
    """The real command line, with a relative run.dir, on two ranks."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    command(TINY, Path("some/runs/run"), num_ranks=2, cwd=elsewhere).expect(0)
    assert_same_run(elsewhere / "some" / "runs" / "run", clean_ddp)
    assert [path.name for path in elsewhere.iterdir()] == ["some"]
