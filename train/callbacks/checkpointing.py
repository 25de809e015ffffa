"""Ask for saves, to disk and to memory, and promote what was saved to good after calm steps."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

from train.actions import Action, Save
from train.checkpoint.info import CheckpointInfo
from train.checkpoint.interval import FailureRate, choose_interval, configured_rate
from train.checkpoint.tiers import Tiers
from train.events import Callback, CallbackPhase
from train.settings import CheckpointSettings
from train.signals import StepReport

logger = logging.getLogger(__name__)

AUTO = "auto"
# Until it is known what a save and a step take.
_FIRST_INTERVAL_STEPS = 100
# Enough for a median; the first steps of a process are slow.
_NUM_STEPS_TIMED = 16
# An interval that is nearly right is left alone: the log says little, and saves stay regular.
_MIN_CHANGE = 0.2

Agree = Callable[[Any], Any]
"""Returns what rank 0 passes, on all ranks. A collective."""


def interval_in_force(
    settings: CheckpointSettings, states: Mapping[str, Mapping[str, object]]
) -> int:
    """Return the steps between saves, where callbacks have these states."""
    if isinstance(settings.interval_steps, int):
        return settings.interval_steps
    chosen = states.get(Checkpointing.__name__, {}).get("interval_steps")
    first = min(_FIRST_INTERVAL_STEPS, settings.max_interval_steps)
    return chosen if isinstance(chosen, int) else first


class Checkpointing(Callback):
    """Saves every `interval_steps`, to memory every `snapshot_steps`; what was saved is good after
    `good_after_steps` calm ones.

    With interval_steps=auto, rank 0's times decide, once they are known and after each save: what
    is chosen then holds on all ranks, and is in the checkpoints. `rate` is what rank 0 has found.
    """

    phase = CallbackPhase.PERSIST

    def __init__(
        self,
        settings: CheckpointSettings,
        tiers: Tiers,
        *,
        agree: Agree = lambda value: value,
        rate: FailureRate | None = None,
    ) -> None:
        self._settings = settings
        self._tiers = tiers
        self._agree = agree
        self._rate = rate
        self._calm_steps = 0
        self._interval_steps = interval_in_force(settings, {})
        self._stall_seconds: float | None = None
        self._save_seconds: float | None = None
        self._step_seconds: deque[float] = deque(maxlen=_NUM_STEPS_TIMED)
        self._num_steps_timed = 0
        self._is_chosen = False

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
        self._time(report)
        if to_disk or to_memory:
            return Save(reason=f"step {step}", to_disk=to_disk, to_memory=to_memory)
        return None

    def on_checkpoint_saved(
        self, info: CheckpointInfo, seconds: float, background_seconds: float
    ) -> None:
        """Choose the interval anew, now that it is known what a save takes."""
        del info
        self._stall_seconds = seconds
        self._save_seconds = seconds + background_seconds
        self._choose()

    def _is_due_on_disk(self, step: int) -> bool:
        return step % self._interval_steps == 0

    def _is_due_in_memory(self, step: int) -> bool:
        interval = self._settings.snapshot_interval_steps or self._interval_steps
        return self._settings.keep_snapshots > 0 and step % interval == 0

    def _time(self, report: StepReport) -> None:
        self._step_seconds.append(report.step_seconds + report.data_seconds)
        self._num_steps_timed += 1
        if self._num_steps_timed == _NUM_STEPS_TIMED:
            self._choose()

    def _choose(self) -> None:
        """Choose the interval by rank 0's times. A collective if it is automatic."""
        # All ranks have seen as many saves and steps, so all of them come to the same answer here.
        is_timed = self._num_steps_timed >= _NUM_STEPS_TIMED and self._stall_seconds is not None
        if self._settings.interval_steps != AUTO or not is_timed:
            return
        configured = self._settings.failures_per_day
        rate = self._rate if configured is None else configured_rate(configured)
        assert rate is not None, "an automatic interval is given a rate"
        found = choose_interval(
            stall_seconds=self._stall_seconds or 0.0,
            save_seconds=self._save_seconds or 0.0,
            step_seconds=median(self._step_seconds),
            rate=rate,
            max_steps=self._settings.max_interval_steps,
            max_minutes=self._settings.max_minutes_at_risk,
        )
        chosen = self._agree(found)
        is_other = abs(chosen.steps - self._interval_steps) >= _MIN_CHANGE * self._interval_steps
        if is_other or not self._is_chosen:
            logger.info("checkpoint.interval_steps=auto: %s", chosen.reason)
            self._interval_steps = chosen.steps
        self._is_chosen = True

    def state_dict(self) -> dict[str, object]:
        """Return the count of calm steps, and the interval if it was chosen."""
        state: dict[str, object] = {"calm_steps": self._calm_steps}
        if self._settings.interval_steps == AUTO:
            state |= {
                "interval_steps": self._interval_steps,
                "stall_seconds": self._stall_seconds,
                "save_seconds": self._save_seconds,
            }
        return state

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore the count of calm steps, and the interval if it is to be chosen."""
        calm_steps = state["calm_steps"]
        assert isinstance(calm_steps, int)
        self._calm_steps = calm_steps
        if self._settings.interval_steps == AUTO:
            self._interval_steps = interval_in_force(self._settings, {self.name: state})
            stall, save = state.get("stall_seconds"), state.get("save_seconds")
            if isinstance(stall, float) and isinstance(save, float):
                self._stall_seconds, self._save_seconds = stall, save
