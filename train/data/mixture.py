"""Which source stands at each index of the global order, and which of its own samples it gives.

Owns the merging of several endless orders into one. Refuses to know what a sample is and how a
source orders its own: a source's samples are numbered from 0, through all of its epochs. Called by
whoever reads tokens by index. A pure function of the index, found in O(log stages) at any distance.

**No source is ever a whole sample off.** After each n indices, the number of samples that a source
has given differs from its share, summed over those n indices, by less than 1, through stages, ramps
and exhaustion. The k-th sample of a source has a window: it may come once more than k - 1 are due,
and has to by the time that k are. In any stretch of indices no more windows lie than it has places,
since the shares sum to 1; so the earliest deadline first keeps all of them (Hall's theorem, and
Jackson 1955), and of what is released there is always one that waits. Inside a stage the pattern
repeats once what is ahead and behind does, and is kept once.

A stage that becomes known late (`MixtureStage.known_from`) can find too many sources behind at
once. Then none is ever a whole sample ahead, and what is due comes fewer indices late than there
are sources: so many samples are owed at most, since no more than one a source was given early.

Source: Tijdeman, "The chairman assignment problem", Discrete Math. 32 (1980); Baruah, Cohen,
Plaxton, Varvel, "Proportionate progress", Algorithmica 15 (1996), for windows and deadlines.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from train.data.blocks import BlockMemory, first_if_consecutive
from train.data.shares import MixtureStage, Segment, SharePath, Shares, steps_of
from train.errors import DataError

__all__ = ["Mixture", "MixtureStage"]

MAX_SOURCES = 64


@dataclass(frozen=True, slots=True)
class _Stretch:
    """A pattern of sources that repeats from `start` to where the next stretch starts.

    `sources` and `ranks`, [period]: the source at each place, and how many of its samples come
    before it in the pattern. `totals` [sources]: samples in one pattern; `given`: before `start`.
    """

    start: int
    sources: npt.NDArray[np.uint8]
    ranks: npt.NDArray[np.int32]
    totals: npt.NDArray[np.int64]
    given: npt.NDArray[np.int64]

    def locate(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return source and index within the source, int64 [2, n], of `indices` inside."""
        turns, places = np.divmod(indices - self.start, len(self.sources))
        found = np.empty((2, len(indices)), dtype=np.int64)
        found[0] = self.sources[places]
        found[1] = (self.given[found[0]] + turns * self.totals[found[0]]) + self.ranks[places]
        return found

    def given_before(self, index: int) -> npt.NDArray[np.int64]:
        """Return how many samples each source gave before `index`, inside or at the end."""
        turns, places = divmod(index - self.start, len(self.sources))
        rest = np.bincount(self.sources[:places], minlength=len(self.given))
        return self.given + turns * self.totals + rest


