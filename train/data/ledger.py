"""The skip ledger: at which positions of the run's sequence nothing is trained on.

A position is an index of the global order, unless samples were put back before it: see
`train.data.sequence`. Disjoint ranges in order, with the number of positions left before each:
finding the next samples costs O(log ranges), whatever the distance; adding ranges costs
O(all ranges), once for all that are added together. Nothing that is skipped is ever read.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from train.state import BatchRange


@dataclass(frozen=True, slots=True)
class _Ranges:
    """The ranges at one version. Lists, since `bisect` takes a tenth of `numpy.searchsorted`.

    `num_left[i]`: positions before range i that are not skipped; no two are the same.
    `num_skipped[i]`: positions that the ranges before i skip; one entry more than ranges.
    """

    version: int
    starts: list[int]
    stops: list[int]
    num_left: list[int]
    num_skipped: list[int]


class SkipLedger:
    """Union of skipped ranges, each `[start, stop)` in positions of the sequence.

    Ranges may be added while another thread reads: it sees all of an addition, or nothing.
    """

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self._ranges = _Ranges(0, [], [], [], [0])
        self.extend(ranges)

    def add(self, skip: BatchRange) -> None:
        """Skip `skip` from now on; ranges that touch or overlap are merged."""
        if not self.covers(skip):
            self._merge([(skip.start, skip.stop)])

    def extend(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Skip all of `ranges`, each `[start, stop)`, from now on.

        Raises: ValueError if one of them has not 0 <= start <= stop; then none is added.
        """
        added = [BatchRange(start=start, stop=stop) for start, stop in ranges]
        new = [(skip.start, skip.stop) for skip in added if not self.covers(skip)]
        if new:
            self._merge(new)

    def _merge(self, added: list[tuple[int, int]]) -> None:
        old = self._ranges
        starts, stops = np.array([*zip(old.starts, old.stops, strict=True), *added]).T
        order = np.argsort(starts, kind="stable")
        starts, stops = starts[order], np.maximum.accumulate(stops[order])
        is_apart = starts[1:] > stops[:-1]
        starts, stops = starts[np.append(True, is_apart)], stops[np.append(is_apart, True)]
        num_skipped = np.concatenate([[0], np.cumsum(stops - starts)])
        self._ranges = _Ranges(
            version=old.version + 1,
            starts=starts.tolist(),
            stops=stops.tolist(),
            num_left=(starts - num_skipped[:-1]).tolist(),
            num_skipped=num_skipped.tolist(),
        )

    @property
    def version(self) -> int:
        """A number that is raised whenever what is skipped changes; 0 if nothing was ever added."""
        return self._ranges.version

    def take(self, cursor: int, count: int) -> tuple[npt.NDArray[np.int64], int]:
        """Return the next `count` positions at or after `cursor`, and the cursor after them.

        Positions: int64, shape [count], increasing, none of them in a skipped range.
        """
        if count == 0:
            return np.empty(0, dtype=np.int64), self.advance(cursor, 0)
        ranges = self._ranges
        at = bisect_right(ranges.stops, cursor)
        if at == len(ranges.starts) or cursor + count <= ranges.starts[at]:
            return np.arange(cursor, cursor + count, dtype=np.int64), cursor + count
        first = _num_left_before(ranges, cursor)
        start = bisect_right(ranges.num_left, first)
        stop = bisect_right(ranges.num_left, first + count - 1)
        bounds = [first, *ranges.num_left[start:stop], first + count]
        shifts = np.repeat(
            np.array(ranges.num_skipped[start : stop + 1], dtype=np.int64), np.diff(bounds)
        )
        positions = np.arange(first, first + count, dtype=np.int64) + shifts
        return positions, int(positions[-1]) + 1

    def advance(self, cursor: int, count: int) -> int:
        """Return the cursor that `take` would return, for any `count`, without making indices."""
        ranges = self._ranges
        if count == 0:
            at = bisect_right(ranges.stops, cursor)
            is_inside = at < len(ranges.starts) and ranges.starts[at] <= cursor
            return ranges.stops[at] if is_inside else cursor
        last = _num_left_before(ranges, cursor) + count - 1
        return last + ranges.num_skipped[bisect_right(ranges.num_left, last)] + 1

    @property
    def end(self) -> int:
        """The position after the last skipped one, 0 if there is none."""
        ranges = self._ranges
        return ranges.stops[-1] if ranges.stops else 0

    def covers(self, positions: BatchRange) -> bool:
        """Return whether all of `positions` is skipped; an empty range is."""
        ranges = self._ranges
        at = bisect_right(ranges.stops, positions.start)
        is_inside = at < len(ranges.starts) and ranges.starts[at] <= positions.start
        return len(positions) == 0 or (is_inside and positions.stop <= ranges.stops[at])

    def ranges(self) -> list[tuple[int, int]]:
        """Return the disjoint ranges in order, as JSON values."""
        ranges = self._ranges
        return list(zip(ranges.starts, ranges.stops, strict=True))

    def num_samples(self) -> int:
        """Return how many samples are skipped in all."""
        return self._ranges.num_skipped[-1]

    def __contains__(self, position: int) -> bool:
        return self.covers(BatchRange(start=position, stop=position + 1))


def _num_left_before(ranges: _Ranges, cursor: int) -> int:
    """Return how many positions before `cursor` are not skipped."""
    at = bisect_right(ranges.stops, cursor)
    if at < len(ranges.starts) and ranges.starts[at] <= cursor:
        return ranges.num_left[at]
    return cursor - ranges.num_skipped[at]
