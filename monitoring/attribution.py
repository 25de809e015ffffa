"""The attribution of an incident, as people see it: a table in the terminal, and a picture.

Owns the layout of both and the files they lie in. Refuses to conclude anything: the replay has.
Called by the replay on rank 0.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from monitoring.atomic import write_text_atomically
from monitoring.comparison import Curve, write_comparison
from monitoring.records import Record, finite, integer, latest_by_clock, number

ATTRIBUTION_FILE = "attribution.json"
_COLORS = {"A": "#d4352c", "B": "#b7791f", "C": "#1f9d66"}
_PIPED_COLUMNS = 120
_ORIGINAL_COLOR = "#98a1b2"


def curve_before(metrics: Sequence[Record], *, clock: int, steps: range) -> list[dict[str, object]]:
    """Return the run's losses at `steps` as it had them when its clock stood at `clock`.

    A rewind leaves several records of one step; the one that counts is the last before `clock`,
    going back step by step. Oldest first; steps without a record are missing.
    """
    wanted = steps.stop - 1
    points: list[dict[str, object]] = []
    for record in reversed(latest_by_clock(metrics)):
        step, at = integer(record, "step"), integer(record, "clock")
        if step is None or at is None or at > clock or step > wanted:
            continue
        if step < steps.start:
            break
        points.append(
            {
                "step": step,
                "loss_nats": number(record, "loss_nats"),
                "verdict": record.get("verdict"),
                "is_vetoed": record.get("update") == "vetoed",
            }
        )
        wanted = step - 1
    return points[::-1]


def write_attribution(result: Mapping[str, object], path: Path) -> tuple[Path, Path]:
    """Write the attribution as JSON, and its picture beside it; return both paths.

    Raises: OSError.
    """
    write_text_atomically(path, json.dumps(finite(result), indent=1) + "\n")
    return path, _draw(result, path.with_suffix(".svg"))


def _draw(result: Mapping[str, object], path: Path) -> Path:
    target = integer(result, "target_step") or 0
    original = _mapping(result["original"])
    batches = [(integer(p, "step") or 0) - target for p in _records(original["points"])]
    losses = [number(p, "loss_nats") for p in _records(original["points"])]
    curves = [Curve(label="the run", xs=batches, ys=losses, color=_ORIGINAL_COLOR)]
    for trial in _records(result["trials"]):
        points = _records(trial["points"])
        if points:
            name = str(trial["name"])
            curves.append(
                Curve(
                    label=f"{name} {trial['title']}",
                    xs=[integer(point, "batch") or 0 for point in points],
                    ys=[number(point, "loss_nats") for point in points],
                    color=_COLORS.get(name),
                )
            )
    onset = (integer(result, "onset_step") or 0) - target
    detected = (integer(result, "detected_step") or 0) - target
    return write_comparison(
        # The trial that should be the run again lies below it, so that a difference is seen.
        [curves[index] for index in (*range(1, len(curves)), 0)],
        path,
        f"{result['run']}, incident {result['incident']}: {result['cause']}",
        x_label=f"batches after step {target}",
        region=(onset - 0.5, detected + 0.5),
        region_label="onset to detection",
    )


def show_attribution(result: Mapping[str, object], paths: Sequence[Path]) -> None:
    """Print the cause, the trials and what hangs on them to stdout, and where the files are."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    width = None if sys.stdout.isatty() else _PIPED_COLUMNS
    console = Console(file=sys.stdout, highlight=False, width=width)
    table = Table(title=Text(f"{result['run']}: incident {result['incident']}, {result['reason']}"))
    for heading in ("trial", "data and state", "from step", "samples", "peak loss", "sigma"):
        table.add_column(heading, justify="left" if heading.startswith(("t", "d")) else "right")
    table.add_column("verdict")
    table.add_column("spiked")
    for trial in _records(result["trials"]):
        table.add_row(*(Text(cell) for cell in _trial_cells(trial)))
    repeat = _mapping(result["repeat"])
    table.add_row(*(Text(cell) for cell in _repeat_cells(repeat)))
    console.print(table)
    console.print(Text("cause: ").append(str(result["cause"]), style="bold"))
    console.print(Text(f"because {result['because']}"), soft_wrap=True)
    for line in _remarks(result):
        console.print(Text(line), soft_wrap=True)
    for path in paths:
        console.print(Text(str(path)), soft_wrap=True)


def _trial_cells(trial: Record) -> list[str]:
    data = trial.get("data")
    verdict, step = trial.get("verdict"), integer(trial, "verdict_step")
    has_spiked = trial.get("has_spiked")
    return [
        str(trial["name"]),
        str(trial["title"]),
        _or_dash(integer(trial, "from_step")),
        f"[{data[0]:,}, {data[1]:,})" if isinstance(data, list) else "-",
        _decimal(trial, "peak_loss_nats", 3),
        _decimal(trial, "peak_deviation", 1),
        f"{verdict} at step {step}" if verdict else "calm" if has_spiked is False else "-",
        "unknown" if has_spiked is None else "yes" if has_spiked else "no",
    ]


def _repeat_cells(repeat: Record) -> list[str]:
    steps = repeat.get("steps")
    done = ", ".join(str(step) for step in steps) if isinstance(steps, list) else ""
    differs = repeat.get("differs")
    same = "not tried" if differs is None else "other bits" if differs else "same bits"
    title = f"{repeat['title']} ({done})" if done else str(repeat["title"])
    return [str(repeat["name"]), title, "-", "-", "-", "-", same, "-"]


def _remarks(result: Mapping[str, object]) -> list[str]:
    lines = []
    if result.get("cause") and str(result["cause"]).startswith("not reproducible"):
        suspect = result.get("suspect_hardware")
        words = suspect["words"] if isinstance(suspect, Mapping) else "no rank could be singled out"
        lines.append(f"look first at: {words}")
    for trial in _records(result["trials"]):
        if trial.get("unknown_because"):
            lines.append(f"{trial['name']} is unknown: {trial['unknown_because']}")
    original = _mapping(result["original"])
    if original.get("is_comparable"):
        other, equal = original.get("first_other_step"), original.get("num_equal_steps")
        lines.append(
            f"the losses of A are those of the run, bit for bit, in all {equal} steps"
            if other is None
            else f"the losses of A are those of the run, bit for bit, for {equal} steps; step "
            f"{other} is the first that came out otherwise"
        )
    caveats = result.get("caveats")
    lines += [f"mind: {caveat}" for caveat in caveats] if isinstance(caveats, list) else []
    return lines


def _decimal(record: Record, key: str, digits: int) -> str:
    value = record.get(key)
    known = number(record, key)
    if known is None:
        return "-" if value is None else "not finite"
    return f"{known:.{digits}f}"


def _or_dash(value: int | None) -> str:
    return "-" if value is None else str(value)


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}


def _records(value: object) -> list[Record]:
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []
