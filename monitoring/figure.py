"""The report's chart as plain plotly JSON: loss, gradient norm, rate, throughput, data wait.

Owns what is drawn and how it is thinned. Refuses colours (every colour is a token such as "@bad"
that the page replaces for light or dark) and refuses to import plotly: the figure is data. Called
by `report` alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from monitoring.evaluations import (
    EvaluationPoint,
    Loss,
    losses_of,
    overall_losses,
    read_evaluations,
    source_names,
)
from monitoring.incidents import SPIKE_VERDICTS
from monitoring.marks import (
    Trace,
    incident_traces,
    markers,
    plain_hover,
    restart_marks,
    rewind_marks,
    shade,
)
from monitoring.records import Record, RunRecords, integer, number
from monitoring.survival import survivors, thrown_away
from monitoring.ticks import log_ticks

MAX_POINTS = 5_000
HEIGHT_PIXELS = 1040

_PANELS: Sequence[tuple[str, str, float, float]] = (
    ("y", "loss (nats)", 0.555, 1.0),
    ("y2", "gradient norm", 0.42, 0.515),
    ("y3", "learning rate", 0.28, 0.375),
    ("y4", "tokens per second", 0.14, 0.235),
    ("y5", "data wait (ms per step)", 0.0, 0.095),
)
_CLIP_FACTOR = 3.0
_LOG_RATIO = 3.0
_MAX_DOTTED_POINTS = 60
_SOURCE_COLORS = tuple(f"@source{number}" for number in range(1, 7))


def build_figure(run: RunRecords, incidents: Sequence[Record]) -> dict[str, object]:
    """The figure as JSON-ready `data` and `layout`; empty panels where nothing was recorded.

    `incidents` are the rows of `monitoring.incidents.collect_incidents`.
    """
    curve = run.curve
    lives = survivors(curve, run.events)
    losses = [number(record, "loss_nats") for record in curve]
    evaluations = read_evaluations(run.events)
    axis = _LossAxis(curve, lives, evaluations)
    chosen = decimate(losses, MAX_POINTS)
    picked = [curve[index] for index in chosen]
    traces = [
        *_loss_traces(picked, [lives[index] for index in chosen]),
        *_evaluation_traces(evaluations, axis),
        *_spike_traces(curve, axis),
        *incident_traces(incidents, axis.floor),
        *_series(curve, "grad_norm", "y2", "gradient norm", "@second"),
        *_vetoed_traces(curve),
        *_series(curve, "lr", "y3", "learning rate", "@third"),
        *_series(curve, "tokens_per_second", "y4", "tokens/s", "@good"),
        *_series(curve, "data_seconds", "y5", "data wait", "@muted", scale=1e3),
    ]
    last_clock = (integer(curve[-1], "clock") if curve else None) or 1
    shapes, annotations = rewind_marks(incidents, last_clock)
    shapes += restart_marks(run.events)
    shapes += [shade(first, last) for first, last in thrown_away(curve, lives)]
    layout = _layout(axis) | _norm_axis(curve)
    layout["shapes"] = shapes
    layout["annotations"] = _titles() + annotations
    return {"data": traces, "layout": layout}


def decimate(values: Sequence[float | None], limit: int) -> list[int]:
    """Indices of at most `limit` points that keep the ends and every bucket's lowest and highest.

    A bucket of Nones alone keeps its first, so that a gap stays a gap.
    """
    count = len(values)
    if count <= limit:
        return list(range(count))
    num_buckets = max(1, (limit - 2) // 2)
    chosen = {0, count - 1}
    for bucket in range(num_buckets):
        start = bucket * count // num_buckets
        stop = (bucket + 1) * count // num_buckets
        known = [
            (value, index) for index in range(start, stop) if (value := values[index]) is not None
        ]
        chosen |= {min(known)[1], max(known)[1]} if known else {start}
    return sorted(chosen)


class _LossAxis:
    """The loss axis: logarithmic where the loss spans a wide range, clipped above a spike."""

    def __init__(
        self,
        curve: Sequence[Record],
        lives: Sequence[bool],
        evaluations: Sequence[EvaluationPoint],
    ) -> None:
        calm = [
            loss
            for point in evaluations
            for loss in (point.by_source or {"": point.loss_nats}).values()
            if loss is not None and point.is_kept
        ]
        values = list(calm)
        for record, is_alive in zip(curve, lives, strict=True):
            loss = number(record, "loss_nats")
            if loss is None:
                continue
            values.append(loss)
            if is_alive and record.get("verdict") not in SPIKE_VERDICTS:
                calm.append(loss)
        lowest = min(values, default=0.0)
        calm_top = max(calm, default=max(values, default=1.0))
        highest = max(values, default=1.0)
        self.top = highest if calm_top <= 0 else min(highest, calm_top * _CLIP_FACTOR)
        self.is_log = lowest > 0 and self.top / lowest >= _LOG_RATIO
        if self.is_log:
            bottom, top = math.log10(lowest), math.log10(self.top)
        else:
            bottom, top = lowest, self.top
        margin = (top - bottom) * 0.06 or abs(top) * 0.1 or 1.0
        self.range = [_rounded(bottom - margin), _rounded(top + margin)]
        low = bottom - 0.6 * margin
        self.floor = _rounded(10**low if self.is_log else low)
        """Just above the axis' lower edge, for marks that belong to no loss."""

    def clip(self, loss: float | None) -> float:
        """Where to draw a marker: a loss above the axis, or not finite, sits on its top edge."""
        return self.top if loss is None else min(loss, self.top)


