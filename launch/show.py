"""Plain text for the terminal.

Owns the layout of `explain` and `incidents`: aligned columns that survive a pipe and a grep.
Called by `launch.cli`.
"""

from collections.abc import Mapping, Sequence

from launch.explain import Setting
from launch.incidents import IncidentList

INCIDENT_COLUMNS = (
    "incident",
    "phase",
    "time",
    "rule",
    "reason",
    "verdict",
    "onset_step",
    "detected_step",
    "target_step",
    "target_checkpoint",
    "skip",
    "seconds",
)


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


def show_incidents(found: IncidentList) -> str:
    """Return a table with a heading, or one line where there was no incident."""
    lines = []
    if found.num_skipped_lines:
        lines.append(f"{found.num_skipped_lines} torn line(s) in the journal left out")
    if not found.rows:
        return "\n".join([*lines, "no incidents"])
    cells = [[_cell(row, name) for name in INCIDENT_COLUMNS] for row in found.rows]
    return "\n".join([columns([INCIDENT_COLUMNS, *cells]), *lines])


def _cell(row: Mapping[str, object], name: str) -> str:
    value = row.get(name)
    if name == "skip" and isinstance(value, list | tuple) and len(value) == 2:
        return f"[{value[0]}, {value[1]})"
    if isinstance(value, float):
        return f"{value:.1f}"
    return "-" if value is None else str(value)
