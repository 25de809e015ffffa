"""The interval of saves: the optimum by brute force, its bounds, and how often a run fails."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.checkpoint.interval import (
    FailureRate,
    best_interval_seconds,
    choose_interval,
    configured_rate,
    count_failures,
    observed_rate,
)

DAY = 86400.0


def expected_seconds(work: float, save: float, between_failures: float) -> float:
    """Return the expected time to get a second of work done and saved, without restart costs.

    Failures come at random at a constant rate; one costs all that was done since the last save.
    Source: Daly 2006, equation 20.
    """
    return between_failures * math.expm1((work + save) / between_failures) / work


@pytest.mark.parametrize("save", [0.1, 5.0, 60.0, 600.0])
@pytest.mark.parametrize("between_failures", [3600.0, DAY, 30 * DAY])
def test_no_other_interval_loses_noticeably_less(save: float, between_failures: float) -> None:
    best = best_interval_seconds(save, between_failures)
    found = expected_seconds(best, save, between_failures)
    for factor in (0.5, 0.7, 0.9, 1.1, 1.4, 2.0):
        other = expected_seconds(factor * best, save, between_failures)
        assert found <= other * (1 + 1e-4), factor


def test_cheap_saves_follow_young() -> None:
    assert best_interval_seconds(1.0, DAY) == pytest.approx(math.sqrt(2 * DAY), rel=0.01)


def test_saves_longer_than_the_time_between_failures_leave_no_optimum() -> None:
    assert best_interval_seconds(100.0, 50.0) == 50.0


def choose(**settings: Any) -> Any:
    defaults: dict[str, Any] = {
        "stall_seconds": 4.0,
        "save_seconds": 4.0,
        "step_seconds": 2.0,
        "rate": configured_rate(2.0),
        "max_steps": 10_000,
        "max_minutes": 1000.0,
    }
    return choose_interval(**{**defaults, **settings})


def test_choice_is_in_steps_and_says_where_it_comes_from() -> None:
    chosen = choose()
    best = best_interval_seconds(4.0, DAY / 2)
    assert chosen.steps == round(best / 2)
    assert chosen.reason == (
        f"a save every {chosen.steps} steps, 9.77 min: a save stops training for 4 s, a step takes "
        "2 s, 2 failures a day (checkpoint.failures_per_day); the optimum is 9.75 min"
    )


@pytest.mark.parametrize(
    ("settings", "steps", "words"),
    [
        ({"max_minutes": 5.0}, 150, "bounded by checkpoint.max_minutes_at_risk=5"),
        ({"max_steps": 100}, 100, "bounded by checkpoint.max_interval_steps=100"),
        ({"save_seconds": 600.0}, 600, "bounded by twice the 600 s that a save takes"),
        (
            {"save_seconds": 600.0, "max_minutes": 1.0},
            600,
            "bounded by twice the 600 s that a save takes",
        ),
        ({"step_seconds": 1e5}, 1, "every 1 steps"),
    ],
)
def test_bounds_hold_and_are_named(settings: dict[str, Any], steps: int, words: str) -> None:
    chosen = choose(**settings)
    assert chosen.steps == steps
    assert words in chosen.reason


@given(
    stall=st.floats(0, 1e4),
    step=st.floats(1e-4, 1e4),
    rate=st.floats(1e-6, 1e3),
    max_steps=st.integers(1, 10**6),
    max_minutes=st.floats(0.01, 1e5),
)
def test_interval_is_always_a_usable_one(
    stall: float, step: float, rate: float, max_steps: int, max_minutes: float
) -> None:
    chosen = choose(
        stall_seconds=stall,
        save_seconds=stall,
        step_seconds=step,
        rate=configured_rate(rate),
        max_steps=max_steps,
        max_minutes=max_minutes,
    )
    assert 1 <= chosen.steps <= max_steps


def test_more_failures_and_cheaper_saves_mean_more_saves() -> None:
    assert choose(rate=configured_rate(8.0)).steps < choose().steps
    assert choose(stall_seconds=1.0).steps < choose().steps


def test_young_run_is_not_taken_for_one_that_never_fails() -> None:
    fresh = observed_rate(0, 0.0, num_ranks=16384)
    assert fresh.per_day == pytest.approx(419 / 54)
    assert observed_rate(0, 60.0, num_ranks=8).per_day > 0


def test_what_a_run_has_seen_outweighs_what_is_usual() -> None:
    rate = observed_rate(60, 30.0, num_ranks=8)
    assert rate.per_day == pytest.approx(60 / 37, rel=0.01)
    assert "60 seen in 30.0 days" in rate.source
    assert isinstance(rate, FailureRate)


def events(*kinds: tuple[str, float]) -> list[dict[str, object]]:
    return [{"kind": kind, "time": days * DAY} for kind, days in kinds]


@pytest.mark.parametrize(
    ("kinds", "failures", "days"),
    [
        ([], 0, 0.0),
        ([("run_start", 1), ("checkpoint", 2), ("run_end", 3)], 0, 2.0),
        ([("run_start", 1), ("checkpoint", 2)], 1, 1.0),
        ([("run_start", 1), ("checkpoint", 2), ("run_start", 5), ("run_end", 6)], 1, 2.0),
        ([("run_start", 1), ("run_start", 2), ("run_start", 3)], 3, 0.0),
        ([("checkpoint", 1), ("run_end", 2)], 0, 0.0),
    ],
)
def test_start_without_an_end_before_the_next_is_a_failure(
    kinds: list[tuple[str, float]], failures: int, days: float
) -> None:
    assert count_failures(events(*kinds)) == (failures, days)


def test_events_without_a_time_are_passed_over() -> None:
    assert count_failures([{"kind": "run_start"}, {"kind": "run_start", "time": None}]) == (0, 0.0)
