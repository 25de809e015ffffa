"""Which executed steps are part of the final model, and of which the samples are gone for good.

Owns two rules, shared by the goodput and the report's shading. Refuses anything but records, and
their time stamps: steps, clocks and attempts say it all. Needs the standard library alone. Called
by `goodput` and `figure`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from monitoring.records import Record, integer, sample_range

Range = tuple[int, int]


def survivors(metrics: Sequence[Record], events: Sequence[Record]) -> list[bool]:
    """For each metrics record, in file order, whether its step is part of the final model.

    A step's work is thrown away when a later record has the same or a lower step (a rewind, or a
    restart from an older checkpoint), or when a rewind that nothing followed yet went below it.
    """
    survives = [False] * len(metrics)
    stack: list[tuple[int, int]] = []
    for index, record in enumerate(metrics):
        step = integer(record, "step")
        if step is None:
            continue
        while stack and stack[-1][1] >= step:
            survives[stack.pop()[0]] = False
        stack.append((index, step))
        survives[index] = True
    to_step = _pending_rewind(metrics, events)
    while to_step is not None and stack and stack[-1][1] > to_step:
        survives[stack.pop()[0]] = False
    return survives


def thrown_away(metrics: Sequence[Record], survives: Sequence[bool]) -> list[tuple[int, int]]:
    """The intervals of clocks, `(first, last)`, both included, whose work was thrown away."""
    intervals: list[tuple[int, int]] = []
    is_open = False
    for record, lives in zip(metrics, survives, strict=True):
        clock = integer(record, "clock")
        if clock is None:
            continue
        if lives:
            is_open = False
        elif is_open:
            intervals[-1] = (intervals[-1][0], clock)
        else:
            intervals.append((clock, clock))
            is_open = True
    return intervals


@dataclass(frozen=True, slots=True, kw_only=True)
class SkippedSamples:
    """What rewinds and operators took out of the data, without what was put back.

    `skips`: the (attempt, clock) at which each was decided, and its pieces, `[start, stop)` in
    positions.
    """

    skips: tuple[tuple[tuple[int, int], tuple[Range, ...]], ...]

    @classmethod
    def from_events(cls, events: Sequence[Record]) -> SkippedSamples:
        """Collect the `skip` and `returned` of a run's events."""
        returned: list[Range] = []
        for event in events:
            value = event.get("returned")
            if isinstance(value, list | tuple) and len(value) == 3:
                back = sample_range({"skip": list(value[1:])})
                returned += [back] if back is not None else []
        skips = []
        for event in events:
            skip = sample_range(event)
            if skip is not None and skip[0] < skip[1]:
                skips.append((age(event), tuple(_without(skip, returned))))
        return cls(skips=tuple(skips))

    def share_of(self, record: Record) -> float:
        """The share, 0 to 1, of a step's samples that were skipped after it had trained on them."""
        cursor, count = integer(record, "cursor"), integer(record, "batch_samples")
        if cursor is None or count is None or count <= 0:
            return 0.0
        start = cursor - count
        reached, num_gone = start, 0
        later = [piece for when, pieces in self.skips if when >= age(record) for piece in pieces]
        for first, stop in sorted(later):
            first, stop = max(first, reached), min(stop, cursor)
            num_gone += max(0, stop - first)
            reached = max(reached, stop)
        return num_gone / count


def age(record: Record) -> tuple[int, int]:
    """The attempt and the clock of a record, which order the records of a run."""
    return integer(record, "attempt") or 0, integer(record, "clock") or 0


def _without(skip: Range, returned: Sequence[Range]) -> list[Range]:
    """The pieces of a range that none of the others covers."""
    pieces = []
    start = skip[0]
    for first, stop in sorted(returned):
        if first < skip[1] and stop > start:
            pieces.append((start, first))
            start = stop
    pieces.append((start, skip[1]))
    return [piece for piece in pieces if piece[0] < piece[1]]


def _pending_rewind(metrics: Sequence[Record], events: Sequence[Record]) -> int | None:
    last = max((age(record) for record in metrics), default=(0, 0))
    targets = [
        integer(event, "to_step")
        for event in events
        if event.get("kind") == "rewind" and age(event) >= last
    ]
    return min((target for target in targets if target is not None), default=None)
