"""kill -9 at each phase of a recovery: the restart ends in the same decision, to the same bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from harness import (
    ATTEMPTS,
    BAD_DATA,
    BAD_SAMPLES,
    LADDER,
    MEMORY_FIRST,
    NEW_LEVEL,
    SHOCK,
    TINY,
    Fault,
    assert_same_tensors,
    assert_trained_once,
    checkpoints,
    health,
    incidents,
    journal,
    losses_by_clock,
    losses_by_step,
    records,
    run,
    rungs,
    summary,
)

ARGUMENTS = (*TINY, *BAD_DATA)
CLIMB = (*LADDER, *SHOCK)
LEVELLED = (*LADDER, *NEW_LEVEL)
FROM_MEMORY = (*MEMORY_FIRST, *BAD_DATA)
UNDECIDED = ("before_capsule", "in_capsule", "after_capsule", "before_intent", "torn_intent")
# In the order in which a restart, too, meets them; memory is there in the first process alone.
DECIDED = (
    "after_load_from_memory",
    "after_load_from_disk",
    "after_ledger",
    "after_quarantine",
    "before_done",
    "torn_done",
    "after_done",
)
TORN_LINE = b'{"incident": 1, "phase": "int'


def assert_nothing_skipped_since(samples: Path, folder: Path, *, start: int, rank: int = 0) -> None:
    """Assert that nothing skipped was trained on from the `start`-th process of the log on."""
    skipped = {i for incident in incidents(folder) for i in range(*incident["skip"])}
    log = records(Path(f"{samples}.{rank}"))
    starts = [number for number, record in enumerate(log) if record["kind"] == "start"]
    later = [r["samples"] for r in log[starts[start] :] if r["kind"] == "batch"]
    assert later, "something was trained on"
    assert not skipped & {sample for batch in later for sample in batch}


def assert_same_recovery(folder: Path, reference: Any) -> None:
    """The same decisions, at the same clocks, and the same model at the end."""
    assert journal(folder) == journal(reference.folder)
    assert losses_by_clock(folder) == losses_by_clock(reference.folder)
    assert_same_tensors(checkpoints(folder)[-1], checkpoints(reference.folder)[-1])
    for key in ("step", "clock", "cursor", "rewinds", "tokens_seen", "skipped_samples"):
        assert summary(folder)[key] == summary(reference.folder)[key]


def kill_at(
    arguments: tuple[str, ...], folder: Path, place: str, *, num_ranks: int = 1, **fault: Any
) -> None:
    faults = Fault(kill_at=place, samples=folder.parent / "samples", **fault)
    result = run(arguments, folder, num_ranks=num_ranks, fault=faults)
    assert result.exit_codes[faults.kill_rank] == -9, result.output
    assert not (folder / "summary.json").exists(), "it was killed before its end"


def finish(arguments: tuple[str, ...], folder: Path, *, num_ranks: int = 1) -> str:
    fault = Fault(samples=folder.parent / "samples")
    return run(arguments, folder, num_ranks=num_ranks, fault=fault).expect(0).output


def tear(folder: Path) -> None:
    """Add what a disk may leave of a line that was on its way."""
    with (folder / "journal.jsonl").open("ab") as file:
        file.write(TORN_LINE)


def test_undisturbed_recovery_goes_back_once_and_skips_the_bad_stretch(
    recovered_single: Any,
) -> None:
    (incident,) = incidents(recovered_single.folder)
    assert incident["target_step"] < incident["onset_step"] <= incident["detected_step"]
    assert incident["onset_step"] == 21
    assert set(BAD_SAMPLES) <= set(range(*incident["skip"])), "the bad stretch is what was skipped"
    assert_trained_once(recovered_single.folder, recovered_single.samples)
    assert summary(recovered_single.folder)["rewinds"] == 1


def test_undisturbed_climb_takes_each_attempt_once(climbed_single: Any) -> None:
    assert rungs(climbed_single.folder) == list(ATTEMPTS)
    assert {incident["incident"] for incident in incidents(climbed_single.folder)} == {1}
    assert_trained_once(climbed_single.folder, climbed_single.samples)


# An undisturbed rewind loads from memory: loads from disk are those of restarts, below.
IN_MEMORY = tuple(place for place in DECIDED if place != "after_load_from_disk")


@pytest.mark.parametrize("place", [*UNDECIDED, "after_intent", *IN_MEMORY])
def test_kill_in_a_rewind_changes_nothing(
    place: str, tmp_path: Path, recovered_single: Any
) -> None:
    folder = tmp_path / "run"
    kill_at(ARGUMENTS, folder, place)
    is_done = place == "after_done"
    assert len(incidents(folder)) == (1 if is_done else 0)
    output = finish(ARGUMENTS, folder)
    assert_same_recovery(folder, recovered_single)
    assert_trained_once(folder, tmp_path / "samples")
    if place not in UNDECIDED:
        assert_nothing_skipped_since(tmp_path / "samples", folder, start=1)
    is_cut_short = place not in UNDECIDED and not is_done
    assert ("finishing incident 1, cut short before" in output) == is_cut_short
    capsule = folder / "incidents" / "0001-1" / "capsule.json"
    assert json.loads(capsule.read_text())["incident"]["target_step"] == 15


def test_each_restart_of_an_unfinished_rewind_may_be_killed_too(
    tmp_path: Path, recovered_single: Any
) -> None:
    folder = tmp_path / "run"
    for place in DECIDED:
        kill_at(ARGUMENTS, folder, place)
        tear(folder)
    finish(ARGUMENTS, folder)
    assert_same_recovery(folder, recovered_single)
    assert_trained_once(folder, tmp_path / "samples")
    assert_nothing_skipped_since(tmp_path / "samples", folder, start=1)


@pytest.mark.parametrize(
    "place",
    [
        "after_intent",
        *(
            pytest.param(
                place, marks=pytest.mark.slow if place in ("after_ledger", "before_done") else ()
            )
            for place in IN_MEMORY
        ),
    ],
)
def test_target_that_was_in_memory_alone_is_made_again_from_an_older_checkpoint(
    place: str, tmp_path: Path, recovered_from_memory: Any
) -> None:
    """Decided is decided: the same samples up to the target's cursor, then the same jump."""
    folder, reference = tmp_path / "run", recovered_from_memory.folder
    (undisturbed,) = incidents(reference)
    assert undisturbed["target_step"] == 15
    kill_at(FROM_MEMORY, folder, place)
    output = finish(FROM_MEMORY, folder)
    assert "resumed at step 10" in output
    (incident,) = incidents(folder)
    if place != "after_done":
        assert incident["target_step"] == 10
    of_the_target = ("target_checkpoint", "target_step")
    ours, theirs = (
        [{k: v for k, v in record.items() if k not in of_the_target} for record in journal(one)]
        for one in (folder, reference)
    )
    assert ours == theirs, "the decision stands, whatever the load came to"
    assert losses_by_step(folder) == losses_by_step(reference)
    assert_same_tensors(checkpoints(folder)[-1], checkpoints(reference)[-1])
    assert_trained_once(folder, tmp_path / "samples")
    assert_nothing_skipped_since(tmp_path / "samples", folder, start=1)


