"""Plain text for the terminal.

Owns the layout of `explain` and `incidents`, aligned columns that survive a pipe and a grep, and
the words for a request that waits.
Called by `launch.cli`.
"""

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.control import Liveness
from launch.explain import Setting
from launch.incidents import IncidentList

_DASH = "-"
_INDENT = "    "


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Return the rows as lines whose columns line up; the last column is not padded."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join(lines)


def show_settings(key: str, settings: Sequence[Setting]) -> str:
    """Return every place of one key, the winner marked `*`; of a group, the winners alone."""
    is_group = any(setting.key != key for setting in settings)
    if is_group:
        return columns([_cells(s.key, s) for s in settings if s.is_winner])
    return columns([_cells("*" if s.is_winner else " ", s) for s in settings])


def _cells(first: str, setting: Setting) -> list[str]:
    comment = f"# {setting.comment}" if setting.comment else ""
    return [first, setting.value, setting.place, comment]


def show_incidents(found: IncidentList, *, width: int, has_all: bool = False) -> str:
    """Return one table row an attempt with its reason below, wrapped to `width` characters.

    Refused updates are one line, unless `has_all`.
    """
    rows = [*found.vetoes, *found.rows] if has_all else list(found.rows)
    parts = [_table(rows, width)] if rows else ["no incidents"]
    if found.vetoes and not has_all:
        parts.append(_sum_of_vetoes(found.vetoes, width))
    parts += [_one_line(notice) for notice in found.notices]
    if found.num_skipped_lines:
        parts.append(f"{found.num_skipped_lines} torn line(s) in the journal left out")
    return "\n".join(parts)


def show_incidents_json(found: IncidentList, *, has_all: bool = False) -> str:
    """Return one JSON object a line and attempt; refused updates come first, if `has_all`."""
    rows = [*found.vetoes, *found.rows] if has_all else found.rows
    return "\n".join(json.dumps(row, sort_keys=True) for row in rows)


def show_request(run_folder: Path, path: Path, alive: Liveness) -> str:
    """Return what becomes of a request that has no answer yet."""
    when = {
        Liveness.RUNNING: "the run has not answered yet; it reads it at one of its next steps, or"
        " when it starts again",
        Liveness.STOPPED: f"{run_folder} is not running: it is carried out when the run is started"
        " again, by the command that began it",
        Liveness.UNKNOWN: f"whether {run_folder} is running cannot be told from this host: it is"
        " carried out at one of its next steps, or when it starts again",
    }[alive]
    return (
        f"request left: {when}. `trimtab incidents {run_folder}` lists it then, and"
        f" {run_folder / 'control' / 'answers' / path.name} has the answer; to take it back before,"
        f" remove {path}"
    )


def _table(rows: Sequence[Mapping[str, object]], width: int) -> str:
    cells = [_incident_cells(row) for row in rows]
    names = [name for name in cells[0] if any(cell[name] != _DASH for cell in cells)]
    for spare in ("", "verdict", "sec"):  # the reason begins with the verdict
        names = [name for name in names if name != spare]
        table = columns([names, *([cell[name] for name in names] for cell in cells)]).splitlines()
        if max(map(len, table)) <= width:
            break
    lines = table[:1]
    for line, row in zip(table[1:], rows, strict=True):
        lines += [line, *_wrapped(_reason(row), width)]
        if row.get("capsule"):
            lines.append(f"{_INDENT}evidence: {row['capsule']}")  # whole, to be copied
    return "\n".join(lines)


def _incident_cells(row: Mapping[str, object]) -> dict[str, str]:
    onset, found = row.get("onset_step"), row.get("detected_step", row.get("from_step"))
    target = None
    if row.get("is_rewind") or row.get("state") == "observed":
        target = row.get("target_step", row.get("to_step"))
    seconds, scale = row.get("seconds"), row.get("lr_scale")
    return {
        "#": _text(row.get("incident")),
        "try": _text(row.get("attempt")),
        "when (UTC)": _text(row.get("time"))[:16].replace("T", " "),
        "what": _text(row.get("rung") or "rewind").replace("_", " "),
        "verdict": _text(row.get("verdict")).replace("_", " "),
        "onset->found": _text(found) if onset in (None, found) else f"{onset}->{found}",
        "back to": _text(target),
        "skipped": _skipped(row),
        "lr": f"x{scale:g}" if isinstance(scale, float) and scale != 1.0 else _DASH,
        "sec": f"{seconds:.2f}" if isinstance(seconds, float | int) else _DASH,
        "state": _text(row.get("state") or row.get("phase")),
    }


def _skipped(row: Mapping[str, object]) -> str:
    """`64 (66k)`: samples, and tokens where the length of a sample is known."""
    from monitoring.incidents import short_count

    samples, tokens = row.get("num_skipped_samples"), row.get("num_skipped_tokens")
    if not samples:
        return _DASH
    return f"{samples} ({short_count(tokens)})" if isinstance(tokens, int) else str(samples)


def _reason(row: Mapping[str, object]) -> str:
    """Why, with the code of a stop before it and the samples concerned behind it."""
    from monitoring.incidents import returned_samples
    from monitoring.records import sample_range

    reason = ": ".join(str(row[key]) for key in ("code", "reason") if row.get(key))
    skip, back = sample_range(row), returned_samples(row)
    if skip and skip[1] > skip[0]:
        reason += f"; samples [{skip[0]}, {skip[1]}) skipped"
    if back:
        reason += f"; samples [{back[1]}, {back[2]}) come again at {back[0]}"
    return _one_line(reason.removeprefix("; "))


def _one_line(text: str) -> str:
    """The text without line breaks and what a terminal would take for a command."""
    words = " ".join(text.split())
    return "".join(letter for letter in words if letter.isprintable())


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, max(width, 40), initial_indent=_INDENT, subsequent_indent=_INDENT)


def _sum_of_vetoes(vetoes: Sequence[Mapping[str, object]], width: int) -> str:
    from monitoring.incidents import plural

    last = vetoes[-1]
    text = (
        f"{plural(len(vetoes), 'update')} refused, the last at step {last.get('detected_step')}:"
        f" {last.get('reason')}; --all lists them"
    )
    return textwrap.fill(" ".join(text.split()), max(width, 40), subsequent_indent=_INDENT)


def _text(value: object) -> str:
    return _DASH if value is None or value == "" else str(value)
