"""The detector's other inputs: announced changes, resumes, norms, limits, low losses, garbage."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable

import pytest

from train.recovery.detector import ROLLBACK_KINDS, SpikeDetector, Verdict, VerdictKind

NOISE = 0.01
GARBAGE = (math.nan, math.inf, -math.inf, 0.0, -1.0, -1e300, 1e300, 5e-324)


def losses(count: int, level: float = 4.0, seed: int = 0, noise: float = NOISE) -> list[float]:
    source = random.Random(seed)
    return [level * math.exp(source.gauss(0, noise)) for _ in range(count)]


def feed(
    detector: SpikeDetector,
    values: Iterable[float],
    first_step: int = 1,
    grad_norm: float | None = 1.0,
) -> list[Verdict]:
    return [
        detector.update(step, value, grad_norm) for step, value in enumerate(values, first_step)
    ]


def settled(count: int = 200, **settings: int | bool) -> SpikeDetector:
    detector = SpikeDetector(**settings)  # type: ignore[arg-type]
    feed(detector, losses(count))
    return detector


def kinds(verdicts: Iterable[Verdict]) -> set[VerdictKind]:
    return {verdict.kind for verdict in verdicts}


# Announced changes.


def test_announced_rise_is_a_level_shift_and_never_flagged() -> None:
    detector = settled()
    detector.announce(201)
    verdicts = feed(detector, losses(60, level=5.5), 201)
    assert kinds(verdicts) == {VerdictKind.OK, VerdictKind.LEVEL_SHIFT}
    assert [v.kind for v in verdicts].index(VerdictKind.LEVEL_SHIFT) == 7
    assert verdicts[-1].baseline_nats == pytest.approx(5.5, rel=0.03)


def test_same_rise_without_an_announcement_is_a_spike() -> None:
    assert VerdictKind.SPIKE in kinds(feed(settled(), losses(20, level=5.5), 201, None))


@pytest.mark.parametrize("value", [math.nan, math.inf, 40.0])
def test_announced_change_excuses_nothing_absurd(value: float) -> None:
    detector = settled()
    detector.announce(201)
    assert not detector.update(201, value, 1.0).is_calm


def test_announcement_ends() -> None:
    detector = settled()
    detector.announce(201, 10)
    feed(detector, losses(10, seed=1), 201)
    assert VerdictKind.SPIKE in kinds(feed(detector, losses(5, level=5.5), 211, None))


def test_announcement_does_not_act_before_its_step() -> None:
    detector = settled()
    detector.announce(300)
    assert VerdictKind.SPIKE in kinds(feed(detector, losses(5, level=5.5), 201, None))


def test_announcing_twice_or_too_late_does_nothing_more() -> None:
    detector = settled()
    detector.announce(201)
    once = detector.state_dict()
    detector.announce(201)
    detector.announce(10)
    detector.announce(300, 0)
    assert detector.state_dict() == once


def test_announced_change_opens_the_limits_up_to_the_absurd() -> None:
    detector = settled()
    before, norm_before = detector.limits()
    detector.announce(201)
    after, norm_after = detector.limits()
    assert before < 4.5 < 7.9 < after < 8.2
    assert norm_before < norm_after < math.inf


def test_announced_cool_down_is_not_suspiciously_low() -> None:
    detector = settled()
    detector.announce(201, 60)
    assert all(verdict.is_calm for verdict in feed(detector, losses(60, level=3.0), 201))


# Resumes.


def test_loss_that_does_not_continue_after_a_resume_is_a_discontinuity() -> None:
    detector = settled()
    detector.resumed()
    verdicts = feed(detector, losses(5, level=6.0), 201)
    assert verdicts[0].kind is VerdictKind.OUTLIER
    assert {v.kind for v in verdicts[2:]} == {VerdictKind.RESUME_DISCONTINUITY}
    assert verdicts[2].onset_step == 200
    assert verdicts[2].needs_rollback


def test_lone_outlier_after_a_resume_stays_an_outlier() -> None:
    detector = settled()
    detector.resumed()
    found = [v.kind for v in feed(detector, [6.0] + [4.0] * 20, 201)]
    assert found[0] is VerdictKind.OUTLIER
    assert set(found[1:]) == {VerdictKind.OK}


def test_spike_that_begins_later_than_the_resume_is_a_spike() -> None:
    detector = settled()
    detector.resumed()
    feed(detector, [4.0], 201)
    assert VerdictKind.RESUME_DISCONTINUITY not in kinds(feed(detector, [6.0] * 5, 202))


def test_resume_of_a_run_that_continues_changes_nothing() -> None:
    resumed, uninterrupted = settled(), settled()
    resumed.resumed()
    for step, loss in enumerate(losses(100, seed=3), 201):
        assert resumed.update(step, loss, 1.0) == uninterrupted.update(step, loss, 1.0)
        assert resumed.limits() == uninterrupted.limits()
    assert resumed.state_dict() == uninterrupted.state_dict()


# Norms.


def test_layer_group_that_rises_first_is_said_to_lead() -> None:
    detector = SpikeDetector()
    source = random.Random(0)

    def groups() -> list[float]:
        return [math.exp(source.gauss(0, 0.05)) for _ in range(4)]

    for step, loss in enumerate(losses(200), 1):
        detector.update(step, loss, 1.0, update_norm=0.1, group_norms=groups())
    for step in range(201, 205):
        detector.update(step, 4.0, 1.0, update_norm=0.1, group_norms=[1.0, 1.0, 1.0, 50.0])
    verdict = detector.update(205, 8.0, 1.0, update_norm=0.1, group_norms=[1.0, 1.0, 1.0, 50.0])
    assert (verdict.kind, verdict.led_by, verdict.lead_steps) == (
        VerdictKind.OUTLIER,
        "grad_norm/3",
        4,
    )


def test_update_norm_that_rises_first_is_said_to_lead() -> None:
    detector = SpikeDetector()
    for step, loss in enumerate(losses(200), 1):
        detector.update(step, loss, 1.0, update_norm=0.1)
    detector.update(201, 4.0, 1.0, update_norm=5.0)
    verdict = detector.update(202, 8.0, 1.0, update_norm=math.nan)
    assert (verdict.led_by, verdict.lead_steps) == ("update_norm", 1)


def test_norm_that_left_its_band_long_ago_does_not_lead() -> None:
    detector = settled()
    detector.update(201, 4.0, 30.0)
    feed(detector, losses(20, seed=1), 202)
    assert detector.update(222, 8.0, 1.0).led_by == "loss"


def test_extreme_gradient_norm_alone_is_an_outlier_and_never_more() -> None:
    detector = settled()
    _, max_norm = detector.limits()
    assert detector.update(201, 4.0, 0.99 * max_norm).kind is VerdictKind.OK
    found = {detector.update(step, 4.0, 1e6).kind for step in range(202, 300)}
    assert found == {VerdictKind.OUTLIER, VerdictKind.OK}
    assert detector.update(300, 4.0, 1e6).kind is VerdictKind.OK


@pytest.mark.parametrize("signals", [{"group_norms": (1.0, math.nan)}, {"nonfinite_share": 0.01}])
def test_nonfinite_gradients_are_seen_though_the_loss_is_finite(signals: dict[str, object]) -> None:
    verdict = settled().update(201, 4.0, 1.0, **signals)  # type: ignore[arg-type]
    assert verdict.kind is VerdictKind.NONFINITE


@pytest.mark.parametrize("signals", [{"update_norm": math.nan}, {"nonfinite_share": 0.0}])
def test_unknown_update_norm_and_no_nonfinite_values_are_fine(signals: dict[str, float]) -> None:
    assert settled().update(201, 4.0, 1.0, **signals).kind is VerdictKind.OK  # type: ignore[arg-type]


def settled_with_all_norms(noise: float = NOISE) -> SpikeDetector:
    detector = SpikeDetector()
    for step, loss in enumerate(losses(200, noise=noise), 1):
        update_norm = 0.0 if step == 1 else 0.1
        detector.update(step, loss, 1.0, update_norm=update_norm, group_norms=[0.5, 0.8])
    return detector


@pytest.mark.parametrize("level", [4.2, 5.0, 7.0])
def test_plateau_with_calm_norms_is_never_a_spike_and_becomes_the_level(level: float) -> None:
    detector = settled_with_all_norms()
    found = [
        detector.update(step, loss, 1.0, update_norm=0.1, group_norms=[0.5, 0.8]).kind
        for step, loss in enumerate(losses(60, level=level, seed=1), 201)
    ]
    assert set(found) == {VerdictKind.OUTLIER, VerdictKind.LEVEL_SHIFT, VerdictKind.OK}
    assert VerdictKind.OUTLIER not in found[found.index(VerdictKind.LEVEL_SHIFT) :]


@pytest.mark.parametrize(
    "norms",
    [
        {"grad_norm": None, "update_norm": 0.1, "group_norms": [0.5, 0.8]},
        {"grad_norm": 30.0, "update_norm": 0.1, "group_norms": [0.5, 0.8]},
        {"grad_norm": 1.0, "update_norm": 2.8, "group_norms": [0.5, 0.8]},
        {"grad_norm": 1.0, "update_norm": 0.1, "group_norms": [0.5, 8.0]},
    ],
    ids=["unknown", "gradient", "update", "group"],
)
def test_plateau_that_began_with_a_norm_high_or_unknown_is_a_spike(
    norms: dict[str, object],
) -> None:
    detector = settled_with_all_norms()
    detector.update(201, 5.0, **norms)  # type: ignore[arg-type]
    found = feed(detector, losses(4, level=5.0, seed=1), 202)
    assert VerdictKind.SPIKE in kinds(found)


def test_loss_that_keeps_rising_with_calm_norms_is_no_plateau() -> None:
    found = feed(settled(), [4.0 * math.exp(0.03 * i) for i in range(4, 20)], 201)
    assert VerdictKind.SPIKE in kinds(found)


def test_loss_of_twice_the_level_is_no_plateau_however_calm_the_norms_are() -> None:
    assert VerdictKind.SPIKE in kinds(feed(settled(), losses(4, level=9.0), 201))


def test_update_norm_out_of_its_band_confirms_a_loss_that_is_merely_high() -> None:
    detector = settled_with_all_norms(noise=0.05)
    found = [
        detector.update(step, 4.0 * math.exp(4 * 0.05), 1.0, update_norm=2.8) for step in (201, 202)
    ]
    assert found[0].deviation < detector.threshold
    assert found[1].kind is VerdictKind.SPIKE


# Limits and lock-out.


def test_limits_open_after_max_vetoed_steps_and_close_again_when_calm() -> None:
    detector = settled(max_vetoed_steps=3)
    feed(detector, [8.0, 8.0], 201)
    assert detector.limits()[0] < 5
    feed(detector, [8.0], 203)
    assert detector.limits() == (math.inf, math.inf)
    feed(detector, [4.0], 204)
    assert detector.limits()[0] < 5


def test_first_steps_are_protected_by_wide_limits_that_tighten() -> None:
    detector = SpikeDetector()
    assert detector.limits()[0] == math.inf
    detector.update(1, 4.0, 1.0)
    assert detector.limits()[0] == pytest.approx(8.0)
    feed(detector, losses(200), 2)
    assert detector.limits()[0] < 4.5


def test_lasting_change_is_bounded_in_verdicts_and_limits() -> None:
    detector = settled()
    opened = 0
    for step in range(201, 301):
        verdict = detector.update(step, 6.0, 1.0)
        opened += detector.limits()[0] > 6.0
    assert verdict.is_calm
    assert opened >= 100 - detector.max_vetoed_steps


def test_nan_does_not_freeze_the_next_128_clean_steps() -> None:
    detector = settled()
    detector.update(201, math.nan, math.nan)
    verdicts = feed(detector, losses(128, seed=1), 202)
    assert kinds(verdicts) == {VerdictKind.OK}
    assert VerdictKind.SPIKE in kinds(feed(detector, [6.0] * 3, 330, None))


def test_run_of_nan_has_one_onset() -> None:
    verdicts = feed(settled(), [math.nan] * 5, 201)
    assert {verdict.onset_step for verdict in verdicts} == {201}


# Low losses.


def test_loss_far_below_the_band_is_suspicious_when_it_stays() -> None:
    found = [v.kind for v in feed(settled(), [2.0] * 5, 201)]
    assert found == [VerdictKind.OK] + [VerdictKind.SUSPICIOUSLY_LOW] * 4


def test_lower_level_is_accepted_in_the_end() -> None:
    detector = settled()
    verdicts = feed(detector, losses(60, level=2.0), 201)
    assert verdicts[31].kind is VerdictKind.LEVEL_SHIFT
    assert all(verdict.is_calm for verdict in verdicts[31:])


def test_twenty_low_steps_do_not_pull_the_baseline_down() -> None:
    detector = settled(has_low_verdict=False)
    verdicts = feed(detector, [0.01] * 20 + losses(100, seed=1), 201)
    assert kinds(verdicts) == {VerdictKind.OK}


# Slow rises.


def test_slow_divergence_in_strong_noise_is_found() -> None:
    source = random.Random(7)
    detector = SpikeDetector()
    clean = [2.0 * math.exp(source.gauss(0, 0.07)) for _ in range(400)]
    rising = [2.0 * math.exp(0.0008 * i + source.gauss(0, 0.07)) for i in range(400)]
    assert VerdictKind.DIVERGENCE not in kinds(feed(detector, clean))
    found = [v for v in feed(detector, rising, 401) if v.kind is VerdictKind.DIVERGENCE]
    assert found
    assert found[0].step < 700
    assert 200 < found[0].onset_step < found[0].step
    assert len(found) < 400, "the lock-out is bounded"


@pytest.mark.parametrize("rise", [1.5, 2.0, 2.5])
def test_level_that_rose_inside_the_band_and_is_flat_is_no_divergence(rise: float) -> None:
    found = []
    for seed in range(10):
        detector = SpikeDetector()
        feed(detector, losses(300, seed=seed, noise=0.1))
        harder = losses(150, level=4.0 * math.exp(rise * 0.1), seed=seed + 100, noise=0.1)
        found.append(kinds(feed(detector, harder, 301)))
    assert sum(bool(each & ROLLBACK_KINDS) for each in found) <= 1
    if rise >= 2:
        assert sum(VerdictKind.LEVEL_SHIFT in each for each in found) >= 8


@pytest.mark.parametrize("noise", [0.005, 0.02, 0.07, 0.15])
def test_long_clean_run_has_no_rollback_verdict(noise: float) -> None:
    for seed in range(3):
        falling = [
            value * math.exp(-0.3 * (1 - math.exp(-i / 2000)))
            for i, value in enumerate(losses(4000, seed=seed, noise=noise))
        ]
        assert not any(v.needs_rollback for v in feed(SpikeDetector(), falling))


# Anything goes.


def test_scale_of_the_loss_does_not_matter() -> None:
    values = [*losses(150), 8.0, 8.0, 8.0, *losses(50, seed=1), 1.0, 9.0, *losses(20, seed=2)]
    small = [v.kind for v in feed(SpikeDetector(), values)]
    large = [v.kind for v in feed(SpikeDetector(), [1024 * value for value in values])]
    assert small == large


@pytest.mark.parametrize("seed", range(20))
def test_garbage_never_raises_and_limits_are_never_nan(seed: int) -> None:
    source = random.Random(seed)

    def draw() -> float:
        return source.choice(GARBAGE) if source.random() < 0.3 else source.uniform(0.5, 9)

    detector = SpikeDetector(window=source.choice([4, 8, 12, 64]), warm_up_steps=4)
    for step in range(300):
        if source.random() < 0.02:
            detector.announce(step + source.randrange(-5, 5), source.randrange(-2, 40))
        if source.random() < 0.02:
            detector.resumed()
        detector.update(
            source.choice([step, step, -step, 10**12]),
            draw(),
            source.choice([None, draw()]),
            update_norm=source.choice([None, draw()]),
            group_norms=[draw() for _ in range(source.randrange(3))],
            nonfinite_share=source.choice([None, 0.0, draw()]),
        )
        assert not any(math.isnan(limit) for limit in detector.limits())
