"""Recovery among ranks: a kill of any one of them, and a restart on another number of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import (
    ATTEMPTS,
    BAD_DATA,
    LADDER,
    MEMORY_FIRST,
    SHOCK,
    TINY,
    assert_trained_once,
    checkpoints,
    incidents,
    journal,
    losses_by_clock,
    losses_by_step,
    records,
    rungs,
    tensors,
)
from test_recovery_crash import (
    assert_nothing_skipped_since,
    assert_same_recovery,
    finish,
    kill_at,
    tear,
)

ARGUMENTS = (*TINY, *BAD_DATA)
CLIMB = (*LADDER, *SHOCK)
CHAINS = {
    "undecided": ("before_capsule", "in_capsule", "before_intent", "torn_intent"),
    "decided": (
        "after_intent",
        "after_load_from_disk",
        "after_quarantine",
        "torn_done",
        "after_done",
    ),
}
# Rank 1 writes no records: it dies beside them, and rank 0 may be a record further by then.
BESIDE = ("before_intent", "after_load_from_memory", "after_done")
LONG_TAIL = (
    "before_capsule",
    "after_capsule",
    "after_intent",
    "after_ledger",
    "after_quarantine",
    "before_done",
)
# As close as sums in another order leave 40 steps of Adam.
LOSS_TOLERANCE, TENSOR_TOLERANCE = 1e-4, 2e-2


def assert_near_recovery(folder: Path, reference: Any) -> None:
    """The same decisions and samples; losses and weights but for the order of sums."""
    ours, theirs = (
        [{k: v for k, v in record.items() if k != "reason"} for record in journal(one)]
        for one in (folder, reference.folder)
    )
    assert ours == theirs
    expected = losses_by_step(reference.folder)
    assert losses_by_step(folder) == pytest.approx(expected, rel=LOSS_TOLERANCE)
    one, other = tensors(checkpoints(folder)[-1]), tensors(checkpoints(reference.folder)[-1])
    assert one.keys() == other.keys()
    for name in one:
        difference = torch.linalg.vector_norm((one[name] - other[name]).double())
        assert difference <= TENSOR_TOLERANCE * torch.linalg.vector_norm(other[name].double()), name


@pytest.mark.parametrize("chain", ["decided", pytest.param("undecided", marks=pytest.mark.slow)])
def test_kills_of_rank_0_of_two_change_nothing(
    chain: str, tmp_path: Path, recovered_ddp: Any
) -> None:
    folder = tmp_path / "run"
    for place in CHAINS[chain]:
        kill_at(ARGUMENTS, folder, place, num_ranks=2)
    finish(ARGUMENTS, folder, num_ranks=2)
    assert_same_recovery(folder, recovered_ddp)
    for rank in range(2):
        assert_trained_once(folder, tmp_path / "samples", rank)
        if chain == "decided":
            assert_nothing_skipped_since(tmp_path / "samples", folder, start=1, rank=rank)


@pytest.mark.parametrize(
    "place", [*BESIDE, *(pytest.param(place, marks=pytest.mark.slow) for place in LONG_TAIL)]
)
def test_kill_of_rank_1_of_two_changes_nothing(
    place: str, tmp_path: Path, recovered_ddp: Any
) -> None:
    folder = tmp_path / "run"
    kill_at(ARGUMENTS, folder, place, num_ranks=2, kill_rank=1)
    finish(ARGUMENTS, folder, num_ranks=2)
    assert_same_recovery(folder, recovered_ddp)
    for rank in range(2):
        assert_trained_once(folder, tmp_path / "samples", rank)
        if place not in ("before_capsule", "after_capsule", "before_intent"):
            assert_nothing_skipped_since(tmp_path / "samples", folder, start=1, rank=rank)


def test_ladder_on_two_ranks_killed_in_each_attempt_climbs_the_same_way(
    tmp_path: Path, climbed_ddp: Any
) -> None:
    folder = tmp_path / "run"
    kills = [
        (1, "after_intent"),
        (0, "torn_done"),
        (1, "after_load_from_disk"),
        (0, "in_capsule"),
    ]
    for attempt, (rank, place) in enumerate(kills, start=1):
        kill_at(CLIMB, folder, place, num_ranks=2, kill_rank=rank, kill_attempt=attempt)
    finish(CLIMB, folder, num_ranks=2)
    assert rungs(folder) == list(ATTEMPTS)
    assert_same_recovery(folder, climbed_ddp)
    for rank in range(2):
        assert_trained_once(folder, tmp_path / "samples", rank)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_rewind_cut_short_again_and_again_is_finished_on_another_number_of_ranks(
    num_ranks: int, tmp_path: Path, recovered_single: Any
) -> None:
    """A resize and a torn line between any two processes."""
    folder = tmp_path / "run"
    for place in ("before_intent", "after_intent", "after_load_from_disk", "torn_done"):
        kill_at(ARGUMENTS, folder, place, num_ranks=num_ranks)
        tear(folder)
        num_ranks = 3 - num_ranks
    finish(ARGUMENTS, folder, num_ranks=3 - num_ranks)
    assert_near_recovery(folder, recovered_single)
    assert_trained_once(folder, tmp_path / "samples")
    assert_nothing_skipped_since(tmp_path / "samples", folder, start=2)


def test_ladder_is_climbed_in_the_same_way_by_one_rank_and_by_two_in_turn(
    tmp_path: Path, climbed_single: Any
) -> None:
    folder = tmp_path / "run"
    places = ("after_intent", "before_intent", "after_quarantine", "torn_done")
    for attempt, place in enumerate(places, start=1):
        num_ranks = 1 + attempt % 2
        kill_at(CLIMB, folder, place, num_ranks=num_ranks, kill_attempt=attempt)
        tear(folder)
    finish(CLIMB, folder, num_ranks=2)
    assert_near_recovery(folder, climbed_single)
    assert_trained_once(folder, tmp_path / "samples")


def test_target_that_was_in_memory_alone_is_made_again_on_two_ranks(
    tmp_path: Path, recovered_from_memory: Any
) -> None:
    """Decided by one rank, lost with it, and done by two from an older checkpoint."""
    folder, reference = tmp_path / "run", recovered_from_memory.folder
    kill_at((*MEMORY_FIRST, *BAD_DATA), folder, "after_load_from_memory")
    tear(folder)
    finish((*MEMORY_FIRST, *BAD_DATA), folder, num_ranks=2)
    (incident,), (undisturbed,) = incidents(folder), incidents(reference)
    assert incident["skip"] == undisturbed["skip"]
    assert (incident["target_step"], undisturbed["target_step"]) == (10, 15)
    expected = losses_by_step(reference)
    assert losses_by_step(folder) == pytest.approx(expected, rel=LOSS_TOLERANCE)
    for rank in range(2):
        assert_nothing_skipped_since(tmp_path / "samples", folder, start=1 - rank, rank=rank)
    assert_trained_once(folder, tmp_path / "samples")


def test_samples_and_their_order_do_not_depend_on_the_number_of_ranks(
    recovered_single: Any, recovered_ddp: Any
) -> None:
    alone = records(Path(f"{recovered_single.samples}.0"))
    assert [record for record in alone if record["kind"] == "rewind"], "a recovery is part of it"
    for rank in range(2):
        assert records(Path(f"{recovered_ddp.samples}.{rank}")) == alone
    assert (
        incidents(recovered_ddp.folder)[0]["skip"] == incidents(recovered_single.folder)[0]["skip"]
    )
    ours, theirs = (
        losses_by_clock(reference.folder) for reference in (recovered_single, recovered_ddp)
    )
    assert ours == pytest.approx(theirs, rel=LOSS_TOLERANCE)
