"""What is normal for a signal: its level, its noise, its slow trend. Numbers in, numbers out.

Owns the detector's memory: sorted windows kept by insertion, so that a step costs microseconds.
Refuses verdicts, clocks, I/O and everything but the standard library. Called by `detector` and
`evidence`, on every rank with the same numbers; no collective.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Mapping, Sequence

# The interquartile range of normal noise, in standard deviations. A sixth of it lies one down.
_QUARTILES = 1.349
# A run's logged loss moves by at least this share from step to step; guards against zero noise.
MIN_SIGMA = 0.004
# Quartiles of n residuals are trusted as if the noise were 1 + 8 / n times larger: the first 16
# steps of a run are its most changeable.
_FEW_RESIDUALS = 8
# Quartiles and sixths of one window scatter by a sixth: they count with a margin.
_MARGIN = 1.2
# A cumulative sum of falls, each clipped and less a slack, beyond which the noise is learnt anew:
# a loss that breaks out downwards is another regime.
_FALL_CLIP, _FALL_SLACK, _FALL_LIMIT = 6.0, 1.5, 20.0
# The extrapolated share of the fall between the two halves of the window: half a half-window is
# what the median of the newest half lags behind.
_LAG_SHARE = 0.5
_MAX_EXPONENT = 700.0


def exp(log_value: float) -> float:
    """Return e to the power of `log_value`, at most what a float holds."""
    return math.exp(min(log_value, _MAX_EXPONENT))


class SortedWindow:
    """The last `length` values, in order of arrival and of size."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.arrivals: deque[float] = deque()
        self.ordered: list[float] = []

    def add(self, value: float) -> float | None:
        """Take a value in; return the one that had to leave, if any."""
        arrivals, ordered = self.arrivals, self.ordered
        leaving = None
        if len(ordered) >= self.length:
            leaving = arrivals.popleft()
            del ordered[bisect_left(ordered, leaving)]
        arrivals.append(value)
        insort(ordered, value)
        return leaving

    def fill(self, values: Iterable[float]) -> None:
        """Forget everything and take the newest of `values`."""
        self.arrivals = deque(deque(values, maxlen=self.length))
        self.ordered = sorted(self.arrivals)

    def median(self) -> float:
        """Middle of the values; the window must not be empty."""
        ordered = self.ordered
        middle = len(ordered) >> 1
        if len(ordered) & 1:
            return ordered[middle]
        return (ordered[middle - 1] + ordered[middle]) / 2

    def spread(self) -> float:
        """Standard deviation by the quartiles; the window must not be empty."""
        ordered = self.ordered
        quarter = len(ordered) >> 2
        return (ordered[-1 - quarter] - ordered[quarter]) / _QUARTILES


