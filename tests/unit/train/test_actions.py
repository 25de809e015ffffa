"""Which action wins, and what a rewind skips."""

from __future__ import annotations

import itertools

from train.actions import Action, Continue, Rewind, Save, Stop, worst
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
)


def test_no_wish_means_carrying_on() -> None:
    assert worst([]) == (Continue(), [])
    assert worst([Continue(), Continue()]) == (Continue(), [])


def test_worst_action_wins_in_any_order() -> None:
    ranked: list[Action] = [Continue(), SAVE, REWIND, STOP]
    for size in range(1, len(ranked) + 1):
        for wishes in itertools.permutations(ranked, size):
            winner, losers = worst(wishes)
            assert winner == max(wishes, key=ranked.index)
            expected = [wish for wish in wishes if wish not in (winner, Continue())]
            assert sorted(map(repr, losers)) == sorted(map(repr, expected))


def test_first_of_equals_wins_and_the_other_is_a_loser() -> None:
    later = Save(reason="preempted")
    assert worst([SAVE, later]) == (SAVE, [later])


def test_rewind_skips_its_amount_from_the_target_on() -> None:
    assert REWIND.skip_range(present_cursor=700) == BatchRange(start=640, stop=740)


def test_rewind_always_skips_what_was_seen_up_to_now() -> None:
    assert REWIND.skip_range(present_cursor=5000) == BatchRange(start=640, stop=5000)
