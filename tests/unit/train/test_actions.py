"""Which action wins, and what a rewind skips."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from train.actions import (
    Action,
    Continue,
    Note,
    Rewind,
    Save,
    Skip,
    Stop,
    Unskip,
    severity,
    worst,
)
from train.recovery.policy import Rung
from train.state import BatchRange

SAVE = Save(reason="due")
STOP = Stop(reason="enough", needs_save=True)
REWIND = Rewind(
    target="step-00000040-clock-00000040",
    target_step=40,
    skip_from=640,
    skip_amount=100,
    rule="falcon",
    verdict="spike",
    onset_step=50,
    detected_step=52,
    reason="spike",
    incident=1,
)
NOTE = Note(
    rule="ladder",
    rung=Rung.VETO,
    incident=0,
    attempt=1,
    is_observed=False,
    verdict="outlier",
    onset_step=50,
    detected_step=50,
    clock=50,
    reason="outlier",
)
SKIP = Skip(amount=5, reason="asked for", request="r-1")
UNSKIP = Unskip(skipped=BatchRange(start=0, stop=5), reason="asked for", request="r-2")
RANKED: list[Action] = [Continue(), NOTE, SAVE, UNSKIP, SKIP, REWIND, STOP]


def test_no_wish_means_carrying_on() -> None:
    assert worst([]) == (Continue(), [])
    assert worst([Continue(), Continue()]) == (Continue(), [])


def test_worst_action_wins_in_any_order() -> None:
    for size in (1, 2, 3, 4):
        for wishes in itertools.permutations(RANKED, size):
            winner, losers = worst(wishes)
            assert winner == max(wishes, key=RANKED.index)
            expected = [wish for wish in wishes if wish not in (winner, Continue())]
            assert sorted(map(repr, losers)) == sorted(map(repr, expected))


def test_severity_is_the_place_in_the_order() -> None:
    assert [severity(action) for action in RANKED] == list(range(len(RANKED)))


def test_first_of_equals_wins_and_the_other_is_a_loser() -> None:
    later = Save(reason="preempted")
    assert worst([SAVE, later]) == (SAVE, [later])


def test_rewind_skips_its_amount_from_the_target_on() -> None:
    assert REWIND.skip_range(present_cursor=700) == BatchRange(start=640, stop=740)


def test_rewind_always_skips_what_was_seen_up_to_now() -> None:
    assert REWIND.skip_range(present_cursor=5000) == BatchRange(start=640, stop=5000)


def test_margin_reaches_beyond_what_was_seen_and_not_beyond_the_amount() -> None:
    wide = replace(REWIND, margin=50)
    assert wide.skip_range(present_cursor=680) == BatchRange(start=640, stop=740)
    assert wide.skip_range(present_cursor=700) == BatchRange(start=640, stop=750)
    assert wide.skip_range(present_cursor=5000) == BatchRange(start=640, stop=5050)


@pytest.mark.parametrize("present_cursor", [640, 700, 5000])
def test_exact_rewind_skips_its_amount_whatever_was_seen(present_cursor: int) -> None:
    exact = replace(REWIND, is_exact=True, margin=50)
    assert exact.skip_range(present_cursor) == BatchRange(start=640, stop=740)


@pytest.mark.parametrize("is_exact", [False, True])
def test_rewind_of_no_amount_skips_nothing(is_exact: bool) -> None:
    replay = replace(REWIND, skip_amount=0, margin=50, is_exact=is_exact)
    assert replay.skip_range(present_cursor=5000) == BatchRange(start=640, stop=640)
