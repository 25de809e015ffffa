"""The held-out losses of a run, as its timeline has them: which of them count, and each source's.

Owns the reading of `evaluation` events, old ones without sources too, and one rule: an evaluation
counts if no rewind and no restart threw the state away that it measured. Refuses to draw. Called by
`figure` and `report`; needs the standard library alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from monitoring.records import Record, integer, number


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationPoint:
    """The held-out losses of one state, in nats a token; None where a loss is not finite.

    `is_kept`: False if a rewind threw the state away.
    """

    clock: int
    step: int
    loss_nats: float | None
    by_source: Mapping[str, float | None]
    is_kept: bool = True


Loss = tuple[EvaluationPoint, float | None]


def read_evaluations(events: Sequence[Record]) -> list[EvaluationPoint]:
    """The evaluations by clock, each clock once; those a rewind threw away are marked.

    What a restart from an older checkpoint threw away is left out, as its steps are: its clocks
    come again. `events` are in file order, which is the order in which things happened.
    """
    points: dict[int, EvaluationPoint] = {}
    restart_clock = rewind_step = math.inf
    for event in reversed(events):  # from the end, so that each one knows what came behind it
        kind = event.get("kind")
        clock, step = integer(event, "clock"), integer(event, "step")
        target = integer(event, "to_step") if kind == "rewind" else None
        if target is not None:
            rewind_step = min(rewind_step, target)
        if clock is None or step is None:
            continue
        if kind == "run_start":
            restart_clock = min(restart_clock, clock)
        if kind == "evaluation" and clock <= restart_clock and clock not in points:
            points[clock] = EvaluationPoint(
                clock=clock,
                step=step,
                loss_nats=number(event, "loss_nats"),
                by_source=_by_source(event),
                is_kept=step <= rewind_step,
            )
    return [points[clock] for clock in sorted(points)]


def source_names(points: Sequence[EvaluationPoint]) -> list[str]:
    """Every source that was ever evaluated, in the order of their first evaluation."""
    return list(dict.fromkeys(name for point in points for name in point.by_source))


def losses_of(points: Sequence[EvaluationPoint], name: str) -> list[Loss]:
    """A source's losses, each with its evaluation; without those that did not know the source."""
    return [(point, point.by_source[name]) for point in points if name in point.by_source]


def overall_losses(points: Sequence[EvaluationPoint]) -> list[Loss]:
    """The losses over the tokens of all sources, each with its evaluation."""
    return [(point, point.loss_nats) for point in points]


def _by_source(event: Record) -> dict[str, float | None]:
    losses = event.get("by_source")
    return {name: number(losses, name) for name in losses} if isinstance(losses, Mapping) else {}