def _kept_and_lost(
    losses: Sequence[float | None], lives: Sequence[bool]
) -> tuple[list[float | None], list[float | None]]:
    """Split a line in two, each with gaps where the other is.

    A thrown-away piece also gets the point before it, so that it leaves the line without a gap.
    """
    kept = [loss if alive else None for loss, alive in zip(losses, lives, strict=True)]
    touches = [not alive for alive in lives]
    joined = [touch or touches[index + 1] for index, touch in enumerate(touches[:-1])]
    joined += touches[-1:]
    return kept, [loss if touch else None for loss, touch in zip(losses, joined, strict=True)]


def _loss_traces(records: Sequence[Record], lives: Sequence[bool]) -> list[Trace]:
    clocks = [integer(record, "clock") for record in records]
    losses = [_rounded_or_none(number(record, "loss_nats")) for record in records]
    steps = [integer(record, "step") for record in records]
    kept, lost = _kept_and_lost(losses, lives)
    common: Trace = {
        "x": clocks,
        "customdata": steps,
        "yaxis": "y",
        "mode": _mode(len(records)),
        "hovertemplate": "%{y:.4f} at step %{customdata}",
    }
    traces: list[Trace] = [
        {**common, "name": "loss", "y": kept, "line": {"color": "@accent", "width": 1.6}}
    ]
    if not all(lives):
        line = {"color": "@lost", "width": 1.3}
        traces.insert(0, {**common, "name": "thrown away", "y": lost, "line": line})
    return traces


def _evaluation_traces(points: Sequence[EvaluationPoint], axis: _LossAxis) -> list[Trace]:
    """One line a source, or one of the losses over all where there is one source, or none named."""
    names = source_names(points)
    if len(names) < 2:
        return _evaluation_line("validation loss", overall_losses(points), "@good", axis)
    # A run may go on that was begun before its evaluations told sources apart.
    unnamed = [point for point in points if not point.by_source]
    traces = _evaluation_line("validation loss", overall_losses(unnamed), "@muted", axis)
    for order, name in enumerate(names):
        rounds, place = divmod(order, len(_SOURCE_COLORS))
        label, losses = f"{plain_hover(name)} (validation)", losses_of(points, name)
        line = _evaluation_line(label, losses, _SOURCE_COLORS[place], axis, is_dotted=rounds > 0)
        traces += line
    return traces


def _evaluation_line(
    name: str,
    losses: Sequence[Loss],
    color: str,
    axis: _LossAxis,
    *,
    is_dotted: bool = False,
) -> list[Trace]:
    """Points joined by a thin line, and in a second trace those that a rewind threw away."""
    if all(loss is None for _, loss in losses):
        return []
    chosen = decimate([loss for _, loss in losses], MAX_POINTS)
    picked = [losses[index] for index in chosen]
    drawn = [None if loss is None else _rounded(axis.clip(loss)) for _, loss in picked]
    lives = [point.is_kept for point, _ in picked]
    kept, lost = _kept_and_lost(drawn, lives)
    size = 6 if len(picked) <= _MAX_DOTTED_POINTS else 3
    common: Trace = {
        "x": [point.clock for point, _ in picked],
        "customdata": [[_rounded_or_none(loss), point.step] for point, loss in picked],
        "yaxis": "y",
        "name": name,
        "mode": "lines+markers",
        "hovertemplate": "%{customdata[0]:.4f} at step %{customdata[1]}",
    }
    line = {"color": color, "width": 1, "dash": "dot" if is_dotted else "solid"}
    marker = {"color": "@panel", "size": size, "line": {"color": color, "width": 1.5}}
    traces: list[Trace] = [{**common, "y": kept, "line": line, "marker": marker}]
    if not all(lives):
        # The point that a thrown-away piece leaves from belongs to the line that stayed.
        sizes = [0 if alive else size for alive in lives]
        faded = {"color": "@panel", "size": sizes, "line": {"color": "@lost", "width": 1.5}}
        thin = {"color": "@lost", "width": 1}
        lost_trace: Trace = {"y": lost, "line": thin, "marker": faded, "showlegend": False}
        traces.insert(0, common | lost_trace | {"name": f"{name}, thrown away"})
    return traces


def _spike_traces(curve: Sequence[Record], axis: _LossAxis) -> list[Trace]:
    bad = [record for record in curve if record.get("verdict") in SPIKE_VERDICTS]
    bad = _thin(bad)
    if not bad:
        return []
    found = [
        (integer(record, "clock"), _rounded(axis.clip(number(record, "loss_nats"))))
        for record in bad
    ]
    trace = markers("spike", "y", found, {"color": "@bad", "size": 9, "symbol": "x"}, "%{text}")
    trace["text"] = [_describe(record) for record in bad]
    return [trace]


