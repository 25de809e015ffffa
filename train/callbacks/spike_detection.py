"""Judge every step with the spike detector, and set the gate for the next one."""

from __future__ import annotations

from collections.abc import Mapping

from train.events import Callback, CallbackPhase
from train.recovery.detector import SpikeDetector, Verdict
from train.settings import RecoverySettings, Veto
from train.signals import Gate, StepReport


class SpikeDetection(Callback):
    """The detector's place in the run; its state is in every checkpoint and rewound with it."""

    phase = CallbackPhase.OBSERVE

    def __init__(self, settings: RecoverySettings) -> None:
        self._has_outlier_gate = settings.veto is Veto.OUTLIER
        self._detector = SpikeDetector(
            window=settings.window_steps,
            warm_up_steps=settings.warmup_steps,
            threshold=settings.threshold_sigma,
            persistence=settings.persistence_steps,
            max_flagged_steps=settings.max_flagged_steps,
        )

    def gate(self) -> Gate | None:
        """Refuse outliers on the device, if the config says so."""
        if not self._has_outlier_gate:
            return None
        max_loss, max_norm = self._detector.limits()
        return Gate(max_loss_nats=max_loss, max_grad_norm=max_norm)

    def after_update(self, report: StepReport) -> Verdict:
        """Return the verdict of a step."""
        signals = report.signals
        return self._detector.update(report.state.step, signals.loss_nats, signals.grad_norm)

    def state_dict(self) -> dict[str, object]:
        """Return the detector's state."""
        return self._detector.state_dict()

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore the detector's state."""
        self._detector.load_state_dict(state)
