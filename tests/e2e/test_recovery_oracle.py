"""A run that recovered is, from the target on, bit for bit a run that never saw the bad data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness import (
    BAD_DATA,
    LADDER,
    LONG_BAD_DATA,
    MEMORY_FIRST,
    TINY,
    Fault,
    assert_same_tensors,
    assert_trained_once,
    callback_states,
    checkpoints,
    incidents,
    journal,
    losses_by_step,
    records,
    run,
    rungs,
)

PALM = (*TINY, "recovery=palm", "recovery.rewind_steps=10", "recovery.skip=20 batches")
DISK = "checkpoint.keep_snapshots=0"
# The arguments, the ranks, what is done, and the tier that each rewind goes to.
CASES: dict[str, tuple[tuple[str, ...], int, list[str], str]] = {
    "falcon from memory": (TINY, 1, ["skip"], "memory"),
    "falcon from memory alone": (MEMORY_FIRST, 1, ["skip"], "memory"),
    "falcon from disk": ((*TINY, DISK), 1, ["skip"], "disk"),
    "palm from memory": ((*PALM, "checkpoint.keep_snapshots=5"), 1, ["skip"], "memory"),
    "palm from disk": ((*PALM, DISK), 1, ["skip"], "disk"),
    "ladder from memory": (LADDER, 1, ["replay", "skip"], "memory"),
    "ladder from disk": ((*LADDER, DISK), 1, ["replay", "skip"], "disk"),
    "falcon on two ranks from memory": (TINY, 2, ["skip"], "memory"),
    "ladder on two ranks from memory": (LADDER, 2, ["replay", "skip"], "memory"),
    "ladder on two ranks from disk": ((*LADDER, DISK), 2, ["replay", "skip"], "disk"),
}


def tiers_of_rewinds(samples: Path) -> list[str]:
    return [r["tier"] for r in records(Path(f"{samples}.0")) if r["kind"] == "load"]


def assert_same_as_oracle(folder: Path, oracle: Any) -> None:
    """All of the surviving lineage, in fact: before the target both saw the same data."""
    assert not journal(oracle.folder), "the oracle had nothing to recover from"
    assert losses_by_step(folder) == losses_by_step(oracle.folder)
    last, expected = checkpoints(folder)[-1], checkpoints(oracle.folder)[-1]
    assert_same_tensors(last, expected)
    assert callback_states(last) == callback_states(expected)


@pytest.mark.parametrize("case", CASES)
def test_recovered_run_is_one_that_never_saw_the_bad_data(
    case: str, tmp_path: Path, oracle: Any
) -> None:
    arguments, num_ranks, expected_rungs, tier = CASES[case]
    folder, samples = tmp_path / "run", tmp_path / "samples"
    everything = (*arguments, *BAD_DATA)
    run(everything, folder, num_ranks=num_ranks, fault=Fault(samples=samples)).expect(0)
    assert rungs(folder) == expected_rungs
    assert tiers_of_rewinds(samples) == [tier] * len(expected_rungs)
    for rank in range(num_ranks):
        assert_trained_once(folder, samples, rank)
    skips = tuple(tuple(record["skip"]) for record in incidents(folder) if len_of(record))
    # The tier changes nothing that is learnt, so one oracle serves both.
    plain = tuple(argument for argument in everything if "snapshots" not in argument)
    assert_same_as_oracle(folder, oracle(plain, skips, num_ranks=num_ranks))


def len_of(record: dict[str, Any]) -> int:
    start, stop = record["skip"]
    return int(stop - start)


def test_whole_ladder_ends_as_a_run_that_was_cooled_and_never_saw_the_bad_data(
    climbed_single: Any, oracle: Any
) -> None:
    last = incidents(climbed_single.folder)[-1]
    assert last["rung"] == "cool"
    skips = tuple(tuple(r["skip"]) for r in incidents(climbed_single.folder) if len_of(r))
    cooled = tuple(
        last[key] for key in ("lr_scale", "lr_from_step", "lr_until_step", "lr_return_step")
    )
    never_met = oracle((*LADDER, *LONG_BAD_DATA), skips, cooled=cooled)
    assert_same_as_oracle(climbed_single.folder, never_met)
    assert_trained_once(climbed_single.folder, climbed_single.samples)
    # Half the learning rate up to the 4th step behind the detection, and whole again 4 further on.
    from_step, until, back = cooled[1:]
    lrs = {r["step"]: r["lr"] for r in records(climbed_single.folder / "metrics.jsonl")}
    warm = oracle((*LADDER, *LONG_BAD_DATA), skips)
    whole = {r["step"]: r["lr"] for r in records(warm.folder / "metrics.jsonl")}
    ratios = {step: lrs[step] / whole[step] for step in lrs}
    assert all(ratios[step] == 1.0 for step in ratios if step <= from_step or step > back)
    assert all(ratios[step] == pytest.approx(0.5) for step in range(from_step + 1, until + 1))
    assert all(0.5 < ratios[step] < 1.0 for step in range(until + 2, back + 1))
