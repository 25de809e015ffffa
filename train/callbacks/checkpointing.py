"""Ask for saves, and promote checkpoints to good after calm steps."""

from __future__ import annotations

from collections.abc import Mapping

from train.actions import Action, Save
from train.checkpoint.info import Health
from train.checkpoint.store import CheckpointStore
from train.events import Callback, CallbackPhase
from train.settings import CheckpointSettings
from train.signals import StepReport


class Checkpointing(Callback):
    """Saves every `interval_steps`; a checkpoint is good after `good_after_steps` calm ones."""

    phase = CallbackPhase.PERSIST

    def __init__(self, settings: CheckpointSettings, store: CheckpointStore) -> None:
        self._settings = settings
        self._store = store
        self._calm_steps = 0

    def needs_current(self, step: int) -> bool:
        """A save needs to know the step that it saves."""
        return step % self._settings.interval_steps == 0

    def after_update(self, report: StepReport) -> Action | None:
        """Count calm steps, promote, and ask for a save when one is due."""
        is_calm = report.verdict is None or report.verdict.is_calm
        self._calm_steps = self._calm_steps + 1 if is_calm else 0
        needed = self._settings.good_after_steps
        if self._calm_steps >= needed:
            for info in self._store.trusted(Health.CANDIDATE):
                if info.step + needed <= report.state.step:
                    self._store.promote(info)
        if self.needs_current(report.state.step):
            return Save(reason=f"every {self._settings.interval_steps} steps")
        return None

    def state_dict(self) -> dict[str, object]:
        """Return the count of calm steps."""
        return {"calm_steps": self._calm_steps}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore the count of calm steps."""
        calm_steps = state["calm_steps"]
        assert isinstance(calm_steps, int)
        self._calm_steps = calm_steps
