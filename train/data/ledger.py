"""The skip ledger: at which positions of the run's sequence nothing is trained on.

A position is an index of the global order, unless samples were put back before it: see
`train.data.sequence`. A sorted list of disjoint ranges: adding one and finding the next samples
cost O(log ranges + ranges touched), whatever the distance; nothing that is skipped is ever read.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from train.state import BatchRange


class SkipLedger:
    """Union of skipped ranges, each `[start, stop)` in positions of the sequence."""

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        for start, stop in ranges:
            self.add(BatchRange(start=start, stop=stop))

    def add(self, skip: BatchRange) -> None:
        """Skip `skip` from now on; ranges that touch or overlap are merged."""
        if len(skip) == 0:
            return
        first = bisect_right(self._stops, skip.start - 1)
        last = bisect_right(self._starts, skip.stop)
        start = min([skip.start, *self._starts[first : first + 1]]) if first < last else skip.start
        stop = max([skip.stop, *self._stops[last - 1 : last]]) if first < last else skip.stop
        self._starts[first:last] = [start]
        self._stops[first:last] = [stop]

    def take(self, cursor: int, count: int) -> tuple[npt.NDArray[np.int64], int]:
        """Return the next `count` positions at or after `cursor`, and the cursor after them.

        Positions: int64, shape [count], increasing, none of them in a skipped range.
        """
        pieces: list[npt.NDArray[np.int64]] = []
        position = bisect_right(self._stops, cursor)
        while count > 0:
            if position < len(self._starts) and self._starts[position] <= cursor:
                cursor = max(cursor, self._stops[position])
                position += 1
                continue
            room = count
            if position < len(self._starts):
                room = min(count, self._starts[position] - cursor)
            pieces.append(np.arange(cursor, cursor + room, dtype=np.int64))
            cursor += room
            count -= room
        return np.concatenate(pieces), cursor

    def advance(self, cursor: int, count: int) -> int:
        """Return the cursor that `take` would return, for any `count`, without making indices."""
        for start, stop in self.ranges()[bisect_right(self._stops, cursor) :]:
            if start > cursor:
                if count <= start - cursor:
                    break
                count -= start - cursor
            cursor = stop
        return cursor + count

    @property
    def end(self) -> int:
        """The position after the last skipped one, 0 if there is none."""
        return self._stops[-1] if self._stops else 0

    def covers(self, positions: BatchRange) -> bool:
        """Return whether all of `positions` is skipped; an empty range is."""
        at = bisect_right(self._stops, positions.start)
        is_inside = at < len(self._starts) and self._starts[at] <= positions.start
        return len(positions) == 0 or (is_inside and positions.stop <= self._stops[at])

    def ranges(self) -> list[tuple[int, int]]:
        """Return the disjoint ranges in order, as JSON values."""
        return list(zip(self._starts, self._stops, strict=True))

    def num_samples(self) -> int:
        """Return how many samples are skipped in all."""
        return sum(self._stops) - sum(self._starts)

    def __contains__(self, position: int) -> bool:
        return self.covers(BatchRange(start=position, stop=position + 1))
