"""Which norm left its band, and when: the signals beside the loss.

Owns the bands of the gradient norm, the update norm and the layer groups' gradient norms. Refuses
verdicts: these signals are heavy-tailed, so they confirm and lead, and an extreme gradient norm is
an outlier at most. No clock, no I/O, standard library alone. Called by `detector`, on every rank
with the same numbers; no collective.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from train.recovery.baseline import RobustBaseline, number, numbers, part

# Gradient norms move by more than the loss does, from step to step.
_NORM_FLOOR = 0.05
_LOWEST = 1e-12
_LOWEST_LOG = math.log(_LOWEST)
# Half-life of about 14 steps for the level, 35 for the noise; a value counts at most three sigma.
_BAND_LEVEL_GAIN, _BAND_NOISE_GAIN, _BAND_CLIP = 0.05, 0.02, 3.0
# The mean deviation of normal noise, to its sigma.
_MEAN_TO_SIGMA = 1.2533


class Bands:
    """Rough bands of many positive signals, each at a third of a microsecond a step.

    Exponential averages with clipped steps instead of sorted windows. They never make a verdict:
    they say which signal left its band, and when.
    """

    def __init__(self) -> None:
        self._levels: list[float] = []
        self._noises: list[float] = []
        self._num_accepted = 0

    def outside(
        self, logs: Sequence[float], threshold: float, num_steps: int
    ) -> list[tuple[int, float]]:
        """Signals above `threshold`, and their deviations, once `num_steps` were accepted."""
        if self._num_accepted < num_steps or len(logs) != len(self._levels):
            return []
        return [
            (index, (log_value - level) / noise)
            for index, (log_value, level, noise) in enumerate(
                zip(logs, self._levels, self._noises, strict=True)
            )
            if log_value - level > threshold * noise
        ]

    def accept(self, logs: Sequence[float]) -> None:
        """Let the values of one step in."""
        levels, noises = self._levels, self._noises
        if len(logs) != len(levels):
            self._levels, self._noises = list(logs), [_NORM_FLOOR] * len(logs)
            self._num_accepted = 1
            return
        self._num_accepted += 1
        gain = max(_BAND_LEVEL_GAIN, 1 / self._num_accepted)
        noise_gain = max(_BAND_NOISE_GAIN, 1 / self._num_accepted)
        for index, log_value in enumerate(logs):
            move = log_value - levels[index]
            noise = noises[index]
            bound = _BAND_CLIP * noise
            if move > bound:
                move = bound
            elif move < -bound:
                move = -bound
            levels[index] += gain * move
            size = (move if move > 0 else -move) * _MEAN_TO_SIGMA
            noise += noise_gain * (size - noise)
            noises[index] = noise if noise > _NORM_FLOOR else _NORM_FLOOR

    def state_dict(self) -> dict[str, object]:
        """Return the state as JSON values."""
        return {
            "levels": list(self._levels),
            "noises": list(self._noises),
            "num_accepted": self._num_accepted,
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take up the state of another instance."""
        self._levels, self._noises = numbers(state, "levels"), numbers(state, "noises")
        self._num_accepted = int(number(state, "num_accepted"))


