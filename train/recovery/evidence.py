"""What speaks for a spike: a stretch of high steps, what an outlier leaves behind, a slow rise.

Owns the sums that the detector decides by, in units of the run's own noise. Refuses to know levels
of its own, clocks, I/O and everything but the standard library. Called by `detector` alone, on
every rank with the same numbers; no collective.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

from train.recovery.baseline import MIN_SIGMA, number, numbers, optional_integer

# Evidence of a step is its deviation less this: the noise of many steps must not add up to a spike.
_SLACK_SIGMA = 1.5
# A step is high, and can be part of a stretch, from here on.
HIGH_SIGMA = 2.0
# Flagged steps, for each of `persistence`, that make a spike of steps that are outliers only
# together; and as many if their peak is small.
_LASTING, _LASTING_SMALL = 4, 8
# The least peak that is worth a rollback: smaller ones are outliers, or slow.
LEAST_PEAK = math.log(1.09)
# A loss this many times the level (or, before there is one, the lowest) is absurd: no new data.
ABSURD = math.log(2.0)
# A plateau's newest half may lie above its older half by so many standard errors.
_RISING_SIGNIFICANCE = 3.0
# What an outlier leaves behind: the mean deviation after it in standard errors, each step clipped.
_TRACE_SIGNIFICANCE, _TRACE_CLIP = 4.75, 3.0
_EPSILON = 1e-9


class Stretch:
    """Steps that are not calm, from the first high one on, and the evidence that they gather.

    Page's cumulative sum (Biometrika 41, 1954) of deviations less a slack, no step adding more than
    an outlier's worth: `evidence` of all steps, `since_outlier` from the first outlier on. A step
    whose gradient norm is outside its band too pays no slack.
    """

    def __init__(self, threshold: float, persistence: int) -> None:
        self._threshold, self._persistence = threshold, persistence
        self._slack = min(_SLACK_SIGMA, threshold / 2)
        self._worth = threshold - self._slack
        self._spike = (persistence - 0.5) * self._worth - _EPSILON
        self.clear()

    def clear(self) -> None:
        """End the stretch."""
        self.onset_step: int | None = None
        self.evidence = self.since_outlier = self.peak = 0.0
        self.num_steps = self.num_calm = self.num_confirmed = self.num_flagged = 0
        self.num_since_outlier = 0
        self.are_norms_calm = True
        self.logs: list[float] = []
        self.led_by, self.lead_steps = "loss", 0

    def add(
        self, step: int, deviation: float, rise: float, is_confirmed: bool, are_norms_calm: bool
    ) -> bool:
        """Add a step; return True if a stretch begins with it."""
        gain = min(deviation, self._threshold) - (0.0 if is_confirmed else self._slack)
        evidence = self.evidence + gain
        is_high = deviation > HIGH_SIGMA
        self.num_calm = 0 if is_high else self.num_calm + 1
        if evidence <= 0 or self.num_calm >= self._persistence + 2:
            if self.evidence > 0:
                self.clear()
            return False
        self.evidence = min(evidence, self._spike + self._worth)
        if self.since_outlier > 0 or deviation > self._threshold:
            total = max(0.0, self.since_outlier + gain)
            self.since_outlier = min(total, self._spike + self._worth)
            self.num_since_outlier = self.num_since_outlier + 1 if total > 0 else 0
        self.num_confirmed = self.num_confirmed + 1 if is_confirmed else 0
        self.peak = max(self.peak, rise)
        self.are_norms_calm = self.are_norms_calm and are_norms_calm
        begins = self.onset_step is None and is_high
        if begins:
            self.onset_step = step
        if self.onset_step is not None:
            self.num_steps += 1
        return begins

    def is_flagged(self, deviation: float) -> bool:
        """True if a step of this deviation, just added, is an outlier or worse."""
        return deviation > HIGH_SIGMA and self.evidence >= self._worth - _EPSILON

    @property
    def is_spike(self) -> bool:
        """True if the evidence is that of a spike."""
        if self.peak < LEAST_PEAK:
            return self.is_level(_LASTING_SMALL * self._persistence)
        has_stayed = self.num_since_outlier > self._persistence
        return (
            (has_stayed and self.since_outlier >= self._spike)
            or self.num_confirmed >= self._persistence
            or self.is_level(_LASTING * self._persistence)
        )

    def is_plateau(self, noise: float) -> bool:
        """True if this looks like another level: all norms calm, not absurd, rising no more."""
        if not self.are_norms_calm or self.peak > ABSURD:
            return False
        half = len(self.logs) // 2
        if half < self._persistence:
            return True
        rise = sum(self.logs[-half:]) - sum(self.logs[:half])
        return rise < _RISING_SIGNIFICANCE * noise * math.sqrt(2 * half)

    def flag(self, log_value: float, num_kept: int) -> None:
        """Count a flagged step, and keep the newest values for the level that they may be."""
        self.num_flagged += 1
        self.logs.append(log_value)
        del self.logs[:-num_kept]

    def is_level(self, num_steps: int) -> bool:
        """True after `num_steps` flagged steps, if they were most of the steps since the onset."""
        return self.num_flagged >= num_steps and 2 * self.num_flagged > self.num_steps

    def state_dict(self) -> dict[str, object]:
        """Return the state as JSON values."""
        return {
            "onset_step": self.onset_step,
            "evidence": self.evidence,
            "since_outlier": self.since_outlier,
            "num_since_outlier": self.num_since_outlier,
            "peak": self.peak,
            "num_steps": self.num_steps,
            "num_calm": self.num_calm,
            "num_confirmed": self.num_confirmed,
            "num_flagged": self.num_flagged,
            "are_norms_calm": self.are_norms_calm,
            "logs": list(self.logs),
            "led_by": self.led_by,
            "lead_steps": self.lead_steps,
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take up the state of another instance."""
        self.onset_step = optional_integer(state, "onset_step")
        self.evidence = number(state, "evidence")
        self.since_outlier = number(state, "since_outlier")
        self.num_since_outlier = int(number(state, "num_since_outlier"))
        self.peak = number(state, "peak")
        self.num_steps = int(number(state, "num_steps"))
        self.num_calm = int(number(state, "num_calm"))
        self.num_confirmed = int(number(state, "num_confirmed"))
        self.num_flagged = int(number(state, "num_flagged"))
        self.are_norms_calm = bool(state.get("are_norms_calm", True))
        self.logs = numbers(state, "logs")
        self.led_by = str(state.get("led_by", "loss"))
        self.lead_steps = int(number(state, "lead_steps"))


