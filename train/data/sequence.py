"""The run's sequence: the global order, in which skipped samples can be put back later on.

Cursor, skip ledger and ranges count positions of the sequence; sources count indices of the order.
Without returns the two are the same. Owns the way from one to the other. Refuses to know what is
skipped: that is the ledger's, and whether a return makes sense is for whoever asks for it.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt


class Returns:
    """Samples that stand in the sequence a second time, since they were skipped the first time.

    A return (position, start, stop) says: at positions `[position, position + stop - start)` the
    samples of positions `[start, stop)` come again; the order goes on around it. Nothing before
    `position` changes, and no other return moves, but what stood at it or after it does, so it must
    not lie before the cursor of any state that is still in use. `version` is raised by each return.
    """

    def __init__(self, entries: Iterable[tuple[int, int, int]] = ()) -> None:
        self.version = 0
        self._entries: list[tuple[int, int, int]] = []
        # The sequence in pieces: from `_starts[i]` on, index = position + `_shifts[i]`.
        self._starts = np.zeros(1, dtype=np.int64)
        self._shifts = np.zeros(1, dtype=np.int64)
        for position, start, stop in entries:
            self.insert(position, start, stop)

    def insert(self, position: int, start: int, stop: int) -> None:
        """Put the samples at positions `[start, stop)` back at `position`; twice does it once.

        Raises: ValueError if `position` lies before `stop`, where another return stands, or a
        sample would be put back a second time (if it was skipped again, its younger position is
        the one to put back).
        """
        if not 0 <= start <= stop <= position:
            raise ValueError(
                f"a return needs 0 <= start <= stop <= position, found [{start}, {stop}) at "
                f"position {position}; only what lies behind the cursor can be put back"
            )
        if start == stop or (position, start, stop) in self._entries:
            return
        for old_position, old_start, old_stop in self._entries:
            if start < old_stop and old_start < stop:
                raise ValueError(
                    f"of the samples [{start}, {stop}), [{max(start, old_start)}, "
                    f"{min(stop, old_stop)}) are back already, from position "
                    f"{old_position + max(start, old_start) - old_start} on; leave them out"
                )
        for taken_start, taken_stop in self.places():
            if position < taken_stop and taken_start < position + stop - start:
                raise ValueError(
                    f"a return at position {position} would overlap the one at [{taken_start}, "
                    f"{taken_stop}); put [{start}, {stop}) back beside it"
                )
        self._entries = sorted([*self._entries, (position, start, stop)])
        self.version += 1
        self._rebuild()

    @property
    def end(self) -> int:
        """The position after the last return, 0 if there is none."""
        return int(self._starts[-1])

    def places(self) -> list[tuple[int, int]]:
        """Return the positions `[start, stop)` that returns take up, in order."""
        return [(at, at + stop - start) for at, start, stop in self._entries]

    def _rebuild(self) -> None:
        self._starts = np.zeros(1, dtype=np.int64)
        self._shifts = np.zeros(1, dtype=np.int64)
        for position, start, stop in self._entries:
            distance = position - start
            first = int(np.searchsorted(self._starts, start, side="right")) - 1
            last = int(np.searchsorted(self._starts, stop, side="left"))
            again = np.maximum(self._starts[first:last], start) + distance
            self._starts = np.concatenate([self._starts, again, [position + stop - start]])
            rest = self._shifts[-1] - (stop - start)
            self._shifts = np.concatenate(
                [self._shifts, self._shifts[first:last] - distance, np.atleast_1d(rest)]
            )

    def resolve(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the indices of the order, int64 [n], at `positions`, int64 [n], each at least 0.

        With no returns it is `positions` itself, not a copy.
        """
        if not self._entries:
            return positions
        pieces = np.searchsorted(self._starts, positions, side="right") - 1
        indices: npt.NDArray[np.int64] = positions + self._shifts[pieces]
        return indices

    def entries(self) -> list[tuple[int, int, int]]:
        """Return (position, start, stop) of each return by position, as JSON values."""
        return list(self._entries)

    def num_samples(self) -> int:
        """Return how many samples are put back in all."""
        return sum(stop - start for _, start, stop in self._entries)
