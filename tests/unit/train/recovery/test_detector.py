"""The detector as numbers in, verdict out."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable

import pytest

from train.recovery.baseline import RobustBaseline
from train.recovery.detector import (
    CALM_KINDS,
    ROLLBACK_KINDS,
    SpikeDetector,
    Verdict,
    VerdictKind,
    default_detector,
)

NOISE = 0.01


def falling_losses(count: int, *, seed: int = 0, start: float = 4.0) -> list[float]:
    noise = random.Random(seed)
    return [
        start * math.exp(-0.001 * step) * math.exp(noise.gauss(0, NOISE)) for step in range(count)
    ]


def feed(
    detector: SpikeDetector,
    losses: Iterable[float],
    *,
    first_step: int = 1,
    grad_norm: float | None = 1.0,
) -> list[Verdict]:
    return [
        detector.update(step, loss, grad_norm) for step, loss in enumerate(losses, start=first_step)
    ]


def settled(count: int = 100, **settings: int | float) -> SpikeDetector:
    detector = SpikeDetector(**settings)  # type: ignore[arg-type]
    feed(detector, falling_losses(count))
    return detector


def kinds(verdicts: Iterable[Verdict]) -> list[VerdictKind]:
    return [verdict.kind for verdict in verdicts]


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_nonfinite_loss_is_seen_at_the_first_step(loss: float) -> None:
    verdict = SpikeDetector().update(1, loss, 1.0)
    assert verdict.kind is VerdictKind.NONFINITE
    assert verdict.needs_rollback


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_nonfinite_gradient_norm_is_seen_at_the_first_step(norm: float) -> None:
    assert SpikeDetector().update(1, 4.0, norm).kind is VerdictKind.NONFINITE


def test_quiet_run_is_calm_from_end_to_end() -> None:
    verdicts = feed(SpikeDetector(), falling_losses(2000))
    assert all(verdict.is_calm for verdict in verdicts)


def test_first_steps_are_called_warm_up_and_then_ok() -> None:
    found = kinds(feed(SpikeDetector(warm_up_steps=16), falling_losses(20)))
    assert found == [VerdictKind.WARMUP] * 16 + [VerdictKind.OK] * 4


def test_absurd_value_in_warm_up_is_flagged() -> None:
    detector = SpikeDetector()
    feed(detector, [4.0] * 5)
    assert detector.update(6, 12.0, 1.0).kind is VerdictKind.OUTLIER
    assert detector.update(7, 12.0, 1.0).kind is VerdictKind.OUTLIER
    assert detector.update(8, 12.0, 1.0).kind is VerdictKind.SPIKE


def test_falling_loss_of_a_fresh_model_is_not_absurd() -> None:
    losses = [11.0 - 0.3 * step for step in range(16)]
    assert all(verdict.is_calm for verdict in feed(SpikeDetector(), losses))


def test_single_high_step_is_only_an_outlier() -> None:
    detector = settled()
    assert detector.update(101, 8.0, 1.0).kind is VerdictKind.OUTLIER
    assert set(kinds(feed(detector, [3.6] * 20, first_step=102))) == {VerdictKind.OK}


def test_high_steps_that_stay_are_a_spike_at_the_third_from_their_first_step_on() -> None:
    detector = settled()
    verdicts = feed(detector, [8.0, 8.0, 8.0], first_step=101)
    assert kinds(verdicts) == [VerdictKind.OUTLIER, VerdictKind.OUTLIER, VerdictKind.SPIKE]
    assert [verdict.onset_step for verdict in verdicts] == [101, 101, 101]


def test_gradient_norm_out_of_its_band_too_confirms_a_spike_at_the_second_step() -> None:
    verdicts = feed(settled(), [8.0, 8.0], first_step=101, grad_norm=30.0)
    assert kinds(verdicts) == [VerdictKind.OUTLIER, VerdictKind.SPIKE]


def test_two_high_steps_with_one_calm_between_are_a_spike() -> None:
    verdicts = feed(settled(), [8.0, 3.6, 8.0], first_step=101)
    assert verdicts[-1].kind is VerdictKind.SPIKE
    assert verdicts[-1].onset_step == 101


def test_two_high_steps_that_end_are_no_spike() -> None:
    verdicts = feed(settled(), [8.0, 8.0, *[3.6] * 10], first_step=101)
    assert VerdictKind.SPIKE not in kinds(verdicts)


def test_lone_step_of_any_height_is_no_spike() -> None:
    assert feed(settled(), [1e300, 3.6], first_step=101)[0].kind is VerdictKind.OUTLIER


def test_low_excess_that_stays_is_a_spike_though_no_step_alone_is_an_outlier() -> None:
    noise = random.Random(4)
    detector = SpikeDetector()
    feed(detector, [4.0 * math.exp(noise.gauss(0, 0.05)) for _ in range(200)])
    high = [4.0 * math.exp(0.05 * 3.2 + noise.gauss(0, 0.01)) for _ in range(20)]
    verdicts = feed(detector, high, first_step=201, grad_norm=None)
    assert all(verdict.deviation < 6 for verdict in verdicts)
    assert VerdictKind.SPIKE in kinds(verdicts)
    assert verdicts[-1].onset_step == 201


def test_small_excess_is_not_worth_a_rollback_until_it_lasts() -> None:
    small = [4 * math.exp(-0.2) * 1.07] * 20
    found = kinds(feed(settled(200), small, first_step=201, grad_norm=None))
    assert found.index(VerdictKind.SPIKE) >= 15
    assert found.count(VerdictKind.OUTLIER) >= 10


def test_outlier_that_leaves_a_trace_is_a_spike() -> None:
    noise = random.Random(5)
    detector = SpikeDetector()
    feed(detector, [4.0 * math.exp(noise.gauss(0, 0.05)) for _ in range(200)])
    after = [4.0 * math.exp(0.06 + noise.gauss(0, 0.03)) for _ in range(32)]
    verdicts = feed(detector, [8.0, *after], first_step=201)
    spike = next(verdict for verdict in verdicts if verdict.kind is VerdictKind.SPIKE)
    assert spike.onset_step == 201


def test_outlier_without_a_trace_is_no_spike() -> None:
    noise = random.Random(5)
    detector = SpikeDetector()
    feed(detector, [4.0 * math.exp(noise.gauss(0, 0.05)) for _ in range(200)])
    after = [4.0 * math.exp(noise.gauss(0, 0.05)) for _ in range(40)]
    assert VerdictKind.SPIKE not in kinds(feed(detector, [8.0, *after], first_step=201))


def test_high_steps_far_apart_are_outliers_of_their_own() -> None:
    verdicts = feed(settled(), [8.0, *[3.6] * 10, 8.0], first_step=101)
    assert verdicts[-1].kind is VerdictKind.OUTLIER
    assert verdicts[-1].onset_step == 112


@pytest.mark.parametrize("persistence", [1, 2, 3, 5])
def test_persistence_is_the_number_of_steps_that_must_confirm_an_outlier(persistence: int) -> None:
    found = kinds(feed(settled(persistence=persistence), [8.0] * 7, first_step=101))
    assert found.index(VerdictKind.SPIKE) == persistence


def test_spike_does_not_enter_its_own_baseline() -> None:
    detector = settled()
    parts = ("newest", "older", "residuals", "recent", "num_accepted", "sigma")
    before = {part: detector.state_dict()["loss"][part] for part in parts}  # type: ignore[index]
    verdicts = feed(detector, [8.0] * 30, first_step=101)
    assert {p: detector.state_dict()["loss"][p] for p in parts} == before  # type: ignore[index]
    assert len({verdict.baseline_nats for verdict in verdicts}) == 1


def test_plateau_is_not_let_in_after_four_steps_and_hides_nothing() -> None:
    detector = settled()
    verdicts = feed(detector, [6.0] * 12, first_step=101)
    assert all(not verdict.is_calm for verdict in verdicts)
    feed(detector, [3.6] * 10, first_step=113)
    assert detector.update(123, 5.5, 1.0).kind is VerdictKind.OUTLIER


def test_level_that_holds_is_accepted_after_max_flagged_steps() -> None:
    detector = settled(max_flagged_steps=30)
    verdicts = feed(detector, [6.0] * 40, first_step=101, grad_norm=None)
    assert verdicts[28].kind is VerdictKind.SPIKE
    assert verdicts[29].kind is VerdictKind.LEVEL_SHIFT
    assert all(verdict.is_calm for verdict in verdicts[30:])
    assert verdicts[-1].baseline_nats == pytest.approx(6.0)


def test_spike_right_after_a_level_shift_is_still_seen() -> None:
    detector = settled(max_flagged_steps=30)
    feed(detector, [6.0] * 30, first_step=101)
    verdicts = feed(detector, [7.5] * 4, first_step=131, grad_norm=None)
    assert VerdictKind.SPIKE in kinds(verdicts)


def test_lasting_change_never_is_an_endless_spike() -> None:
    detector = settled(max_flagged_steps=20)
    verdicts = feed(detector, [6.0] * 20 + [9.0] * 60, first_step=101)
    assert all(verdict.is_calm for verdict in verdicts[-20:])


@pytest.mark.parametrize("window", [8, 12, 16])
def test_warm_up_ends_even_if_it_is_longer_than_the_window(window: int) -> None:
    verdicts = feed(SpikeDetector(window=window, warm_up_steps=16), falling_losses(40))
    assert verdicts[-1].kind is VerdictKind.OK


def test_nan_does_not_freeze_the_steps_after_it() -> None:
    detector = settled()
    assert detector.update(101, math.nan, math.nan).kind is VerdictKind.NONFINITE
    verdicts = feed(detector, falling_losses(30, seed=1, start=3.6), first_step=102)
    assert set(kinds(verdicts)) == {VerdictKind.OK}
    assert detector.update(132, 8.0, 1.0).onset_step == 132


def test_nan_of_the_first_step_does_not_freeze_the_warm_up() -> None:
    detector = SpikeDetector()
    detector.update(1, math.nan, math.nan)
    verdicts = feed(detector, falling_losses(40), first_step=2)
    assert all(verdict.is_calm for verdict in verdicts)


def test_many_nans_do_not_make_the_next_high_step_a_level() -> None:
    detector = settled(max_flagged_steps=20)
    feed(detector, [math.nan] * 20, first_step=101)
    assert not detector.update(121, 8.0, 1.0).is_calm


def test_outliers_that_come_again_and_again_are_not_taken_for_a_level() -> None:
    detector = settled(max_flagged_steps=10)
    verdicts = feed(detector, [8.0, 3.6, 3.6] * 30, first_step=101)
    assert VerdictKind.LEVEL_SHIFT not in kinds(verdicts)


def test_gradient_norm_that_rises_first_is_said_to_lead() -> None:
    detector = settled()
    for step in range(101, 105):
        detector.update(step, 3.6, 50.0)
    verdicts = feed(detector, [8.0, 8.0], first_step=105, grad_norm=50.0)
    assert verdicts[-1].led_by == "grad_norm"
    assert verdicts[-1].lead_steps == 4


def test_loss_leads_when_the_gradient_norm_stays_calm() -> None:
    verdicts = feed(settled(), [8.0, 8.0], first_step=101)
    assert (verdicts[-1].led_by, verdicts[-1].lead_steps) == ("loss", 0)


def test_kinds_are_calm_or_need_a_rollback_or_neither() -> None:
    neither = {VerdictKind.OUTLIER, VerdictKind.SUSPICIOUSLY_LOW}
    assert set(VerdictKind) - CALM_KINDS - ROLLBACK_KINDS == neither
    assert not CALM_KINDS & ROLLBACK_KINDS


def test_default_detector_says_nothing_of_a_low_loss() -> None:
    detector = default_detector()
    feed(detector, falling_losses(100))
    assert all(verdict.is_calm for verdict in feed(detector, [0.5] * 60, first_step=101))


def test_gradient_norm_is_optional() -> None:
    detector = SpikeDetector()
    feed(detector, falling_losses(100), grad_norm=None)
    verdicts = feed(detector, [8.0, 8.0, 8.0], first_step=101, grad_norm=None)
    assert verdicts[-1].kind is VerdictKind.SPIKE


def test_zero_loss_and_zero_norm_are_taken() -> None:
    detector = settled()
    assert detector.update(101, 0.0, 0.0).kind is VerdictKind.OK


def test_limits_are_open_until_there_is_a_baseline() -> None:
    assert SpikeDetector().limits() == (math.inf, math.inf)


def test_limits_lie_where_a_step_becomes_high() -> None:
    detector = settled()
    max_loss, max_norm = detector.limits()
    assert 3.6 < max_loss < 8.0
    assert 1.0 < max_norm < math.inf
    assert detector.update(101, max_loss * 1.0001, 1.0).kind is VerdictKind.OUTLIER
    assert settled().update(101, max_loss * 0.9999, 1.0).kind is VerdictKind.OK


def test_deviation_is_in_standard_deviations_of_the_noise() -> None:
    detector = settled()
    baseline = detector.update(101, 3.6, 1.0).baseline_nats
    assert baseline is not None
    verdict = detector.update(102, baseline * math.exp(20 * NOISE), 1.0)
    assert verdict.deviation == pytest.approx(20, rel=0.4)


@pytest.mark.parametrize("cut", [0, 1, 7, 16, 40, 101, 102, 103, 130])
def test_state_through_json_gives_the_same_verdicts_afterwards(cut: int) -> None:
    losses = [*falling_losses(100), 8.0, 8.0, math.nan, 8.0, *falling_losses(60, start=3.6)]
    norms = [1.0 + 0.01 * (step % 7) for step in range(len(losses))]
    norms[95:105] = [40.0] * 10
    whole, part = SpikeDetector(), SpikeDetector()
    expected = [whole.update(i, *pair) for i, pair in enumerate(zip(losses, norms, strict=True))]
    for step in range(cut):
        part.update(step, losses[step], norms[step])
    resumed = SpikeDetector()
    resumed.load_state_dict(json.loads(json.dumps(part.state_dict())))
    rest = [resumed.update(step, losses[step], norms[step]) for step in range(cut, len(losses))]
    assert rest == expected[cut:]


def test_going_back_forgets_what_came_after() -> None:
    detector = settled()
    saved = json.loads(json.dumps(detector.state_dict()))
    first = feed(detector, [8.0] * 40, first_step=101)
    detector.load_state_dict(saved)
    assert feed(detector, [8.0] * 40, first_step=101) == first


def test_baseline_of_a_constant_signal_has_a_floor_of_noise() -> None:
    baseline = RobustBaseline(8)
    for _ in range(20):
        baseline.accept(1.0)
    assert baseline.level == 1.0
    assert baseline.sigma > 0
    assert len(baseline) == 8


def test_falling_level_does_not_inflate_the_noise() -> None:
    flat, falling = RobustBaseline(48), RobustBaseline(48)
    noise = random.Random(3)
    for step in range(300):
        value = noise.gauss(0, NOISE)
        flat.accept(value)
        falling.accept(value - 0.002 * step)
    assert falling.sigma == pytest.approx(flat.sigma, rel=0.3)
