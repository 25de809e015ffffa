"""What share of the samples each source of a mixture has, and how many of them are due by when.

All in exact fractions. `SharePath` follows stages, ramps between them and sources that run out of
epochs, and says for each sample of a source from when to when it may come. `train.data.mixture`
puts the samples in their places. Refuses to know what a sample is.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from train.errors import DataError

# Shares repeat after at most so many samples, which bounds what a mixture keeps in memory.
MAX_DENOMINATOR = 65_536
# Of the steps of a ramp: what rounding leaves over goes into the next step.
_RAMP_DENOMINATOR = 1024
NUM_RAMP_STEPS = 32
# Below this, an error of a share is not worth a longer period.
_SAME = 1e-9
NEVER = 2**55

Shares = tuple[Fraction, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureStage:
    """From `start_index` of the global order on, sources have these weights.

    `weights`: one a source, relative to each other; 0 pauses a source. `ramp_indices`: the shares
    go from those before to these in a straight line of so many indices, in 32 steps. `known_from`:
    the index from which on the mixture prepares for the stage; a stage that is added to a run under
    way gets the run's cursor, so that what was read before stays as it was.
    """

    start_index: int
    weights: tuple[float | Fraction, ...]
    ramp_indices: int = 0
    known_from: int = 0


@cache
def rational_shares(weights: tuple[float | Fraction, ...]) -> Shares:
    """Return the shares of `weights` as fractions of one denominator, at most `MAX_DENOMINATOR`.

    Exact if there is such a denominator, as for weights like 0.7, 0.2, 0.1. Otherwise the one with
    the smallest largest error: below 1 / 65,536, and far below for few sources.

    Raises: DataError if the weights have no sum, or one is too small to be told from none.
    """
    wanted = [
        Fraction(weight if isinstance(weight, Fraction) else str(weight))
        for weight in weights
        if math.isfinite(weight) and weight >= 0
    ]
    if len(wanted) < len(weights) or not any(wanted):
        raise DataError(
            "a mixture needs weights of at least 0, one of them more, found "
            f"{', '.join(map(str, weights))}; correct data.sources.NAME.weight or data.stages"
        )
    total = sum(wanted)
    shares = tuple(weight / total for weight in wanted)
    if math.lcm(*(share.denominator for share in shares)) <= MAX_DENOMINATOR:
        return shares
    exact = np.array([float(share) for share in shares])
    denominators = np.arange(1, MAX_DENOMINATOR + 1)
    scaled = denominators[:, None] * exact
    numerators = np.rint(scaled)
    errors = np.abs(scaled - numerators).max(axis=1) / denominators
    is_usable = (numerators.sum(axis=1) == denominators) & ((numerators > 0) == (exact > 0)).all(
        axis=1
    )
    if not is_usable.any():
        smallest = min(share for share in shares if share > 0)
        given = ", ".join(f"{float(weight):g}" for weight in weights)
        raise DataError(
            f"of weights {given} the smallest is {float(smallest):.2g} of the whole, which is none "
            f"in fractions of at most {MAX_DENOMINATOR}; raise it, or set it to 0 "
            "(data.sources.NAME.weight, data.stages)"
        )
    errors = np.where(is_usable, errors, np.inf)
    best = int(np.flatnonzero(errors <= errors.min() + _SAME)[0])
    return tuple(Fraction(int(number), best + 1) for number in numerators[best])


def steps_of(stages: Sequence[MixtureStage]) -> list[tuple[int, Shares]]:
    """Return (first index, shares) of each stretch of constant shares, ramps cut into steps.

    Raises: DataError if the stages do not follow one another.
    """
    steps: list[tuple[int, Shares]] = []
    for number, stage in enumerate(stages):
        earliest = 0 if number == 0 else stages[number - 1].start_index + 1
        if number > 0:
            earliest = max(earliest, steps[-1][0])
        is_first_at_0 = number > 0 or (stage.start_index, stage.ramp_indices) == (0, 0)
        if stage.start_index < earliest or not is_first_at_0 or stage.ramp_indices < 0:
            raise DataError(
                "the stages of a mixture follow one another, the first at 0 without a ramp, each "
                f"after the ramp before it; found stage {number} at index {stage.start_index} with "
                f"a ramp of {stage.ramp_indices}, expected at least {earliest}; correct data.stages"
            )
        if not 0 <= stage.known_from <= stage.start_index:
            raise DataError(
                f"a stage is known before it starts: stage {number} starts at {stage.start_index} "
                f"and is known from {stage.known_from} on"
            )
        shares = rational_shares(stage.weights)
        if stage.ramp_indices:
            steps += _ramp(steps[-1][1], shares, stage.start_index, stage.ramp_indices)
        steps.append((stage.start_index + stage.ramp_indices, shares))
    return steps


def _ramp(before: Shares, after: Shares, start: int, length: int) -> list[tuple[int, Shares]]:
    num_steps = min(NUM_RAMP_STEPS, length)
    steps = []
    owed = [Fraction(0)] * len(before)
    for number in range(num_steps):
        way = Fraction(2 * number + 1, 2 * num_steps)
        owed = [
            rest + old + way * (new - old)
            for rest, old, new in zip(owed, before, after, strict=True)
        ]
        shares = _rounded(owed)
        owed = [rest - share for rest, share in zip(owed, shares, strict=True)]
        steps.append((start + length * number // num_steps, shares))
    return steps


def _rounded(wanted: Sequence[Fraction]) -> Shares:
    """Round down to fractions of the ramp's denominator; the largest remainders are rounded up."""
    numerators = [max(0, math.floor(share * _RAMP_DENOMINATOR)) for share in wanted]
    remainders = [
        share * _RAMP_DENOMINATOR - n for share, n in zip(wanted, numerators, strict=True)
    ]
    by_remainder = sorted(range(len(wanted)), key=lambda at: (-remainders[at], at))
    missing = _RAMP_DENOMINATOR - sum(numerators)
    for at in by_remainder[: max(0, missing)]:
        numerators[at] += 1
    for at in by_remainder[::-1]:
        given_up = min(numerators[at], max(0, sum(numerators) - _RAMP_DENOMINATOR))
        numerators[at] -= given_up
    return tuple(Fraction(number, _RAMP_DENOMINATOR) for number in numerators)