class Trace:
    """Whether the steps after an outlier stay above the level before it: a spike keeps something.

    The mean of `length / 2` to `length` steps, each clipped, must lie above the old level by
    several of its standard errors.
    """

    def __init__(self, length: int) -> None:
        self._length = length
        self.clear()

    def clear(self) -> None:
        """Look no further."""
        self.level: float | None = None
        self.onset_step = 0
        self._num_steps, self._total = 0, 0.0

    def start(self, onset_step: int, level: float) -> None:
        """Look for a trace of the outlier at `onset_step`, unless an older one is looked for."""
        if self.level is None:
            self.onset_step, self.level = onset_step, level

    def add(self, log_value: float, sigma: float) -> bool:
        """Add a calm step; return True if the trace is there, which ends it."""
        if self.level is None:
            return False
        self._num_steps += 1
        sigmas = (log_value - self.level) / sigma
        self._total += max(-_TRACE_CLIP, min(_TRACE_CLIP, sigmas))
        is_kept = self._total > _TRACE_SIGNIFICANCE * math.sqrt(self._num_steps)
        is_found = is_kept and 2 * self._num_steps >= self._length
        if is_found or self._num_steps >= self._length:
            self.level, self._num_steps, self._total = None, 0, 0.0
        return is_found

    def state_dict(self) -> dict[str, object]:
        """Return the state as JSON values."""
        return {
            "level": self.level,
            "onset_step": self.onset_step,
            "num_steps": self._num_steps,
            "total": self._total,
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take up the state of another instance."""
        self.level = None if state.get("level") is None else number(state, "level")
        self.onset_step = int(number(state, "onset_step"))
        self._num_steps = int(number(state, "num_steps"))
        self._total = number(state, "total")


# A slow rise: the newest eight blocks against the best eight in a row among the last 64.
_RECENT_BLOCKS, _KNOWN_BLOCKS = 8, 64
# The least rise of the log loss that is worth a word, and its least size in the run's noise.
_LEAST_RISE, _LEAST_RISE_SIGMA = 0.03, 0.5
_SUSPECT_SIGNIFICANCE, _DIVERGENCE_SIGNIFICANCE = 3.0, 6.0
# How much better a bend must fit than a step: three of its standard deviations, squared.
_RISING_GAIN = 9.0
# The median difference of two normal values, in standard deviations of one.
_DIFFERENCE_TO_SIGMA = 1.4826 / math.sqrt(2)


class SlowRise:
    """A long-window test for a loss that creeps up inside its own band.

    Accepted values are averaged in blocks. The rise is the mean of the newest blocks over the
    lowest mean of as many older ones, and its significance is in standard errors by the run's own
    noise of such blocks, taken from successive differences, which a trend hardly touches. It is a
    divergence if it goes on: if a line that bends upwards fits it better than a step does.
    """

    def __init__(self, block: int) -> None:
        self._block = block
        self.reset()

    def reset(self) -> None:
        """Forget everything: the level is a new one."""
        self._means: list[float] = []
        self._steps: list[int] = []
        self._sum, self._count, self._first_step = 0.0, 0, 0
        self.significance = 0.0
        self.onset_step = 0
        self.is_rising, self.num_level = False, 0

    @property
    def is_divergence(self) -> bool:
        """True if the rise is beyond doubt and goes on."""
        return self.significance >= _DIVERGENCE_SIGNIFICANCE and self.is_rising

    def is_level(self, num_steps: int) -> bool:
        """True if the rise is beyond doubt, but was a step so many accepted values ago."""
        is_known = self.significance >= _DIVERGENCE_SIGNIFICANCE
        return is_known and self._block * self.num_level >= num_steps

    @property
    def is_suspect(self) -> bool:
        """True at the end of a block that makes a rise likely which goes on."""
        is_likely = self.significance >= _SUSPECT_SIGNIFICANCE and not self.num_level
        return self._count == 0 and is_likely

    def accept(self, step: int, log_value: float, noise: float) -> None:
        """Take a value in; at the end of a block, test."""
        if self._count == 0:
            self._first_step = step
        self._sum += log_value
        self._count += 1
        if self._count < self._block:
            return
        self._means.append(self._sum / self._count)
        self._steps.append(self._first_step)
        self._sum, self._count = 0.0, 0
        del self._means[:-_KNOWN_BLOCKS], self._steps[:-_KNOWN_BLOCKS]
        self.significance = self._test(noise)

    def _test(self, noise: float) -> float:
        means, width = self._means, _RECENT_BLOCKS
        count = len(means)
        if count < 2 * width + 2:
            return 0.0
        lowest = total = sum(means[:width])
        end_of_lowest = width
        for end in range(width + 1, count - width + 1):
            total += means[end - 1] - means[end - 1 - width]
            if total < lowest:
                lowest, end_of_lowest = total, end
        rise = (sum(means[-width:]) - lowest) / width
        self.is_rising, self.num_level = False, 0
        if rise < max(_LEAST_RISE, _LEAST_RISE_SIGMA * noise):
            return 0.0
        self.onset_step = self._steps[end_of_lowest]
        moves = [abs(after - before) for before, after in itertools.pairwise(means)]
        spread = max(_median(moves), _median(moves[-width:])) * _DIFFERENCE_TO_SIGMA
        spread = max(spread, MIN_SIGMA / self._block)
        significance = rise / spread / math.sqrt(2 / width)
        if significance >= _SUSPECT_SIGNIFICANCE:
            bend, step, length = _bend_and_step(means[end_of_lowest - width :])
            self.is_rising = bend - step > _RISING_GAIN * spread**2
            self.num_level = length if step > bend else 0
        return significance

    def state_dict(self) -> dict[str, object]:
        """Return the state as JSON values."""
        return {
            "means": list(self._means),
            "steps": list(self._steps),
            "sum": self._sum,
            "count": self._count,
            "first_step": self._first_step,
            "significance": self.significance,
            "onset_step": self.onset_step,
            "is_rising": self.is_rising,
            "num_level": self.num_level,
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take up the state of another instance."""
        self.is_rising = bool(state.get("is_rising"))
        self.num_level = int(number(state, "num_level"))
        self._means = numbers(state, "means")
        self._steps = [int(step) for step in numbers(state, "steps")]
        self._sum = number(state, "sum")
        self._count = int(number(state, "count"))
        self._first_step = int(number(state, "first_step"))
        self.significance = number(state, "significance")
        self.onset_step = int(number(state, "onset_step"))


def _bend_and_step(values: Sequence[float]) -> tuple[float, float, int]:
    """Return the squares that a rise to the end explains, and a step up, and the step's length.

    Least squares: a flat line that bends somewhere and rises from there, or steps up somewhere.
    """
    total = len(values)
    best_step = best_bend = 0.0
    length = 0
    mean = sum(values) / total
    newest = weighted = 0.0  # sums over the newest values, of them and with the ramp's weights
    for count in range(1, total):
        newest += values[-count] - mean
        weighted += newest  # the ramp is `count` at the newest value, 1 at the first of them
        explained = newest * newest * total / (count * (total - count))
        if newest > 0 and explained > best_step:
            best_step, length = explained, count
        ramp = count * (count + 1) / 2
        ramp_squares = ramp * (2 * count + 1) / 3 - ramp * ramp / total
        if weighted > 0:
            best_bend = max(best_bend, weighted * weighted / ramp_squares)
    return best_bend, best_step, length


def _median(values: Iterable[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]
