"""Keep the last reports of a run, as evidence for when something goes wrong.

Runs on every rank, since every rank's samples are evidence. What it holds is history of the run and
not a part of its state: a rewind leaves it alone, and no checkpoint has it.
"""

from __future__ import annotations

from train.events import Callback, CallbackPhase, RunStart
from train.recovery.flight_log import FlightLog
from train.recovery.journal import Incident
from train.signals import StepReport
from train.state import TrainState


class FlightRecorder(Callback):
    """Fills `log`, which whoever gathers evidence reads."""

    phase = CallbackPhase.REPORT

    def __init__(self) -> None:
        self.log = FlightLog()

    def on_run_start(self, start: RunStart) -> None:
        """Note where the first step begins."""
        self.log.state = start.state

    def after_update(self, report: StepReport) -> None:
        """Keep a report."""
        self.log.add(report)

    def on_rewind(self, incident: Incident, state: TrainState, seconds: float) -> None:
        """Note where the next step begins; what was seen before stays."""
        del incident, seconds
        self.log.state = state