@dataclass(frozen=True, slots=True)
class Segment:
    """Indices `[start, stop)` of constant shares; `due`: samples that were due before them."""

    start: int
    stop: int | None
    due: Shares
    shares: Shares

    @property
    def period(self) -> int:
        """After how many samples the shares come out even."""
        return math.lcm(*(share.denominator for share in self.shares))

    def due_at(self, index: int, source: int) -> Fraction:
        """Return how many samples of `source` are due before `index`."""
        return self.due[source] + (index - self.start) * self.shares[source]


class SharePath:
    """How many samples of each source are due at every index from `start` on.

    `steps`: as of `steps_of`; the one in force at `start` comes first. `due`: samples due before
    `start`. `limits`: how many samples a source has to give, None: endless. One that has given them
    leaves its share to the others. `end`: the index behind the last, once no source is left.
    """

    def __init__(
        self,
        steps: Sequence[tuple[int, Shares]],
        *,
        limits: Sequence[int | None],
        start: int,
        due: Shares,
    ) -> None:
        self.num_sources = len(due)
        self.start = start
        self.exhausted: list[int] = []
        bends = self._bends(steps, limits, Fraction(start), due)
        self.end = None if bends[-1][2] else math.floor(bends[-1][0])
        self.segments = self._segments(bends)
        self._starts = [segment.start for segment in self.segments]

    def _bends(
        self,
        steps: Sequence[tuple[int, Shares]],
        limits: Sequence[int | None],
        time: Fraction,
        due: Shares,
    ) -> list[tuple[Fraction, Shares, Shares]]:
        """Return (time, due, shares) wherever shares change, time being a fraction of indices.

        The last one has no shares if nothing is left.
        """
        bends: list[tuple[Fraction, Shares, Shares]] = []
        stops = [Fraction(start) for start, _ in steps[1:]]
        for (_, wanted), stop in zip(steps, [*stops, None], strict=True):
            while stop is None or time < stop:
                left = [
                    share if limit is None or done < limit else Fraction(0)
                    for share, limit, done in zip(wanted, limits, due, strict=True)
                ]
                total = sum(left, Fraction(0))
                if total == 0:
                    return [*bends, (time, due, ())]
                shares = tuple(share / total for share in left)
                bends.append((time, due, shares))
                ends = [
                    time + (limit - done) / share
                    for share, limit, done in zip(shares, limits, due, strict=True)
                    if limit is not None and share > 0
                ]
                until = min([*ends, *([] if stop is None else [stop])], default=None)
                if until is None:
                    return bends
                due = tuple(d + (until - time) * s for d, s in zip(due, shares, strict=True))
                self.exhausted += [math.ceil(end) for end in ends if end == until]
                time = until
        return bends

    def _segments(self, bends: list[tuple[Fraction, Shares, Shares]]) -> list[Segment]:
        """Return the path between whole indices; one in which shares change has those between."""
        knots = sorted({at for time, _, _ in bends for at in (math.floor(time), math.ceil(time))})
        if self.end is not None:
            knots = [knot for knot in knots if knot <= self.end]
        dues, at = [], 0
        for knot in knots:
            while at + 1 < len(bends) and bends[at + 1][0] <= knot:
                at += 1
            time, due, shares = bends[at]
            dues.append(
                tuple(d + (knot - time) * s for d, s in zip(due, shares, strict=True))
                if shares
                else due
            )
        segments = [
            Segment(
                start,
                stop,
                before,
                tuple((b - a) / (stop - start) for a, b in zip(before, after, strict=True)),
            )
            for (start, before), (stop, after) in pairwise(zip(knots, dues, strict=True))
        ]
        if bends[-1][2]:
            segments.append(Segment(knots[-1], None, dues[-1], bends[-1][2]))
        return segments

    def segment_at(self, index: int) -> Segment:
        """Return the segment that holds `index`, which lies at or behind the path's start."""
        return self.segments[bisect_right(self._starts, index) - 1]

    def due_at(self, index: int) -> Shares:
        """Return how many samples of each source are due before `index`."""
        segment = self.segment_at(index)
        return tuple(segment.due_at(index, source) for source in range(len(segment.due)))

    def windows(
        self, source: int, start: int, stop: int, count: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return from and to when the samples of `source` may come that can come before `stop`.

        `count`: how many came before `start`. The k-th may come once more than k - 1 are due, and
        has to by the time that k are: as index + 1, relative to `start`, at most `NEVER`.
        """
        at = bisect_right(self._starts, start) - 1
        due = self.segments[at].due_at(start, source)
        last = math.ceil(self.segment_at(stop - 1).due_at(stop, source))
        releases = [np.ones(math.ceil(due) - count, dtype=np.int64)]
        deadlines = [np.zeros(max(0, math.floor(due) - count), dtype=np.int64)]
        number = math.floor(due)
        num_early = max(0, count - number)
        for segment in self.segments[at:]:
            first = max(segment.start, start)
            if number >= last:
                break
            due, share = segment.due_at(first, source), segment.shares[source]
            after = Fraction(last) if share else due
            if segment.stop is not None:
                after = min(after, segment.due_at(segment.stop, source))
            is_short = segment.stop is not None and segment.stop - first == 1
            released, dead = (_short if is_short else _crossings)(due, after, share)
            releases.append(released + (first - start))
            deadlines.append(dead + (first - start))
            number = math.floor(after)
        all_deadlines = np.concatenate([*deadlines, np.full(max(0, last - number), NEVER)])
        return np.concatenate(releases)[: last - count], all_deadlines[num_early:]


def _short(
    due: Fraction, after: Fraction, _: Fraction
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the crossings of one index, whose shares may have denominators past 64 bits."""
    num_released = max(0, math.ceil(after) - math.ceil(due))
    num_dead = max(0, math.floor(after) - math.floor(due))
    return np.ones(num_released, dtype=np.int64), np.ones(num_dead, dtype=np.int64)


def _crossings(
    due: Fraction, after: Fraction, share: Fraction
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return after how many indices whole numbers, from `due` to `after`, are passed and reached.

    With share = m / D: due + n m / D > k first at n = floor((k - due) D / m) + 1, and >= k first at
    n = ceil((k - due) D / m). Only whole parts count, so due D is rounded to the side that keeps
    them: all is in 64 bits, and exact.
    """
    numerator, denominator = share.numerator, share.denominator
    base = math.floor(due)
    rest = (due - base) * denominator
    passed = np.arange(math.ceil(due) - base, math.ceil(after) - base, dtype=np.int64)
    reached = np.arange(1, math.floor(after) - base + 1, dtype=np.int64)
    if numerator == 0:  # and so `due` is `after`
        return passed, reached
    return (
        (passed * denominator - math.ceil(rest)) // numerator + 1,
        -((math.floor(rest) - reached * denominator) // numerator),
    )
