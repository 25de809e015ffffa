"""Whole runs whose saves go on beside training: kills in them, incidents amid them, full disks."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import (
    BAD_DATA,
    TINY,
    Fault,
    assert_same_tensors,
    assert_trained_once,
    checkpoints,
    journal,
    losses_by_clock,
    records,
    run,
    summary,
)

# In the thread that writes; each restart meets the next one.
PLACES = ("half_a_file", "before_seal", "after_seal", "before_publish", "with_manifest")
SLOW = 0.6  # seconds more for the write of step 20: until the rewind of step 23 is done


def last_name(folder: Path) -> str:
    return checkpoints(folder)[-1].name


def in_flight_at_the_rewind(folder: Path) -> list[int]:
    """Return the steps of saves that began before a rewind and landed after it."""
    events = records(folder / "events.jsonl")
    (rewind,) = (event for event in events if event["kind"] == "rewind")
    saved = [event for event in events if event["kind"] == "checkpoint_saved"]
    return [
        event["step"]
        for event in saved
        if event["time"] - event["background_seconds"] < rewind["time"] < event["time"]
    ]


def test_kill_while_a_checkpoint_is_written_leaves_nothing_that_looks_whole(
    tmp_path: Path, clean_single: Any
) -> None:
    folder = tmp_path / "run"
    for place in PLACES:
        run(TINY, folder, fault=Fault(kill_at=place)).expect(-9)
        assert last_name(folder) == "step-00000015-clock-00000015", place
        assert list((folder / "checkpoints").glob(".saving-step-00000020*")), place
    result = run(TINY, folder, fault=Fault(kill_at="after_publish")).expect(-9)
    assert "resumed at step 15" in result.output
    assert last_name(folder) == "step-00000020-clock-00000020", "nobody had taken it over yet"
    result = run(TINY, folder).expect(0)
    assert "resumed at step 20" in result.output
    assert not list((folder / "checkpoints").glob(".*"))
    assert losses_by_clock(folder) == losses_by_clock(clean_single.folder)
    assert_same_tensors(checkpoints(folder)[-1], checkpoints(clean_single.folder)[-1])


@pytest.mark.parametrize(
    ("num_ranks", "engine"),
    [(1, "single"), (2, "fsdp"), pytest.param(2, "ddp", marks=pytest.mark.slow)],
)
def test_incident_while_a_save_is_in_flight_is_the_same_incident(
    num_ranks: int, engine: str, tmp_path: Path
) -> None:
    """The reference waits for each of its saves."""
    arguments = (*TINY, *BAD_DATA, f"engine={engine}")
    at_once, beside = tmp_path / "at-once", tmp_path / "beside"
    run([*arguments, "checkpoint.is_async=false"], at_once, num_ranks=num_ranks).expect(0)
    samples = tmp_path / "samples"
    fault = Fault(write_seconds=SLOW, samples=samples)
    run(arguments, beside, num_ranks=num_ranks, fault=fault).expect(0)
    assert in_flight_at_the_rewind(beside) == [20]
    assert in_flight_at_the_rewind(at_once) == []
    assert journal(beside) == journal(at_once)
    assert losses_by_clock(beside) == losses_by_clock(at_once)
    assert [path.name for path in checkpoints(beside)] == [p.name for p in checkpoints(at_once)]
    assert_same_tensors(checkpoints(beside)[-1], checkpoints(at_once)[-1])
    assert_trained_once(beside, samples)


def test_incident_while_a_save_is_in_flight_may_be_killed(
    tmp_path: Path, recovered_single: Any
) -> None:
    folder, samples = tmp_path / "run", tmp_path / "samples"
    arguments = (*TINY, *BAD_DATA)
    for place in ("before_intent", "after_done"):
        fault = Fault(kill_at=place, write_seconds=SLOW, samples=samples)
        run(arguments, folder, fault=fault).expect(-9)
        assert last_name(folder) == "step-00000015-clock-00000015", "it never landed"
    run(arguments, folder, fault=Fault(samples=samples)).expect(0)
    assert journal(folder) == journal(recovered_single.folder)
    assert losses_by_clock(folder) == losses_by_clock(recovered_single.folder)
    assert_same_tensors(checkpoints(folder)[-1], checkpoints(recovered_single.folder)[-1])
    assert_trained_once(folder, samples)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_so_many_failed_saves_in_a_row_end_the_run_with_its_reason(
    num_ranks: int, small_disk: Callable[[Path, str], None], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    small_disk(folder / "checkpoints", "1000k")  # room for one, of about 720 kB
    arguments = [*TINY, "checkpoint.max_failures=3"]
    result = run(arguments, folder, num_ranks=num_ranks).expect(3)
    assert "attempt 1 of 2, the next in 0.05 s" in result.output
    assert "the last 3 saves have failed" in result.output
    ending = summary(folder)
    assert (ending["reason_code"], ending["finished"]) == ("saves_failed", False)
    assert 15 <= ending["step"] <= 20
    (only,) = checkpoints(folder)
    assert only.name == "step-00000000-clock-00000000"
    assert not list((folder / "checkpoints").glob(".*")), "what was written was removed"


def test_run_whose_folder_is_lost_goes_on_from_the_copy_elsewhere(
    tmp_path: Path, clean_ddp: Any
) -> None:
    """Two ranks write the copy, each its share; one process reads it."""
    folder, bucket = tmp_path / "run", tmp_path / "bucket"
    arguments = [*TINY, f"checkpoint.remote=file://{bucket}"]
    run(arguments, folder, num_ranks=2).expect(0)
    copies = sorted(path.name for path in (bucket / "run").iterdir())
    assert copies == sorted(path.name for path in checkpoints(folder))
    shutil.rmtree(bucket / "run" / last_name(folder))
    expected = checkpoints(folder)[-2].name
    shutil.rmtree(folder)
    result = run(arguments, folder).expect(0)
    assert f"resumed at step {int(expected.split('-')[1])}" in result.output
    assert summary(folder)["step"] == 40
    assert last_name(folder) == last_name(clean_ddp.folder)