class Mixture:
    """Several sources as one endless sequence, by stages of weights.

    `num_samples`: of one epoch of each source. `max_epochs`: how many epochs a source gives at
    most, None: without end. One that has given them leaves its share to the others. `changes`: the
    indices at which shares change: stages and ends of ramps, and sources that run out.
    `num_indices`: where all sources with a weight have run out, None if that never is.
    """

    def __init__(
        self,
        stages: Sequence[MixtureStage],
        *,
        num_samples: Sequence[int],
        max_epochs: Sequence[float | None],
    ) -> None:
        _check_sizes(stages, num_samples, max_epochs)
        self._num_sources = len(num_samples)
        limits = [
            None if epochs is None else math.floor(Fraction(str(epochs)) * size)
            for epochs, size in zip(max_epochs, num_samples, strict=True)
        ]
        self._paths = _paths(stages, limits)
        self.num_indices = self._paths[-1].end
        self.changes = self._find_changes(stages)
        self._stretches = _Layer(self._num_sources).lay(self._paths)
        self._starts = [stretch.start for stretch in self._stretches]
        self._memory = BlockMemory(self._make_block)

    def locate(
        self, indices: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the sources, [n], at `indices`, int64 [n], and each one's own index, [n].

        Successive indices are cheap: they come from blocks that are kept. Any thread may call.

        Raises: DataError if all sources have run out before.
        """
        if indices.size == 0:
            return np.empty_like(indices), np.empty_like(indices)
        if self.num_indices is not None:
            self._refuse_behind_end(int(indices.max()))
        if self._num_sources == 1:
            return np.zeros_like(indices), indices.copy()
        first = first_if_consecutive(indices)
        if first is not None:
            sources, own = self._memory.read(first, len(indices))
            return sources, own
        numbers = np.searchsorted(self._starts, indices, side="right") - 1
        found = np.empty((2, len(indices)), dtype=np.int64)
        for number in np.unique(numbers):
            chosen = numbers == number
            found[:, chosen] = self._stretches[number].locate(indices[chosen])
        return found[0], found[1]

    def given_before(self, index: int) -> tuple[int, ...]:
        """Return how many samples each source gives before `index`.

        Two mixtures that agree in this go on from `index` without a sample lost or seen twice.

        Raises: DataError if all sources have run out before.
        """
        if index == 0:
            return (0,) * self._num_sources
        self._refuse_behind_end(index - 1)
        stretch = self._stretches[bisect_right(self._starts, index - 1) - 1]
        return tuple(stretch.given_before(index).tolist())

    def shares_at(self, index: int) -> Shares:
        """Return the share of each source at `index`: what was typed, or as near as a fraction of
        a denominator up to 65,536 comes to it, in a ramp of 1,024.

        Raises: DataError if all sources have run out before.
        """
        self._refuse_behind_end(index)
        path = next(path for path in reversed(self._paths) if path.start <= index)
        return path.segment_at(index).shares

    def _refuse_behind_end(self, index: int) -> None:
        if self.num_indices is not None and index >= self.num_indices:
            raise DataError(
                f"the mixture ends after {self.num_indices:,} samples, and sample {index:,} was "
                "asked for: every source that has a weight there has given its "
                "data.sources.NAME.max_epochs; raise one, add a source, or end the run before"
            )

    def _find_changes(self, stages: Sequence[MixtureStage]) -> tuple[int, ...]:
        found = {at for s in stages for at in (s.start_index, s.start_index + s.ramp_indices)}
        until: int | None = None
        for path in reversed(self._paths):
            found |= {at for at in path.exhausted if until is None or at <= until}
            until = path.start
        end = self.num_indices
        return tuple(sorted(at for at in found if at > 0 and (end is None or at < end)))

    def _make_block(self, first: int, count: int) -> npt.NDArray[np.int64]:
        stop = first + count if self.num_indices is None else min(first + count, self.num_indices)
        pieces = []
        number = bisect_right(self._starts, first) - 1
        for stretch, until in zip(
            self._stretches[number:], [*self._starts[number + 1 :], stop], strict=True
        ):
            indices = np.arange(max(first, stretch.start), min(until, stop), dtype=np.int64)
            pieces.append(stretch.locate(indices))
            if until >= stop:
                break
        # What lies behind the end of the mixture is refused before it is read.
        pieces.append(np.full((2, first + count - stop), -1, dtype=np.int64))
        return np.concatenate(pieces, axis=1)


class _Layer:
    """Lays the samples of sources along paths, the earliest deadline first."""

    def __init__(self, num_sources: int) -> None:
        self._position = self._kept_position = 0
        self._given = self._kept_given = np.zeros(num_sources, dtype=np.int64)
        self._stretches: list[_Stretch] = []

    def lay(self, paths: Sequence[SharePath]) -> list[_Stretch]:
        """Return the stretches of `paths`, each of which holds until the next one starts."""
        for path, until in zip(paths, [*(path.start for path in paths[1:]), None], strict=True):
            for segment in path.segments:
                if until is None or segment.start < until:
                    self._lay_segment(path, segment, until)
        return self._stretches

    def _lay_segment(self, path: SharePath, segment: Segment, until: int | None) -> None:
        """Lay the segment by repeating its pattern as long as nothing in it is due behind it."""
        stops = [stop for stop in (segment.stop, until) if stop is not None]
        lookahead = max(math.ceil(1 / share) for share in segment.shares if share > 0)
        steady_stops = [] if segment.stop is None else [segment.stop - lookahead]
        steady = min([*steady_stops, *([] if until is None else [until])], default=None)
        if steady is None or steady - self._position >= 2 * segment.period:
            self._repeat(path, segment, steady)
        if stops and self._position < min(stops):
            self._keep([self._run(path, min(stops))])

    def _repeat(self, path: SharePath, segment: Segment, stop: int | None) -> None:
        """Lay whole periods up to `stop`, and from when one begins as an earlier one did, all.

        The state between periods is which sources are ahead: there are finitely many, mostly the
        first comes again at once.
        """
        period = segment.period
        a_period = np.array([int(share * period) for share in segment.shares])
        begun_as: dict[tuple[int, ...], int] = {}
        runs: list[npt.NDArray[np.uint8]] = []
        while stop is None or self._position + period <= stop:
            state = tuple((self._given - len(runs) * a_period).tolist())
            if state in begun_as:
                self._keep(runs[: begun_as[state]])
                self._keep(runs[begun_as[state] :])
                if stop is not None:
                    self._position = self._kept_position = stop
                    self._given = self._kept_given = self._stretches[-1].given_before(stop)
                return
            begun_as[state] = len(runs)
            runs.append(self._run(path, self._position + period))
        self._keep(runs)

    def _keep(self, runs: list[npt.NDArray[np.uint8]]) -> None:
        """Keep `runs` as one stretch behind the ones that are kept."""
        if not runs:
            return
        sources = np.concatenate(runs)
        ranks = np.empty(len(sources), dtype=np.int32)
        for source in range(len(self._given)):
            places = np.flatnonzero(sources == source)
            ranks[places] = np.arange(len(places))
        totals = np.bincount(sources, minlength=len(self._given))
        self._stretches.append(
            _Stretch(self._kept_position, sources, ranks, totals, self._kept_given)
        )
        self._kept_position += len(sources)
        self._kept_given = self._kept_given + totals

    def _run(self, path: SharePath, stop: int) -> npt.NDArray[np.uint8]:
        """Return the sources at the indices up to `stop`, which becomes the position."""
        start, self._position = self._position, stop
        releases, keys = [], []
        for source, count in enumerate(self._given.tolist()):
            released, deadlines = path.windows(source, start, stop, count)
            releases.append(released)
            keys.append(deadlines * MAX_SOURCES + source)
        taken = _earliest_deadline_first(
            np.concatenate(releases), np.concatenate(keys), stop - start
        )
        sources = taken % MAX_SOURCES
        self._given = self._given + np.bincount(sources, minlength=len(self._given))
        return sources.astype(np.uint8)


def _earliest_deadline_first(
    releases: npt.NDArray[np.int64], keys: npt.NDArray[np.int64], num_places: int
) -> npt.NDArray[np.int64]:
    """Return the key at each place: the smallest of those that are released and not taken."""
    arriving = iter(keys[np.argsort(releases, kind="stable")].tolist())
    num_arriving = np.bincount(releases - 1, minlength=num_places).tolist()
    waiting: list[int] = []
    taken = []
    for number in num_arriving:
        for _ in range(number):
            heapq.heappush(waiting, next(arriving))
        taken.append(heapq.heappop(waiting))
    return np.array(taken, dtype=np.int64)


def _paths(stages: Sequence[MixtureStage], limits: Sequence[int | None]) -> list[SharePath]:
    """Return a path for each index at which the stages known become more, or until the end."""
    steps_of(stages)
    paths: list[SharePath] = []
    for start in sorted({stage.known_from for stage in stages}):
        steps = steps_of([stage for stage in stages if stage.known_from <= start])
        first = max(number for number, (at, _) in enumerate(steps) if at <= start)
        due: Shares = (Fraction(0),) * len(limits)
        if paths:
            end = paths[-1].end
            if end is not None and end <= start:
                break
            due = paths[-1].due_at(start)
        paths.append(SharePath(steps[first:], limits=limits, start=start, due=due))
    return paths


def _check_sizes(
    stages: Sequence[MixtureStage],
    num_samples: Sequence[int],
    max_epochs: Sequence[float | None],
) -> None:
    count = len(num_samples)
    if not 1 <= count <= MAX_SOURCES:
        raise DataError(
            f"data.sources holds {count} sources, a mixture has 1 to {MAX_SOURCES}; merge some"
        )
    if not stages:
        raise ValueError("a mixture needs at least one stage, found none")
    lengths = [len(max_epochs), *(len(stage.weights) for stage in stages)]
    if any(length != count for length in lengths):
        raise ValueError(f"{count} sources need a weight and max_epochs each, found {lengths}")
    empty = [number for number, size in enumerate(num_samples) if size < 1]
    if empty:
        raise ValueError(f"a source of a mixture needs at least one sample, found none in {empty}")
