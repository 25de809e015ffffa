"""The report of a run: one HTML file that needs nothing else, written from the run folder alone.

Owns the page's content and the atomic write. Refuses the network: the chart library is inlined.
Called at the end of a run on rank 0, and by the CLI at any time, on an unfinished run too.
`write_comparison` (several runs in one picture) lives in `comparison` and is offered here as well.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

from monitoring.atomic import write_text_atomically
from monitoring.comparison import Curve, write_comparison
from monitoring.evaluations import (
    EvaluationPoint,
    losses_of,
    overall_losses,
    read_evaluations,
    source_names,
)
from monitoring.figure import build_figure
from monitoring.goodput import Goodput, compute_goodput
from monitoring.incidents import (
    Notice,
    collect_incidents,
    collect_notices,
    in_words,
    returned_samples,
    short_count,
    sum_up,
)
from monitoring.records import Record, RunRecords, integer, number, read_run, sample_range
from monitoring.waterfall import duration, waterfall_svg

__all__ = ["REPORT_FILE", "Curve", "write_comparison", "write_report"]

REPORT_FILE = "report.html"
_TEMPLATE = "report.html.j2"


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Write the report of a run folder, finished or not, and return its path.

    The default output is `<folder>/report.html`; a reader sees the old file or the whole new one.

    Raises:
        UnreadableRecordsError: the folder does not exist or a file in it cannot be read.
        OSError: the output cannot be written.
    """
    import jinja2
    import plotly.offline
    from markupsafe import Markup

    run = read_run(folder)
    output = output if output is not None else folder / REPORT_FILE
    template_text = resources.files("monitoring").joinpath(_TEMPLATE).read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.from_string(template_text).render(
        **page_content(run),
        plotly_js=Markup(plotly.offline.get_plotlyjs()),
    )
    write_text_atomically(output, page)
    return output


def page_content(run: RunRecords) -> dict[str, object]:
    """Everything the template shows, as plain values."""
    incidents = collect_incidents(run)
    goodput = compute_goodput(run.metrics, run.events)
    evaluations = [point for point in read_evaluations(run.events) if point.is_kept]
    return {
        "name": run.name,
        "run_id": run.run_id,
        "created_utc": run.created_utc[:19].replace("T", " "),
        "verdict": sum_up(run, incidents, goodput),
        "facts": _facts(run, goodput, evaluations),
        "figure": build_figure(run, incidents),
        "has_metrics": bool(run.metrics),
        "validation": _validation_rows(evaluations),
        "incidents": _incident_rows(incidents),
        "notices": _notice_rows(collect_notices(run)),
        "waterfall": waterfall_svg(goodput),
        "wall": duration(goodput.wall_seconds),
        "data": _data_rows(run),
        "checkpoints": _checkpoint_rows(run),
        "config_yaml": run.config_yaml,
        "num_skipped_lines": run.num_skipped_lines,
    }


def _facts(
    run: RunRecords, goodput: Goodput, evaluations: Sequence[EvaluationPoint]
) -> list[tuple[str, str]]:
    curve = run.curve
    last: Record = curve[-1] if curve else {}
    losses = [loss for record in curve if (loss := number(record, "loss_nats")) is not None]
    final_loss = number(run.summary, "final_loss_nats")
    if not run.summary and losses:
        final_loss = losses[-1]
    tokens = _first(number(run.summary, "tokens_seen"), number(last, "tokens_seen"))
    speed = number(run.summary, "tokens_per_second")
    if speed is None:
        speeds = sorted(filter(None, (number(record, "tokens_per_second") for record in curve)))
        speed = speeds[len(speeds) // 2] if speeds else None
    validation_loss = number(run.summary, "validation_loss_nats")
    if not run.summary and evaluations:
        validation_loss = evaluations[-1].loss_nats
    vetoed = sum(record.get("update") == "vetoed" for record in curve)
    facts = [
        ("final loss", "\u2013" if final_loss is None else f"{final_loss:.4f}"),
        ("validation loss", "" if validation_loss is None else f"{validation_loss:.4f}"),
        ("tokens", "\u2013" if tokens is None else short_count(tokens)),
        ("tokens per second", "\u2013" if speed is None else short_count(speed)),
        ("vetoed updates", str(vetoed) if vetoed else ""),
        ("wall time", duration(goodput.wall_seconds)),
        ("goodput", f"{goodput.goodput:.1%}"),
    ]
    return [(label, value) for label, value in facts if value]


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)


def _validation_rows(points: Sequence[EvaluationPoint]) -> list[Mapping[str, object]]:
    """First, best and last of each source, and of all together where there are several."""
    names = source_names(points)
    lines = [(name, losses_of(points, name)) for name in names]
    if len(names) != 1 and points:
        lines.append(("all sources", overall_losses(points)))
    rows: list[Mapping[str, object]] = []
    for name, losses in lines:
        known = [(loss, point.step) for point, loss in losses if loss is not None]
        (first, first_loss), (last, last_loss) = losses[0], losses[-1]
        best_loss, best_step = min(known, default=(None, None))
        cells = ((first_loss, first.step), (best_loss, best_step), (last_loss, last.step))
        rows.append({"name": name, "cells": [(_loss(loss), _text(step)) for loss, step in cells]})
    return rows


