"""The detector's state: complete, JSON, finite, and exact at any point of any history."""

from __future__ import annotations

import json
import math
import random

import pytest

from train.recovery.detector import SpikeDetector, Verdict

Row = tuple[int, float, float | None, list[float], float | None]


def history(seed: int, count: int = 260) -> list[Row]:
    """A run with everything in it: spikes, NaN, level changes, low stretches, odd norms."""
    source = random.Random(seed)
    level, rows = 4.0, []
    for step in range(count):
        if source.random() < 0.02:
            level *= source.choice([0.5, 0.8, 1.3, 2.0])
        loss = level * math.exp(source.gauss(0, 0.02))
        if source.random() < 0.03:
            loss *= source.choice([1.5, 3.0, 0.2, math.nan])
        norm = None if source.random() < 0.05 else math.exp(source.gauss(0, 0.2))
        groups = [math.exp(source.gauss(0, 0.3)) for _ in range(3)]
        if norm is not None and source.random() < 0.05:
            norm, groups[1] = 60.0, 80.0
        rows.append((step, loss, norm, groups, source.choice([None, 0.1, math.nan])))
    return rows


def act(detector: SpikeDetector, row: Row) -> tuple[Verdict, tuple[float, float]]:
    step, loss, norm, groups, update = row
    if step % 70 == 40:
        detector.announce(step + 3, 20)
    if step % 50 == 30:
        detector.resumed()
    verdict = detector.update(step, loss, norm, group_norms=groups, update_norm=update)
    return verdict, detector.limits()


def assert_finite(value: object) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            assert isinstance(key, str)
            assert_finite(inner)
    elif isinstance(value, list):
        for inner in value:
            assert_finite(inner)
    else:
        assert value is None or isinstance(value, (str, bool, int, float))
        assert not isinstance(value, float) or math.isfinite(value)


@pytest.mark.parametrize("window", [12, 64])
@pytest.mark.parametrize("seed", range(8))
def test_restored_detector_goes_on_exactly_from_any_step(seed: int, window: int) -> None:
    rows = history(seed)
    whole = SpikeDetector(window=window, warm_up_steps=6)
    expected = [act(whole, row) for row in rows]
    current = SpikeDetector(window=window, warm_up_steps=6)
    for row, result in zip(rows, expected, strict=True):
        text = json.dumps(current.state_dict(), allow_nan=False)
        current = SpikeDetector(window=window, warm_up_steps=6)
        current.load_state_dict(json.loads(text))
        assert act(current, row) == result


@pytest.mark.parametrize("seed", range(4))
def test_state_holds_finite_json_values_alone(seed: int) -> None:
    detector = SpikeDetector()
    for row in history(seed):
        act(detector, row)
        assert_finite(detector.state_dict())


def test_state_is_not_changed_by_later_updates() -> None:
    detector = SpikeDetector()
    for row in history(1):
        act(detector, row)
    saved = detector.state_dict()
    text = json.dumps(saved)
    for row in history(2):
        act(detector, row)
    assert json.dumps(saved) == text


def test_resume_is_remembered_over_a_crash() -> None:
    detector = SpikeDetector()
    for step in range(100):
        detector.update(step, 4.0 * math.exp(0.01 * math.sin(step)), 1.0)
    detector.resumed()
    detector.update(100, 8.0, 1.0)
    again = SpikeDetector()
    again.load_state_dict(json.loads(json.dumps(detector.state_dict())))
    again.update(101, 8.0, 1.0)
    assert again.update(102, 8.0, 1.0).kind == "resume_discontinuity"


@pytest.mark.parametrize(("saved", "loaded"), [(64, 12), (12, 64), (8, 48)])
def test_state_of_another_window_is_taken_as_far_as_it_fits(saved: int, loaded: int) -> None:
    old = SpikeDetector(window=saved)
    for step in range(300):
        old.update(step, 4.0 * math.exp(0.01 * math.sin(step)), 1.0)
    new = SpikeDetector(window=loaded)
    new.load_state_dict(old.state_dict())
    verdicts = [new.update(step, 4.0 * math.exp(0.01 * math.sin(step)), 1.0) for step in range(9)]
    assert {verdict.kind for verdict in verdicts} == {"ok"}
    assert verdicts[0].baseline_nats == pytest.approx(4.0, rel=0.02)


def test_empty_state_is_a_fresh_detector() -> None:
    detector = SpikeDetector()
    for row in history(3):
        act(detector, row)
    detector.load_state_dict({})
    assert detector.state_dict() == SpikeDetector().state_dict()
