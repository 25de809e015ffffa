"""What a trial came to, by its steps."""

from __future__ import annotations

import math

from train.attribution.outcome import (
    Outcome,
    Point,
    first_difference,
    judge,
    unless_the_detector_changed,
)
from train.recovery.verdict import VerdictKind


def point(batch: int, loss: float = 3.0, kind: VerdictKind = VerdictKind.OK) -> Point:
    return Point(
        step=batch + 15,
        batch=batch,
        cursor=8 * batch,
        loss_nats=loss,
        grad_norm=1.0,
        lr=1e-3,
        kind=kind,
        deviation=0.5,
        baseline_nats=3.0,
        is_vetoed=False,
    )


def test_verdict_that_asks_for_a_rollback_is_a_spike() -> None:
    points = [
        point(1),
        point(2, 6.0, VerdictKind.OUTLIER),
        point(3, 5.0, VerdictKind.SPIKE),
        point(4),
    ]
    outcome = judge(points)
    assert outcome.has_spiked
    assert outcome.found == points[2] and outcome.peak == points[1]
    record = outcome.as_record()
    assert (record["verdict"], record["verdict_step"], record["peak_step"]) == ("spike", 18, 17)


def test_outliers_alone_are_no_spike() -> None:
    assert judge([point(1, 6.0, VerdictKind.OUTLIER), point(2)]).has_spiked is False


def test_what_comes_before_the_target_does_not_count() -> None:
    before = point(0, 9.0, VerdictKind.SPIKE)
    outcome = judge([before, point(1)])
    assert outcome.has_spiked is False and outcome.peak == point(1)
    assert judge([before]).has_spiked is None


def test_loss_that_is_not_finite_is_the_peak() -> None:
    bad = point(2, math.nan, VerdictKind.NONFINITE)
    assert judge([point(1, 99.0), bad]).peak is bad


def test_calm_trial_of_a_detector_without_a_baseline_says_nothing() -> None:
    warming = [point(1, kind=VerdictKind.WARMUP), point(2)]
    assert judge(warming, has_other_detector=True).has_spiked is None
    assert judge(warming).has_spiked is False, "the one that found the incident sees as it saw then"
    spiking = [point(1, kind=VerdictKind.WARMUP), point(2, 9.0, VerdictKind.SPIKE)]
    assert judge(spiking, has_other_detector=True).has_spiked


def test_first_step_that_came_out_otherwise_is_found() -> None:
    points = [point(1, 3.0), point(2, 4.0), point(3, 5.0)]
    assert first_difference(points, {16: 3.0, 17: 4.0, 18: 5.0}) == (None, 3)
    assert first_difference(points, {16: 3.0, 17: 4.000001}) == (17, 1)
    assert first_difference(points, {99: 1.0}) == (None, 0)
    assert first_difference([point(1, math.nan)], {16: None}) == (None, 1)


def test_same_losses_are_no_calm_trial_because_the_detector_was_changed() -> None:
    points = [point(1), point(2, 9.0), point(3, 9.0)]
    same, other = {16: 3.0, 17: 9.0, 18: 9.0}, {16: 3.0, 17: 3.0, 18: 9.0}
    calm, spiked = judge(points), Outcome(has_spiked=True)
    changed = unless_the_detector_changed(calm, points, same, 18)
    assert changed.has_spiked is None and "detector" in changed.unknown_because
    assert unless_the_detector_changed(calm, points, other, 18).has_spiked is False
    assert unless_the_detector_changed(calm, points, {}, 18).has_spiked is False
    assert unless_the_detector_changed(spiked, points, same, 18).has_spiked