class RobustBaseline:
    """Level and noise of the log of one signal over its accepted values.

    The level is the median of the newest half of the window, and where the signal falls, what that
    median lags behind. A rise is not extrapolated, or a slow divergence would pass for a trend.
    The noise is the spread of the residuals at acceptance, so that a trend does not inflate it. It
    is that of three windows, or the recent one's if smaller (training calms down), or that of
    recent swings *below* the level if larger: spikes go up, so what goes down is noise.
    """

    def __init__(self, window: int, floor: float = MIN_SIGMA) -> None:
        half = max(2, window // 2)
        self._newest, self._older = SortedWindow(half), SortedWindow(half)
        self._residuals, self._recent = SortedWindow(3 * window), SortedWindow(window)
        self._swings = SortedWindow(half)
        self.floor = floor
        self.num_accepted = 0
        self.level = 0.0
        self.sigma = self.noise = floor
        self.swing = self.fall = 0.0

    def __len__(self) -> int:
        return len(self._newest.ordered) + len(self._older.ordered)

    @property
    def lowest(self) -> float:
        """Lowest value in the window, which must not be empty."""
        older = self._older.ordered
        newest = self._newest.ordered[0]
        return min(newest, older[0]) if older else newest

    def observe(self, log_value: float) -> None:
        """Note how far any value, accepted or not, lies from the level."""
        swings, rise = self._swings, log_value - self.level
        fall = self.fall + min(-rise / self.noise, _FALL_CLIP) - _FALL_SLACK
        self.fall = fall if fall > 0 else 0.0
        if fall > _FALL_LIMIT:
            self.fall = 0.0
            self.forget_noise(2 * _FEW_RESIDUALS)
        swings.add(rise)
        ordered = swings.ordered
        if len(ordered) == swings.length:
            self.swing = -_MARGIN * ordered[len(ordered) // 6]
            self.noise = max(self.sigma, self.swing)

    def accept(self, log_value: float) -> None:
        """Let a value into the baseline."""
        if self.num_accepted:
            residual = log_value - self.level
            self._residuals.add(residual)
            self._recent.add(residual)
        self.num_accepted += 1
        leaving = self._newest.add(log_value)
        if leaving is not None:
            self._older.add(leaving)
        self._refresh()

    def reanchor(self, log_values: Sequence[float]) -> None:
        """Start from a new level; its noise too, if there are values enough to know it."""
        self._newest.fill(log_values)
        self._older.fill(())
        if len(log_values) >= 2 * _FEW_RESIDUALS:
            centre = self._newest.median()
            self._residuals.fill([value - centre for value in log_values])
            self._recent.fill(())
        self._swings.fill(())
        self.swing = 0.0
        self._refresh()

    def forget_noise(self, num_kept: int) -> None:
        """Keep the newest residuals alone: the run is not as noisy as it was."""
        self._residuals.fill(list(self._residuals.arrivals)[-num_kept:])
        self._recent.fill(())
        self._refresh()

    def _refresh(self) -> None:
        newest, older = self._newest, self._older
        self.level = level = newest.median()
        if 2 * len(older.ordered) >= older.length:
            fall = _LAG_SHARE * (level - older.median())
            if fall < 0:
                self.level = level + fall
        count = len(self._residuals.ordered)
        if count >= 4:
            spread = self._residuals.spread()
            recent = self._recent
            if len(recent.ordered) == recent.length:
                spread = min(spread, _MARGIN * recent.spread())
            self.sigma = max(self.floor, spread * (1 + _FEW_RESIDUALS / count))
            self.noise = max(self.sigma, self.swing)

    def state_dict(self) -> dict[str, object]:
        """Return the state as JSON values."""
        return {
            "newest": list(self._newest.arrivals),
            "older": list(self._older.arrivals),
            "residuals": list(self._residuals.arrivals),
            "recent": list(self._recent.arrivals),
            "swings": list(self._swings.arrivals),
            "num_accepted": self.num_accepted,
            "sigma": self.sigma,
            "swing": self.swing,
            "fall": self.fall,
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take up the state of another instance; of another window, the newest that fits."""
        self._newest.fill(numbers(state, "newest"))
        self._older.fill(numbers(state, "older"))
        self._residuals.fill(numbers(state, "residuals"))
        self._recent.fill(numbers(state, "recent"))
        self._swings.fill(numbers(state, "swings"))
        self.num_accepted = int(number(state, "num_accepted"))
        self.sigma = max(self.floor, number(state, "sigma"))
        self.swing = number(state, "swing")
        self.fall = number(state, "fall")
        self.level, self.noise = 0.0, max(self.sigma, self.swing)
        if self._newest.ordered:
            self._refresh()


def numbers(state: Mapping[str, object], key: str) -> list[float]:
    """Return the list of floats under `key`; none if it is missing."""
    values = state.get(key)
    return [float(value) for value in values] if isinstance(values, Sequence) else []


def number(state: Mapping[str, object], key: str) -> float:
    """Return the number under `key`; 0 if it is missing."""
    value = state.get(key)
    return value if isinstance(value, (int, float)) else 0


def optional_integer(state: Mapping[str, object], key: str) -> int | None:
    """Return the whole number under `key`; None if it is missing."""
    value = state.get(key)
    return int(value) if isinstance(value, (int, float)) else None


def part(state: Mapping[str, object], key: str) -> Mapping[str, object]:
    """Return the mapping under `key`; an empty one if it is missing."""
    value = state.get(key)
    return value if isinstance(value, Mapping) else {}