def test_ladder_whose_targets_are_lost_with_memory_climbs_the_same_way(
    tmp_path: Path,
) -> None:
    """The clock goes on while lost steps are made again; what is decided is the same."""
    calm, folder = tmp_path / "calm", tmp_path / "killed" / "run"
    arguments = (*LADDER, *BAD_DATA, *(set(MEMORY_FIRST) - set(TINY)))
    run(arguments, calm).expect(0)
    kill_at(arguments, folder, "after_load_from_memory", kill_attempt=1)
    kill_at(arguments, folder, "after_ledger", kill_attempt=2)
    finish(arguments, folder)
    keys = ("incident", "attempt", "rung", "phase", "onset_step", "detected_step", "skip")
    ours, theirs = (
        [tuple(str(record[key]) for key in keys) for record in journal(one)]
        for one in (folder, calm)
    )
    assert [r for r in ours if "veto" not in r] == [r for r in theirs if "veto" not in r]
    assert {r for r in ours if "veto" in r} == {r for r in theirs if "veto" in r}
    assert losses_by_step(folder) == losses_by_step(calm)
    assert_same_tensors(checkpoints(folder)[-1], checkpoints(calm)[-1])
    assert_trained_once(folder, folder.parent / "samples")


def test_undecided_rewind_to_memory_is_decided_again_from_what_is_left(
    tmp_path: Path, oracle: Any
) -> None:
    """Nothing was decided when memory was lost: the checkpoint on disk is the target now."""
    folder = tmp_path / "run"
    # From step 10, ten batches are too few. The checkpoint of step 20 is there to go on from.
    arguments = (*FROM_MEMORY, "recovery.skip=15 batches", "checkpoint.is_async=false")
    kill_at(arguments, folder, "before_intent")
    finish(arguments, folder)
    (incident,) = incidents(folder)
    assert (incident["target_step"], incident["onset_step"]) == (10, 21)
    assert_trained_once(folder, tmp_path / "samples")
    never_met = oracle(arguments, (tuple(incident["skip"]),))
    assert losses_by_step(folder) == losses_by_step(never_met.folder)
    assert_same_tensors(checkpoints(folder)[-1], checkpoints(never_met.folder)[-1])


