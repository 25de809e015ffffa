"""Every combination of what the trials can say, and whose hardware is suspected."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from train.attribution.conclusion import (
    Cause,
    RankRepeat,
    conclude,
    suspect_hardware,
)

KNOWN = (True, False)
ANY = (True, False, None)

# (same, earlier, other, differs), each a set of values -> cause. All 81 combinations, once each.
TABLE: list[tuple[tuple[bool | None, ...], ...]] = [
    (ANY, ANY, ANY, (True,)),
    ((False,), ANY, ANY, (False, None)),
    ((None,), ANY, ANY, (False, None)),
    ((True,), ANY, (True,), (False, None)),
    ((True,), ANY, (None,), (False, None)),
    ((True,), (True,), (False,), (False, None)),
    ((True,), (False,), (False,), (False, None)),
    ((True,), (None,), (False,), (False, None)),
]
CAUSES = [
    Cause.NOT_REPRODUCIBLE,
    Cause.NOT_REPRODUCIBLE,
    Cause.INCONCLUSIVE,
    Cause.STATE,
    Cause.INCONCLUSIVE,
    Cause.DATA,
    Cause.DATA_X_STATE,
    Cause.INCONCLUSIVE,
]
COMBINATIONS = [
    (combination, cause)
    for row, cause in zip(TABLE, CAUSES, strict=True)
    for combination in product(*row)
]


def test_table_has_each_combination_once() -> None:
    assert len(COMBINATIONS) == 81
    assert len({combination for combination, _ in COMBINATIONS}) == 81


@pytest.mark.parametrize(("combination", "cause"), COMBINATIONS)
def test_cause(combination: tuple[bool | None, ...], cause: Cause) -> None:
    same, earlier, other, differs = combination
    found = conclude(same=same, earlier=earlier, other=other, differs=differs)
    assert found.cause is cause
    assert found.because


def test_trials_that_were_all_tried_are_never_inconclusive() -> None:
    for same, earlier, other, differs in product(KNOWN, repeat=4):
        found = conclude(same=same, earlier=earlier, other=other, differs=differs)
        assert found.cause is not Cause.INCONCLUSIVE


def test_calm_earlier_state_confirms_that_the_state_matters() -> None:
    found = conclude(same=True, earlier=False, other=True, differs=False)
    assert "earlier state do not" in found.because


def repeat(rank: int, *, losses: bool = False, state: bool = False) -> RankRepeat:
    return RankRepeat(
        rank=rank, host=f"node-{rank}", has_other_losses=losses, has_other_state=state
    )


def capsule(**ranks: Any) -> dict[str, Any]:
    return {"ranks": ranks, "environment": {"num_ranks": 2, "hosts": {"node-0": "0-1"}}}


def test_rank_whose_own_losses_differed_is_named_though_all_states_did() -> None:
    repeats = [repeat(0, state=True), repeat(1, losses=True, state=True)]
    suspect = suspect_hardware(repeats, {})
    assert suspect is not None
    assert suspect.ranks == (1,)
    assert str(suspect) == "rank 1 on node-1 (its losses differed in the repeated step)"


def test_rank_whose_state_alone_differed_is_named() -> None:
    suspect = suspect_hardware([repeat(0), repeat(1, state=True)], {})
    assert suspect is not None
    assert (suspect.ranks, suspect.hosts) == ((1,), ("node-1",))


def test_ranks_that_all_differ_name_no_one() -> None:
    repeats = [repeat(0, losses=True, state=True), repeat(1, losses=True, state=True)]
    assert suspect_hardware(repeats, {}) is None


def test_a_lone_rank_that_differs_is_named() -> None:
    suspect = suspect_hardware([repeat(0, state=True)], {})
    assert suspect is not None and suspect.ranks == (0,)


def test_capsule_names_the_rank_whose_loss_was_not_finite_before_one_that_was_high() -> None:
    odd = {"step": 5, "ranks": [0], "hosts": ["node-0"], "reason": "high"}
    evidence = capsule(bad_rank=1, bad_rank_host="node-1", bad_rank_step=21, odd=odd)
    suspect = suspect_hardware([], evidence)
    assert suspect is not None
    assert (suspect.ranks, suspect.hosts) == ((1,), ("node-1",))
    assert "step 21" in suspect.evidence


def test_capsule_names_the_rank_that_stood_out() -> None:
    odd = {"step": 5, "ranks": [1], "hosts": ["node-1"], "reason": "loss of 9 nats"}
    suspect = suspect_hardware([], capsule(bad_rank=None, odd=odd))
    assert suspect is not None
    assert str(suspect) == "rank 1 on node-1 (it stood out at step 5: loss of 9 nats)"


def test_run_of_one_rank_has_one_suspect() -> None:
    evidence = {"ranks": {}, "environment": {"num_ranks": 1, "hosts": {"here": "0"}}}
    suspect = suspect_hardware([], evidence)
    assert suspect is not None
    assert (suspect.ranks, suspect.hosts) == ((0,), ("here",))


@pytest.mark.parametrize("evidence", [{}, capsule(bad_rank=None, odd=None), {"ranks": 3}])
def test_nothing_known_names_no_one(evidence: dict[str, Any]) -> None:
    assert suspect_hardware([], evidence) is None
