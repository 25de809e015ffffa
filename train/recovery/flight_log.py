"""The last steps of a run as they were reported, and where each one's batch began.

Owns the memory of the flight recorder, which fills it, and its form in a capsule, which reads it.
Refuses tensors and files. It is history of the run and not part of its state.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from train.signals import StepReport
from train.state import TrainState

NUM_STEPS_KEPT = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedStep:
    """One report, and the state from which its step began."""

    before: TrainState
    report: StepReport

    def as_record(self) -> dict[str, object]:
        """Return the step as plain values; norms are those before clipping."""
        report, signals = self.report, self.report.signals
        record: dict[str, object] = {
            "step": report.state.step,
            "clock": report.state.clock,
            "cursor_before": self.before.cursor,
            "cursor": report.state.cursor,
            "num_samples": report.num_samples,
            "lr": report.lr,
            "loss_nats": signals.loss_nats,
            "grad_norm": signals.grad_norm,
            "update_norm_before": signals.update_norm,
            "nonfinite_share": signals.nonfinite_share,
            "num_bad_ranks": signals.num_bad_ranks,
            "bad_rank": signals.bad_rank,
            "update": str(report.update),
            "max_loss_nats": report.gate.max_loss_nats,
            "max_grad_norm": report.gate.max_grad_norm,
            "step_seconds": report.step_seconds,
            "group_norms": list(signals.group_norms),
        }
        verdict = report.verdict
        if verdict is not None:
            record |= {
                "verdict": str(verdict.kind),
                "onset_step": verdict.onset_step,
                "deviation": verdict.deviation,
                "baseline_nats": verdict.baseline_nats,
                "sigma": verdict.sigma,
                "led_by": verdict.led_by,
                "lead_steps": verdict.lead_steps,
            }
        return record


class FlightLog:
    """The last 64 steps, oldest first, and the state after the last one whose report was seen."""

    def __init__(self) -> None:
        self.steps: deque[LoggedStep] = deque(maxlen=NUM_STEPS_KEPT)
        self.state = TrainState()

    def add(self, report: StepReport) -> None:
        """Take up the next report."""
        self.steps.append(LoggedStep(before=self.state, report=report))
        self.state = report.state

    def at_clock(self, clock: int) -> LoggedStep | None:
        """Return the step that ended at `clock`, or None if it was not reported or is too old."""
        return next((step for step in self.steps if step.report.state.clock == clock), None)