def _long_tail(attempt: int, chain: str) -> Any:
    is_default = (attempt, chain) in {(1, "decided"), (2, "undecided"), (4, "decided")}
    # The third attempt goes further back than the ring of snapshots reaches.
    decided = DECIDED if attempt != 3 else DECIDED[1:]
    return pytest.param(
        attempt,
        UNDECIDED if chain == "undecided" else decided,
        id=f"{ATTEMPTS[attempt - 1]}-{chain}",
        marks=() if is_default else pytest.mark.slow,
    )


@pytest.mark.parametrize(
    ("attempt", "places"),
    [_long_tail(attempt, chain) for attempt in (1, 2, 3, 4) for chain in ("undecided", "decided")],
)
def test_ladder_killed_again_and_again_in_one_attempt_climbs_the_same_way(
    attempt: int, places: tuple[str, ...], tmp_path: Path, climbed_single: Any
) -> None:
    """Each place in turn, each in a new process, with a torn line in between."""
    folder = tmp_path / "run"
    for place in places:
        kill_at(CLIMB, folder, place, kill_attempt=attempt)
        tear(folder)
    finish(CLIMB, folder)
    assert_same_recovery(folder, climbed_single)
    assert_trained_once(folder, tmp_path / "samples")


def test_ladder_killed_once_in_each_attempt_climbs_the_same_way(
    tmp_path: Path, climbed_single: Any
) -> None:
    folder = tmp_path / "run"
    for number, place in enumerate(
        ("after_load_from_memory", "before_intent", "after_ledger", "torn_done"), start=1
    ):
        kill_at(CLIMB, folder, place, kill_attempt=number)
    finish(CLIMB, folder)
    assert_same_recovery(folder, climbed_single)
    assert_trained_once(folder, tmp_path / "samples")


def test_ladder_killed_right_before_more_bad_data_climbs_on(
    tmp_path: Path, levelled_single: Any
) -> None:
    """Each rewind is done, and the very next batch is bad: that is not the fault of the resume."""
    assert rungs(levelled_single.folder) == ["replay", "skip", "skip_further", "accept"]
    folder = tmp_path / "run"
    for attempt, place in ((2, "after_done"), (3, "after_done"), (4, "after_ledger")):
        kill_at(LEVELLED, folder, place, kill_attempt=attempt)
    finish(LEVELLED, folder)
    assert_same_recovery(folder, levelled_single)
    assert_trained_once(folder, tmp_path / "samples")


def test_kill_around_the_note_of_a_refused_update_leaves_it_written_once(
    tmp_path: Path, climbed_single: Any
) -> None:
    folder = tmp_path / "run"
    for place in ("before_note", "torn_note", "after_note"):
        kill_at(CLIMB, folder, place)
    finish(CLIMB, folder)
    assert_same_recovery(folder, climbed_single)
    clocks = [r["clock"] for r in journal(folder) if r["rung"] == "veto"]
    assert clocks and len(clocks) == len(set(clocks))


def test_checkpoint_made_after_the_onset_is_never_loaded_again(
    tmp_path: Path, recovered_single: Any
) -> None:
    """The one of step 20 is younger than the target; it stays quarantined until it is replaced."""
    folder = tmp_path / "run"
    arguments = (*ARGUMENTS, "checkpoint.is_async=false")  # it has landed when the run is killed
    kill_at(arguments, folder, "after_done")
    (incident,) = incidents(folder)
    assert incident["quarantine"]
    for name in incident["quarantine"]:
        assert health(folder / "checkpoints" / name)["health"] == "quarantined"
    output = finish(arguments, folder)
    assert f"resumed at step {incident['target_step']}" in output
    assert losses_by_clock(folder) == losses_by_clock(recovered_single.folder)


def test_torn_line_alone_is_no_incident(tmp_path: Path, clean_single: Any) -> None:
    folder = tmp_path / "run"
    run(TINY, folder, fault=Fault(kill_at="in_save_of_step_20")).expect(-9)
    tear(folder)
    finish(TINY, folder)
    assert journal(folder) == []
    assert_same_tensors(checkpoints(folder)[-1], checkpoints(clean_single.folder)[-1])
