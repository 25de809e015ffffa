"""Learning rate and batch size as pure functions of the step. No torch.

What depends on time depends on the step alone, so nothing of it needs saving, and a rewind takes
the schedule back with the model.
"""

from __future__ import annotations

import math

from train.amounts import Amount, AmountUnit
from train.settings import Decay, ScheduleSettings


class Schedule:
    """The schedule of one run of `num_steps` steps with the peak learning rate `peak_lr`."""

    def __init__(self, settings: ScheduleSettings, *, peak_lr: float, num_steps: int) -> None:
        self._settings = settings
        self._peak_lr = peak_lr
        self._num_steps = num_steps

    def lr_at(self, step: int) -> float:
        """Return the learning rate of the update that follows `step` finished ones.

        Linear warm-up to the peak, then decay to `final_lr_ratio` of it at the last step.
        Source of the cosine: Loshchilov and Hutter, arXiv 1608.03983, without restarts.
        """
        settings = self._settings
        if step < settings.warmup_steps:
            return self._peak_lr * (step + 1) / settings.warmup_steps
        if settings.decay is Decay.CONSTANT:
            return self._peak_lr
        decay_steps = max(1, self._num_steps - settings.warmup_steps)
        progress = min(1.0, (step - settings.warmup_steps) / decay_steps)
        if settings.decay is Decay.COSINE:
            progress = 0.5 * (1 - math.cos(math.pi * progress))
        floor = settings.final_lr_ratio
        return self._peak_lr * (floor + (1 - floor) * (1 - progress))

    def batch_samples_at(self, step: int) -> int:
        """Return the global batch, in samples, of the update that follows `step` finished ones.

        A linear ramp from `batch_ramp_start_samples`, in whole increments.
        """
        settings = self._settings
        if step >= settings.batch_ramp_steps:
            return settings.batch_samples
        start, increment = settings.batch_ramp_start_samples, settings.batch_ramp_increment_samples
        grown = (settings.batch_samples - start) * step // settings.batch_ramp_steps
        return start + grown // increment * increment

    def is_change_at(self, step: int) -> bool:
        """True if the batch of `step` is larger than the one before by a quarter or more.

        Such a change is known beforehand, so it is no surprise to the detector.
        """
        return step > 0 and self.batch_samples_at(step) >= 1.25 * self.batch_samples_at(step - 1)

    def samples_between(self, first_step: int, last_step: int) -> int:
        """Return how many samples the updates `first_step <= step < last_step` read."""
        settings = self._settings
        ramp_stop = min(last_step, settings.batch_ramp_steps)
        ramped = sum(self.batch_samples_at(step) for step in range(first_step, ramp_stop))
        full_steps = last_step - max(first_step, settings.batch_ramp_steps)
        return ramped + max(0, full_steps) * settings.batch_samples

    @property
    def num_samples(self) -> int:
        """How many samples the whole run reads."""
        return self.samples_between(0, self._num_steps)

    def amount_in_samples(self, amount: Amount, *, from_step: int, sequence_length: int) -> int:
        """Return `amount` in samples of `sequence_length` tokens, counted from `from_step` on."""
        if amount.unit is AmountUnit.TOKENS:
            return math.ceil(amount.value / sequence_length)
        return self.samples_between(from_step, from_step + amount.value)