class Norms:
    """The bands of all norms, and which signals are outside theirs since when.

    `threshold`: standard deviations that are outside; `warm_up_steps`: steps before a band is
    trusted; `persistence`: a signal that was inside for no more than this many steps is still out.
    `_outside` holds the first step and last update of signals above their band, `_high` the number
    and last of those in its upper half or above.
    """

    def __init__(
        self, *, window: int, warm_up_steps: int, threshold: float, persistence: int
    ) -> None:
        self._warm_up_steps = warm_up_steps
        self._threshold = threshold
        self._persistence = persistence
        self._total = RobustBaseline(window, _NORM_FLOOR)
        self._update = Bands()
        self._groups = Bands()
        self._raised = threshold / 2
        self._outside: dict[str, list[int]] = {}
        self._high: dict[str, list[int]] = {}
        self._num_updates = 0
        self._logs: tuple[float | None, list[float], list[float]] = (None, [], [])

    def watch(
        self,
        step: int,
        total: float | None,
        update: float | None,
        groups: Sequence[float],
    ) -> float:
        """Note which norms are outside their bands; return the gradient norm's deviation.

        The norms are those of `SpikeDetector.update`: finite, but for an unknown update norm. An
        update of norm 0 was not applied, and is unknown too.
        """
        self._num_updates += 1
        oldest = self._num_updates - self._persistence - 1
        if self._outside:
            self._outside = {n: seen for n, seen in self._outside.items() if seen[1] >= oldest}
        if self._high:
            self._high = {n: seen for n, seen in self._high.items() if seen[1] >= oldest}
        log_total = None if total is None else math.log(max(total, _LOWEST))
        is_known = update is not None and 0 < update < math.inf
        log_update = [math.log(max(update, _LOWEST))] if update is not None and is_known else []
        log_groups = [math.log(norm) if norm > _LOWEST else _LOWEST_LOG for norm in groups]
        self._logs = (log_total, log_update, log_groups)
        deviation = 0.0
        if log_total is not None and self._total.num_accepted >= self._warm_up_steps:
            deviation = (log_total - self._total.level) / self._total.noise
            if deviation > self._raised:
                self._note("grad_norm", step, deviation)
        for _, size in self._update.outside(log_update, self._raised, self._warm_up_steps):
            self._note("update_norm", step, size)
        for index, size in self._groups.outside(log_groups, self._raised, self._warm_up_steps):
            self._note(f"grad_norm/{index}", step, size)
        return deviation

    @property
    def is_update_outside(self) -> bool:
        """True if the update norm of the step just watched is above its band."""
        return self._outside.get("update_norm", (0, 0))[1] == self._num_updates > 0

    @property
    def are_calm(self) -> bool:
        """True if the gradient norm is known, and no norm was lately above its band."""
        is_known = self._logs[0] is not None and self._total.num_accepted >= self._warm_up_steps
        return is_known and not self._outside

    @property
    def stay_high(self) -> bool:
        """True if a norm stays in the upper half of its band, or above it."""
        return any(count > self._persistence for count, _ in self._high.values())

    def accept(self) -> None:
        """Let the norms of the step just watched into their bands."""
        log_total, log_update, log_groups = self._logs
        if log_total is not None:
            self._total.accept(log_total)
        if log_update:
            self._update.accept(log_update)
        if log_groups:
            self._groups.accept(log_groups)

    def leader(self, onset_step: int) -> tuple[str, int]:
        """Return the signal that left its band first, and by how many steps before the loss."""
        first = min(self._outside, key=lambda name: self._outside[name][0], default=None)
        if first is None or self._outside[first][0] >= onset_step:
            return "loss", 0
        return first, onset_step - self._outside[first][0]

    def highest_log(self, deviation: float) -> float:
        """Return the log of the gradient norm at this deviation; infinite while unknown."""
        if self._total.num_accepted < self._warm_up_steps:
            return math.inf
        return self._total.level + deviation * self._total.noise

    def _note(self, signal: str, step: int, deviation: float) -> None:
        seen = self._high.setdefault(signal, [0, 0])
        seen[:] = seen[0] + 1, self._num_updates
        if deviation > self._threshold:
            self._outside.setdefault(signal, [step, 0])[1] = self._num_updates

    def state_dict(self) -> dict[str, object]:
        """Return the state as JSON values."""
        return {
            "total": self._total.state_dict(),
            "update": self._update.state_dict(),
            "groups": self._groups.state_dict(),
            "outside": {name: list(seen) for name, seen in self._outside.items()},
            "high": {name: list(seen) for name, seen in self._high.items()},
            "num_updates": self._num_updates,
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take up the state of another instance."""
        self._total.load_state_dict(part(state, "total"))
        self._update.load_state_dict(part(state, "update"))
        self._groups.load_state_dict(part(state, "groups"))
        outside = part(state, "outside")
        self._outside = {name: [int(at) for at in numbers(outside, name)] for name in outside}
        high = part(state, "high")
        self._high = {name: [int(count) for count in numbers(high, name)] for name in high}
        self._num_updates = int(number(state, "num_updates"))