def _vetoed_traces(curve: Sequence[Record]) -> list[Trace]:
    vetoed = [record for record in curve if record.get("update") == "vetoed"]
    found = [
        (integer(record, "clock"), _rounded(norm))
        for record in _thin(vetoed)
        if (norm := number(record, "grad_norm")) is not None
    ]
    if not found:
        return []
    marker = {"color": "@panel", "size": 7, "line": {"color": "@bad", "width": 1.5}}
    return [markers("vetoed update", "y2", found, marker, "%{y:.3g}")]


def _series(
    curve: Sequence[Record], key: str, axis: str, name: str, color: str, scale: float = 1.0
) -> list[Trace]:
    raw = [number(record, key) for record in curve]
    chosen = decimate(raw, MAX_POINTS)
    values = [
        None if (value := raw[index]) is None else _rounded(value * scale) for index in chosen
    ]
    return [
        {
            "x": [integer(curve[index], "clock") for index in chosen],
            "y": values,
            "yaxis": axis,
            "name": name,
            "mode": _mode(len(chosen)),
            "line": {"color": color, "width": 1.3},
            "hovertemplate": "%{y:.4g}",
            "showlegend": False,
        }
    ]


def _titles() -> list[Trace]:
    return [
        {
            "text": f"<b>{title}</b>",
            "x": 0,
            "y": 1,
            "xref": "paper",
            "yref": f"{axis} domain",
            "xanchor": "left",
            "yanchor": "bottom",
            "yshift": 3,
            "showarrow": False,
            "font": {"size": 12, "color": "@ink"},
        }
        for axis, title, _, _ in _PANELS
    ]


def _layout(axis: _LossAxis) -> dict[str, object]:
    grid = _grid()
    layout: dict[str, object] = {
        "height": HEIGHT_PIXELS,
        "margin": {"l": 58, "r": 14, "t": 44, "b": 52},
        "paper_bgcolor": "@panel",
        "plot_bgcolor": "@panel",
        "font": {"family": "system-ui, sans-serif", "color": "@ink"},
        "hovermode": "x unified",
        "hoversubplots": "axis",
        "hoverlabel": {"bgcolor": "@panel", "bordercolor": "@grid", "font": {"color": "@ink"}},
        "legend": {"orientation": "h", "x": 1, "xanchor": "right", "y": 1.002, "yanchor": "bottom"},
        "xaxis": grid
        | {
            "title": {
                "text": "clock (updates executed)",
                "font": {"size": 12, "color": "@muted"},
                "standoff": 8,
            },
            "anchor": "y5",
        },
    }
    for key, _, bottom, top in _PANELS:
        name = key.replace("y", "yaxis")
        layout[name] = grid | {"domain": [bottom, top], "rangemode": "tozero", "nticks": 5}
    layout["yaxis3"] = grid | {
        "domain": list(_PANELS[2][2:]),
        "rangemode": "tozero",
        "nticks": 4,
        "exponentformat": "e",
    }
    loss: Trace = {"domain": list(_PANELS[0][2:]), "range": axis.range, "autorange": False}
    layout["yaxis"] = grid | loss | (_log(axis.range) if axis.is_log else {})
    return layout


def _norm_axis(curve: Sequence[Record]) -> dict[str, object]:
    """A logarithmic axis for the gradient norm, where every norm is positive."""
    norms = [value for record in curve if (value := number(record, "grad_norm")) is not None]
    if not norms or min(norms) <= 0:
        return {}
    low, high = math.log10(min(norms)), math.log10(max(norms))
    margin = 0.08 * (high - low) or 0.1
    extent = [_rounded(low - margin), _rounded(high + margin)]
    panel: Trace = {"domain": list(_PANELS[1][2:]), "range": extent, "autorange": False}
    return {"yaxis2": _grid() | panel | _log(extent)}


def _log(extent: Sequence[float]) -> Trace:
    ticks = log_ticks(extent[0], extent[1])
    labels = [f"{tick:,g}" for tick in ticks]
    return {"type": "log", "tickmode": "array", "tickvals": ticks, "ticktext": labels}


def _grid() -> Trace:
    return {
        "gridcolor": "@grid",
        "zeroline": False,
        "linecolor": "@grid",
        "tickfont": {"size": 11, "color": "@muted"},
        "exponentformat": "SI",
    }


def _describe(record: Record) -> str:
    loss = number(record, "loss_nats")
    text = "not finite" if loss is None else f"{loss:.4g}"
    return f"{text} ({record.get('verdict')}, step {integer(record, 'step')})"


def _thin(records: Sequence[Record]) -> list[Record]:
    stride = max(1, math.ceil(len(records) / MAX_POINTS))
    return list(records[::stride])


def _mode(num_points: int) -> str:
    return "lines+markers" if num_points <= _MAX_DOTTED_POINTS else "lines"


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _rounded_or_none(value: float | None) -> float | None:
    return None if value is None else _rounded(value)
