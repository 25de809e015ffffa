"""What the report's chart shows of recovery: lines, labels and markers where the run was touched.

Owns their shapes and words: a triangle to the left goes back, one to the right jumps ahead, a
circle was observed alone. Refuses colours, as `figure` does, which is the only caller.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from monitoring.incidents import in_words
from monitoring.records import Record, integer, number

Trace = dict[str, object]

_MAX_LONG_LABELS = 8
_RESTART_LABEL: Mapping[str, object] = {
    "text": "restart",
    "textposition": "end",
    "textangle": 0,
    "xanchor": "left",
    "yanchor": "top",
    "font": {"size": 11, "color": "@muted"},
}
# Name, symbol and colour of each kind of mark, in the legend's order.
_KINDS = (
    ("rewind", "triangle-left", "@bad"),
    ("skip ahead", "triangle-right", "@third"),
    ("put back", "triangle-down", "@good"),
    ("observed", "circle-open", "@second"),
    ("stop", "square", "@bad"),
)


def incident_traces(incidents: Sequence[Record], height: float) -> list[Trace]:
    """One trace of markers a kind, all at `height` of the loss axis; the hover tells the reason."""
    traces: list[Trace] = []
    for name, symbol, color in _KINDS:
        rows = [row for row in incidents if _kind(row) == name and _clock(row) is not None]
        if rows:
            line = {"color": color, "width": 1.5}
            marker = {"color": color, "size": 10, "symbol": symbol, "line": line}
            points = [(_clock(row), height) for row in rows]
            trace = markers(name, "y", points, marker, "%{text}")
            trace["text"] = [_hover(row) for row in rows]
            traces.append(trace)
    return traces


def rewind_marks(incidents: Sequence[Record], last_clock: int) -> tuple[list[Trace], list[Trace]]:
    """A dotted line and a label where a rewind began: shapes and annotations."""
    rewinds = [row for row in incidents if _kind(row) == "rewind"]
    is_short = len(rewinds) > _MAX_LONG_LABELS
    shapes: list[Trace] = []
    annotations: list[Trace] = []
    for order, row in enumerate(rewinds):
        clock = _clock(row)
        if clock is None:
            continue
        line = {"color": "@bad", "width": 1, "dash": "dot"}
        shapes.append(vertical(clock, clock) | {"type": "line", "line": line})
        is_left = clock < 0.72 * last_clock
        annotations.append(
            {
                "x": clock,
                "y": 0.985 - 0.075 * (order % 3),
                "xref": "x",
                "yref": "y domain",
                "text": _name(row) if is_short else f"{_name(row)}  {_way(row)}",
                "showarrow": False,
                "xanchor": "left" if is_left else "right",
                "yanchor": "top",
                "xshift": 4 if is_left else -4,
                "font": {"size": 11, "color": "@bad"},
                "bgcolor": "@panel",
            }
        )
    return shapes, annotations


def restart_marks(events: Sequence[Record]) -> list[Trace]:
    """A dashed line where a new process took the run up."""
    starts = [event for event in events if event.get("kind") == "run_start"]
    line = {"color": "@muted", "width": 1, "dash": "dash"}
    return [
        vertical(clock, clock) | {"type": "line", "line": line, "label": _RESTART_LABEL}
        for event in starts[1:]
        if (clock := integer(event, "clock")) is not None
    ]


def shade(first: int, last: int) -> Trace:
    """A tinted band over the clocks whose work was thrown away."""
    return vertical(first - 0.5, last + 0.5) | {
        "type": "rect",
        "fillcolor": "@shade",
        "line": {"width": 0},
        "layer": "below",
    }


def vertical(start: float, stop: float) -> Trace:
    """The extent of a shape over all panels, from clock `start` to `stop`."""
    return {"x0": start, "x1": stop, "y0": 0, "y1": 1, "xref": "x", "yref": "paper"}


def markers(
    name: str,
    axis: str,
    points: Sequence[tuple[int | None, float]],
    marker: Mapping[str, object],
    hover: str,
) -> Trace:
    """A trace of markers alone."""
    return {
        "x": [clock for clock, _ in points],
        "y": [value for _, value in points],
        "yaxis": axis,
        "name": name,
        "mode": "markers",
        "marker": dict(marker),
        "hovertemplate": hover,
    }


def plain_hover(text: str) -> str:
    """The text with plotly's own small HTML, of names and hover texts, made harmless."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _kind(row: Record) -> str:
    if row.get("state") == "observed":
        return "observed"
    if row.get("is_rewind"):
        return "rewind"
    return {"skip_ahead": "skip ahead", "unskip": "put back", "stop": "stop"}.get(
        str(row.get("rung")), ""
    )


def _clock(row: Record) -> int | None:
    """Where it was done: the clock goes on through a rewind."""
    clock = integer(row, "rewind_clock")
    return integer(row, "clock") if clock is None else clock


def _name(row: Record) -> str:
    """`#2 skip further, x 0.5`: incident, rung, and the learning rate's factor if it is cooled."""
    scale = number(row, "lr_scale")
    cooled = f" \u00d7 {scale:g}" if scale not in (None, 1.0) else ""
    return f"#{integer(row, 'incident')} {in_words(row.get('rung'))}".strip() + cooled


def _way(row: Record) -> str:
    start = _first(integer(row, "from_step"), integer(row, "detected_step"))
    stop = _first(integer(row, "to_step"), integer(row, "target_step"))
    return f"step {start} \u2192 {stop}"


def _first(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)


def _hover(row: Record) -> str:
    return f"{_name(row)}: {plain_hover(str(row.get('reason') or ''))[:160]}"
