"""What is normal for a signal: its level, its noise, its slow trend. Numbers in, numbers out.

Owns the memory of the detector: sorted windows kept by insertion, so that a step costs microseconds.
Refuses verdicts, clocks, I/O and anything but the standard library. Called by `detector` alone.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Mapping, Sequence

# The interquartile range of normal noise, in standard deviations.
_QUARTILES_TO_SIGMA = 1 / 1.349
# A run's logged loss moves by at least this share from step to step; guards against zero noise.
MIN_SIGMA = 0.004


class SortedWindow:
    """The last `length` values, in order of arrival and of size."""

    __slots__ = ("arrivals", "ordered")

    def __init__(self, length: int) -> None:
        self.arrivals: deque[float] = deque(maxlen=length)
        self.ordered: list[float] = []

    def add(self, value: float) -> None:
        """Take a value in, and let the oldest go if the window is full."""
        ordered = self.ordered
        if len(ordered) == self.arrivals.maxlen:
            del ordered[bisect_left(ordered, self.arrivals[0])]
        self.arrivals.append(value)
        insort(ordered, value)

    def replace(self, values: Sequence[float]) -> None:
        """Forget everything and keep the newest of `values`."""
        self.arrivals.clear()
        self.arrivals.extend(values)
        self.ordered = sorted(self.arrivals)

    def median(self) -> float:
        """Middle of the values; the window must not be empty."""
        ordered = self.ordered
        middle = len(ordered) >> 1
        if len(ordered) & 1:
            return ordered[middle]
        return (ordered[middle - 1] + ordered[middle]) / 2


class RobustBaseline:
    """Level and noise of the log of one signal over its accepted values.

    The level is the median of the last `window` values, less the lag of that median: the median of
    the last `2 * window` residuals, as far as the signal falls. A rising signal is not extrapolated,
    so that a slow divergence is not taken for the trend. The noise is the interquartile range of the
    residuals, so a trend does not inflate it.
    """

    __slots__ = ("_residuals", "_values", "level", "num_accepted", "sigma")

    def __init__(self, window: int) -> None:
        self._values = SortedWindow(window)
        self._residuals = SortedWindow(2 * window)
        self.num_accepted = 0
        self.level = 0.0
        self.sigma = MIN_SIGMA

    def __len__(self) -> int:
        return len(self._values.ordered)

    @property
    def lowest(self) -> float:
        """Lowest value in the window, which must not be empty."""
        return self._values.ordered[0]

    def accept(self, log_value: float) -> None:
        """Let a value into the baseline."""
        values = self._values
        if values.ordered:
            self._residuals.add(log_value - values.median())
        values.add(log_value)
        self.num_accepted += 1
        self._refresh()

    def reanchor(self, log_values: Sequence[float]) -> None:
        """Forget the level and start from `log_values`, keeping the known noise."""
        self._values.replace(log_values)
        self._refresh()

    def _refresh(self) -> None:
        self.level = self._values.median()
        ordered = self._residuals.ordered
        count = len(ordered)
        if count >= 4:
            quarter = count >> 2
            spread = (ordered[-1 - quarter] - ordered[quarter]) * _QUARTILES_TO_SIGMA
            # Few residuals know their spread badly: 4 more than it seems at 16, none at 100.
            self.sigma = max(MIN_SIGMA, spread * (1 + 4 / count))
            self.level += min(0.0, self._residuals.median())

    def state_dict(self) -> dict[str, object]:
        """Return the state as JSON values."""
        return {
            "values": list(self._values.arrivals),
            "residuals": list(self._residuals.arrivals),
            "num_accepted": self.num_accepted,
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take up the state of another instance, the newest values that fit."""
        self._values.replace(state["values"])
        self._residuals.replace(state["residuals"])
        self.num_accepted = state["num_accepted"]
        self.level, self.sigma = 0.0, MIN_SIGMA
        if self._values.ordered:
            self._refresh()
