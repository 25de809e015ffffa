"""Ask for saves, to disk and to memory, and promote what was saved to good after calm steps."""

from __future__ import annotations

from collections.abc import Mapping

from train.actions import Action, Save
from train.checkpoint.tiers import Tiers
from train.events import Callback, CallbackPhase
from train.settings import CheckpointSettings
from train.signals import StepReport


class Checkpointing(Callback):
    """Saves every `interval_steps`, to memory every `snapshot_steps`; what was saved is good after
    `good_after_steps` calm ones.
    """

    phase = CallbackPhase.PERSIST

    def __init__(self, settings: CheckpointSettings, tiers: Tiers) -> None:
        self._settings = settings
        self._tiers = tiers
        self._calm_steps = 0

    def needs_current(self, step: int) -> bool:
        """A save needs to know the step that it saves."""
        return self._is_due_on_disk(step) or self._is_due_in_memory(step)

    def after_update(self, report: StepReport) -> Action | None:
        """Count calm steps, promote, and ask for a save when one is due."""
        is_calm = report.verdict is None or report.verdict.is_calm
        self._calm_steps = self._calm_steps + 1 if is_calm else 0
        needed = self._settings.good_after_steps
        step = report.state.step
        if self._calm_steps >= needed:
            self._tiers.promote_before(step - needed)
        to_disk = self._is_due_on_disk(step)
        # In memory, a state amid trouble would only push out one that is worth keeping.
        to_memory = is_calm and self._is_due_in_memory(step)
        if to_disk or to_memory:
            return Save(reason=f"step {step}", to_disk=to_disk, to_memory=to_memory)
        return None

    def _is_due_on_disk(self, step: int) -> bool:
        return step % self._settings.interval_steps == 0

    def _is_due_in_memory(self, step: int) -> bool:
        return self._settings.keep_snapshots > 0 and step % self._settings.snapshot_steps == 0

    def state_dict(self) -> dict[str, object]:
        """Return the count of calm steps."""
        return {"calm_steps": self._calm_steps}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore the count of calm steps."""
        calm_steps = state["calm_steps"]
        assert isinstance(calm_steps, int)
        self._calm_steps = calm_steps
