"""Judge every step with the spike detector, and set the gate for the next one."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from train.events import Callback, CallbackPhase, RunStart
from train.recovery.detector import SpikeDetector, Verdict
from train.recovery.history import RecoveryHistory
from train.recovery.journal import Incident
from train.schedule import Schedule
from train.settings import RecoverySettings, Veto
from train.signals import Gate, StepReport
from train.state import TrainState


class SpikeDetection(Callback):
    """The detector's place in the run; its state is in every checkpoint and rewound with it.

    `is_data_change(cursor, step)`: whether the batch of `step`, read from `cursor` on, is the first
    of another mixture.
    """

    phase = CallbackPhase.OBSERVE

    def __init__(
        self,
        settings: RecoverySettings,
        schedule: Schedule,
        history: RecoveryHistory,
        is_data_change: Callable[[int, int], bool] = lambda cursor, step: False,
    ) -> None:
        self._settings = settings
        self._is_data_change = is_data_change
        self._schedule = schedule
        self._history = history
        self._has_outlier_gate = settings.resolved_veto is Veto.OUTLIER
        self._detector = SpikeDetector(
            window=settings.window_steps,
            warm_up_steps=settings.warmup_steps,
            threshold=settings.threshold_sigma,
            persistence=settings.persistence_steps,
            max_flagged_steps=settings.max_flagged_steps,
            announced_steps=settings.announced_steps,
        )

    def on_run_start(self, start: RunStart) -> None:
        """After a resume, the loss must go on where it was."""
        if start.is_resumed and start.is_sound:
            self._detector.resumed()
        if start.is_changed:
            self._detector.announce(start.state.step + 1)
        self._announce_after(start.state)

    def on_rewind(self, incident: Incident, state: TrainState, seconds: float) -> None:
        """A rewind may have cooled the learning rate."""
        del incident, seconds
        self._announce_after(state)

    def gate(self) -> Gate | None:
        """Refuse outliers on the device, if the config says so and the budget is not used up."""
        if not self._has_outlier_gate or self._history.num_vetoes >= self._settings.max_vetoes:
            return None
        max_loss, max_norm = self._detector.limits()
        return Gate(max_loss_nats=max_loss, max_grad_norm=max_norm)

    def after_update(self, report: StepReport) -> Verdict:
        """Return the verdict of a step."""
        signals = report.signals
        step = report.state.step
        verdict = self._detector.update(
            step,
            signals.loss_nats,
            signals.grad_norm,
            update_norm=signals.update_norm,
            group_norms=signals.group_norms,
            nonfinite_share=signals.nonfinite_share,
        )
        self._announce_after(report.state)
        return verdict

    def _announce_after(self, state: TrainState) -> None:
        """Announce what is known of the next steps, before their gates are set.

        Two of them: when the report of a step is read, the gate of the next one is set already.
        """
        for ahead in (state.step + 1, state.step + 2):
            if self._is_announced(ahead):
                self._detector.announce(ahead)
        cursor = state.cursor
        for step in (state.step, state.step + 1):
            if self._is_data_change(cursor, step):
                self._detector.announce(step + 1)
            cursor += self._schedule.batch_samples_at(step)

    def _is_announced(self, step: int) -> bool:
        """True if a change that is known beforehand takes effect in the update `step`."""
        return (
            step in self._settings.announced
            or self._schedule.is_change_at(step - 1)
            or any(step - 1 in (c.from_step, c.until_step) for c in self._history.coolings)
            or step - 1 in self._history.accepted_steps
        )

    def state_dict(self) -> dict[str, object]:
        """Return the detector's state."""
        return self._detector.state_dict()

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore the detector's state."""
        self._detector.load_state_dict(state)
