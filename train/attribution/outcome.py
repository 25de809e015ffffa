"""What one trial of a replay came to. Numbers in, judgement out; standard library alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from train.recovery.verdict import ROLLBACK_KINDS, VerdictKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One step of a trial. `batch` counts from the target of the incident: 1 is the first after it.

    Steps of an earlier state have other numbers than those of the run, batches have the same.
    """

    step: int
    batch: int
    cursor: int
    loss_nats: float
    grad_norm: float
    lr: float
    kind: VerdictKind
    deviation: float
    baseline_nats: float | None
    is_vetoed: bool

    def as_record(self) -> dict[str, object]:
        """Return the point as plain values."""
        return {
            "step": self.step,
            "batch": self.batch,
            "cursor": self.cursor,
            "loss_nats": self.loss_nats,
            "grad_norm": self.grad_norm,
            "lr": self.lr,
            "verdict": str(self.kind),
            "deviation": self.deviation,
            "baseline_nats": self.baseline_nats,
            "is_vetoed": self.is_vetoed,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Whether a trial spiked; None if that cannot be said, with the reason in `unknown_because`.

    `found`: the point at which the detector asked for a rollback. `peak`: the highest loss.
    """

    has_spiked: bool | None
    unknown_because: str = ""
    found: Point | None = None
    peak: Point | None = None

    def as_record(self) -> dict[str, object]:
        """Return the outcome as plain values."""
        found, peak = self.found, self.peak
        return {
            "has_spiked": self.has_spiked,
            "unknown_because": self.unknown_because,
            "verdict": None if found is None else str(found.kind),
            "verdict_step": None if found is None else found.step,
            "peak_loss_nats": None if peak is None else peak.loss_nats,
            "peak_step": None if peak is None else peak.step,
            "peak_deviation": None if peak is None else peak.deviation,
            "peak_baseline_nats": None if peak is None else peak.baseline_nats,
        }


def judge(points: Sequence[Point], *, has_other_detector: bool = False) -> Outcome:
    """Return what a trial came to, by the detector's own verdicts from the target on.

    `has_other_detector`: the detector's state is not the one that found the incident, so a calm
    trial says something only if that state had its baseline.
    """
    window = [point for point in points if point.batch >= 1]
    if not window:
        return Outcome(has_spiked=None, unknown_because="no step of it was executed")
    peak = max(window, key=_height)
    found = next((point for point in window if point.kind in ROLLBACK_KINDS), None)
    if found is not None:
        return Outcome(has_spiked=True, found=found, peak=peak)
    if has_other_detector and any(point.kind is VerdictKind.WARMUP for point in window):
        reason = "the detector of that state was still warming up"
        return Outcome(has_spiked=None, unknown_because=reason, peak=peak)
    return Outcome(has_spiked=False, peak=peak)


def _height(point: Point) -> float:
    return point.loss_nats if math.isfinite(point.loss_nats) else math.inf


def first_difference(
    points: Sequence[Point], original: Mapping[int, float | None]
) -> tuple[int | None, int]:
    """Return the first step whose loss is not, bit for bit, that of the run, and how many agree.

    `original`: the run's losses by step, None where they were not finite.
    """
    num_equal = 0
    for point in points:
        if point.step not in original:
            continue
        loss = point.loss_nats if math.isfinite(point.loss_nats) else None
        if loss != original[point.step]:
            return point.step, num_equal
        num_equal += 1
    return None, num_equal


def unless_the_detector_changed(
    outcome: Outcome,
    points: Sequence[Point],
    original: Mapping[int, float | None],
    detected_step: int,
) -> Outcome:
    """Return the outcome of the run's own steps, unknown if only another detector calls them calm.

    Where the losses are those of the run, up to the one at which it was found, the incident has
    come again, whatever is said of it now.
    """
    other_step, num_equal = first_difference(points, original)
    is_same_run = num_equal > 0 and (other_step is None or other_step > detected_step)
    if outcome.has_spiked or not is_same_run or detected_step not in original:
        return outcome
    reason = (
        "its losses are those of the run, bit for bit, but the detector of this version finds "
        "nothing in them; replay with the version and the recovery settings that the run had"
    )
    return replace(outcome, has_spiked=None, unknown_because=reason)