def _loss(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4f}"


def _notice_rows(notices: Sequence[Notice]) -> list[Mapping[str, object]]:
    return [
        {
            "kind": in_words(notice.kind),
            "css": notice.kind,
            "step": _text(notice.step),
            "time": _utc(notice.unix_seconds),
            "lines": notice.lines,
        }
        for notice in notices
    ]


def _data_rows(run: RunRecords) -> list[Mapping[str, object]]:
    """The sources as the last process to say so began with them."""
    told = [data for event in run.events if isinstance(data := event.get("data"), Mapping)]
    sources = told[-1] if told else {}
    rows: list[Mapping[str, object]] = []
    for name, source in sources.items():
        known: Record = source if isinstance(source, Mapping) else {}
        share = number(known, "share")
        rows.append(
            {
                "name": name,
                "tokens": _text(integer(known, "tokens")),
                "share": "\u2013" if share is None else f"{share:.1%}",
            }
        )
    return rows


def _incident_rows(incidents: list[Record]) -> list[Mapping[str, object]]:
    """One row an attempt; `is_first` where an incident begins."""
    known: set[object] = set()
    rows: list[Mapping[str, object]] = []
    for incident in incidents:
        is_first = incident["incident"] not in known
        known.add(incident["incident"])
        rows.append({**_incident_row(incident), "is_first": is_first})
    return rows


def _incident_row(row: Record) -> Mapping[str, object]:
    skip, back = sample_range(row), returned_samples(row)
    seconds, scale = number(row, "seconds"), number(row, "lr_scale")
    target = None
    if row.get("is_rewind") or row.get("state") == "observed":
        target = row.get("target_checkpoint") or row.get("target_step") or row.get("to_step")
    onset, found = row.get("onset_step"), row.get("detected_step", row.get("from_step"))
    start, stop = (back[1], back[2]) if back else skip or (0, 0)
    code = str(row.get("code") or "")
    return {
        "id": row["incident"],
        "attempt": row["attempt"],
        "rung": in_words(row.get("rung") or "rewind"),
        "step": _text(found) if onset in (None, found) else f"{_text(onset)} \u2192 {_text(found)}",
        "verdict": str(row.get("verdict") or ""),
        "target": Path(str(target)).name if target else "\u2013",
        "skip": f"[{start:,}, {stop:,})" if stop > start else "\u2013",
        "num_samples": f"{start - stop if back else stop - start:,}",
        "lr": "\u2013" if scale in (None, 1.0) else f"\u00d7 {scale:g}",
        "reason": f"{code}: {row.get('reason')}" if code else _text(row.get("reason")),
        "state": row["state"],
        "seconds": "\u2013" if seconds is None else f"{seconds:.2f} s",
    }


def _checkpoint_rows(run: RunRecords) -> list[Mapping[str, object]]:
    quarantined: set[str] = set()
    for entry in run.journal:
        names = entry.get("quarantine")
        if isinstance(names, list):
            quarantined.update(Path(str(name)).name for name in names)
    rows: list[Mapping[str, object]] = []
    for event in run.events:
        if event.get("kind") not in ("checkpoint_saved", "checkpoint_failed"):
            continue
        name = Path(str(event.get("path") or "")).name
        health = "quarantined" if name in quarantined else _health(run.folder, name)
        num_bytes, seconds = number(event, "bytes"), number(event, "seconds")
        rows.append(
            {
                "step": _text(integer(event, "step")),
                "name": name or "\u2013",
                "health": "failed" if event.get("kind") == "checkpoint_failed" else health,
                "reason": _text(event.get("reason"), ""),
                "bytes": "\u2013" if num_bytes is None else _size(num_bytes),
                "seconds": "\u2013" if seconds is None else f"{seconds:.2f} s",
                "time": _utc(number(event, "time")),
            }
        )
    return rows


def _health(folder: Path, name: str) -> str:
    """What a checkpoint says of itself now; retention removes those that are not needed."""
    path = folder / "checkpoints" / name
    if not name or not path.is_dir():
        return "removed"
    try:
        return str(json.loads((path / "health.json").read_text())["health"])
    except (OSError, ValueError, KeyError):
        return "unknown"


def _size(num_bytes: float) -> str:
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= limit:
            return f"{num_bytes / limit:.1f} {unit}"
    return f"{num_bytes:.0f} B"


def _text(value: object, missing: str = "\u2013") -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return missing if value is None or value == "" else str(value)


def _utc(time: float | None) -> str:
    if time is None:
        return "\u2013"
    return datetime.datetime.fromtimestamp(time, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
