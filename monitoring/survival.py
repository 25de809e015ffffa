"""Which executed steps are part of the final model: the work that no rewind or restart threw away.

Owns one rule, shared by the goodput and the report's shading. Refuses anything but records; needs
the standard library alone. Called by `goodput` and `figure`.
"""

from __future__ import annotations

from collections.abc import Sequence

from monitoring.records import Record, integer, number


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


def _pending_rewind(metrics: Sequence[Record], events: Sequence[Record]) -> int | None:
    last_time = max((number(record, "time") or 0.0 for record in metrics), default=0.0)
    targets = [
        integer(event, "to_step")
        for event in events
        if event.get("kind") == "rewind" and (number(event, "time") or 0.0) >= last_time
    ]
    return min((target for target in targets if target is not None), default=None)
