"""The detector on the labelled curves: its promised quality beside the public rules."""

from __future__ import annotations

from functools import cache

import pytest

from benchmarks.detector_quality import Curve, load_curves, pooled, replay, score
from benchmarks.public_rules import RULES, OlmoSkipStep
from train.recovery.detector import (
    ROLLBACK_KINDS,
    SpikeDetector,
    VerdictKind,
    default_detector,
)


@cache
def curves() -> dict[str, Curve]:
    return {curve.name: curve for curve in load_curves()}


@cache
def figures() -> dict[str, float | None]:
    scores = [score(curve, replay(default_detector, curve)) for curve in curves().values()]
    return pooled(scores).figures()


def figure(key: str) -> float:
    value = figures()[key]
    assert value is not None
    return value


def test_curves_are_all_there() -> None:
    assert len(curves()) == 39
    assert sum(len(curve.steps) for curve in curves().values()) == 110_036


def test_spikes_that_need_a_rollback_are_found() -> None:
    assert figure("recall") >= 0.95
    assert figure("recall_rollback") >= 0.9
    assert figure("chance") <= 0.05


def test_each_is_found_by_its_labelled_end_slow_divergence_too() -> None:
    assert figure("recall_late") == 1.0


def test_rollbacks_without_a_cause_are_rare() -> None:
    assert figure("false_rollback_per_10k") <= 0.2
    assert figure("false_per_10k") <= 5
    assert figure("too_much") <= 0.04


def test_spikes_are_found_at_once() -> None:
    assert figure("delay_rows") <= 1


def test_single_bad_batches_are_flagged_on_the_batch_itself() -> None:
    assert figure("skips_hit") == 1.0


def test_slow_divergence_is_a_divergence_before_its_end() -> None:
    curve = curves()["made_f2_lr_creep_slow"]
    found = replay(default_detector, curve)
    event = curve.events[0]
    assert VerdictKind.DIVERGENCE in found[event.onset : event.end]
    assert VerdictKind.DIVERGENCE not in found[: event.onset]


def test_unannounced_mixture_switch_with_calm_norms_is_no_spike() -> None:
    curve = curves()["made_g2_lic_to_py"]
    assert not set(replay(default_detector, curve)) & ROLLBACK_KINDS


def test_announced_mixture_switch_is_no_spike() -> None:
    for name in ("made_g2_lic_to_py", "made_g4_mix_to_foreign_mix"):
        curve = curves()[name]
        onset = curve.events[0].onset
        detector = SpikeDetector()
        detector.announce(curve.steps[onset])
        rows = zip(curve.steps, curve.losses, curve.norms, strict=True)
        verdicts = [detector.update(*row) for row in rows]
        near = verdicts[onset : onset + 60]
        assert all(verdict.is_calm for verdict in near), name


def test_no_public_rule_is_as_good() -> None:
    for name, make in RULES.items():
        scores = [score(curve, replay(make, curve)) for curve in curves().values()]
        other = pooled(scores).figures()
        recall, chance = other["recall"], other["chance"]
        assert recall is not None
        assert chance is not None
        assert recall - chance < 0.6 < figure("recall") - figure("chance"), name


@pytest.mark.parametrize("plateau", [5.0])
def test_public_skip_step_lets_a_plateau_in_and_ours_does_not(plateau: float) -> None:
    calm = [2.5 + 0.01 * ((7 * step) % 11 - 5) for step in range(200)]
    values = [*calm, *[plateau] * 12]
    ours, theirs = SpikeDetector(), OlmoSkipStep()
    our_kinds = [ours.update(step, value).kind for step, value in enumerate(values)][200:]
    their_kinds = [theirs.update(step, value) for step, value in enumerate(values)][200:]
    assert their_kinds[6:] == [VerdictKind.OK] * 6
    assert VerdictKind.OK not in our_kinds
