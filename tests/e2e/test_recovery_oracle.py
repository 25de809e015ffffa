"""A run that recovered is, from the target on, bit for bit a run that never saw the bad data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness import (
    BAD_DATA,
    LADDER,
    MEMORY_FIRST,
    SHOCK,
    TINY,
    Fault,
    assert_same_tensors,
    assert_trained_once,
    callback_states,
    checkpoints,
    incidents,
    journal,
    losses_by_step,
    metrics,
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


LONG_TAIL = ("palm from disk", "ladder on two ranks from disk")


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.slow if case in LONG_TAIL else ()) for case in CASES],
)
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


def test_whole_ladder_ends_as_a_run_that_was_cooled_and_never_saw_what_was_skipped(
    climbed_single: Any, clean_single: Any, oracle: Any
) -> None:
    folder = climbed_single.folder
    last = incidents(folder)[-1]
    assert last["rung"] == "cool"
    skips = tuple(tuple(record["skip"]) for record in incidents(folder) if len_of(record))
    keys = ("lr_scale", "lr_from_step", "lr_until_step", "lr_return_step")
    scale, from_step, until, back = cooled = tuple(last[key] for key in keys)
    assert_same_as_oracle(folder, oracle((*LADDER, *SHOCK), skips, cooled=cooled))
    assert_trained_once(folder, climbed_single.samples)
    # A hundredth of the rate from the target to 12 steps behind the detection, then slowly back.
    assert (scale, from_step, until) == (0.01, last["target_step"], last["detected_step"] + 12)
    assert back > 40
    lrs, whole = (
        {record["step"]: record["lr"] for record in metrics(one)}
        for one in (folder, clean_single.folder)
    )
    shocked = range(21, 27)
    for step in lrs:
        ratio = lrs[step] / whole[step] / (100 if step in shocked else 1)
        if step <= from_step:
            assert ratio == pytest.approx(1.0)
        elif step <= until:
            assert ratio == pytest.approx(scale)
        else:
            assert scale < ratio + 1e-9 < 1.0


def test_level_that_was_let_in_costs_no_data(levelled_single: Any) -> None:
    last = incidents(levelled_single.folder)[-1]
    assert last["rung"] == "accept"
    assert last["skip"][0] == last["skip"][1]
    assert_trained_once(levelled_single.folder, levelled_single.samples)
