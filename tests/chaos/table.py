"""The table of docs/reliability.md, written between two marks of the page."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- the table: begin -->", "<!-- the table: end -->"
_HEAD = (
    "| what was done | run | what happened | detected | back | steps again | twice | skipped "
    "| same state |",
    "|---|---|---|---|---|---|---|---|---|",
)


def load(path: Path) -> dict[str, Any]:
    """Return the results that a file has, none if there is no file."""
    if not path.exists():
        return {"results": {}}
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


def render(stored: dict[str, Any], order: Iterable[str]) -> str:
    """Return the table as Markdown, with when and where it was made."""
    results = stored["results"]
    rows = [_row(results[name]) for name in order if name in results]
    made = f"Made {stored['date']} by `make chaos` on {stored['machine']}."
    return "\n".join([made, "", *_HEAD, *rows])


def _row(result: dict[str, Any]) -> str:
    if result["skipped"]:
        cells = [result["done"], result["engine"], f"skipped: {result['skipped']}", *[""] * 6]
        return f"| {' | '.join(cells)} |"
    happened = result["happened"]
    if result["problems"]:
        happened = f"**not recovered**: {'; '.join(result['problems'])} ({happened})"
    samples = result["samples"] or {}
    is_equal = result["is_bit_equal"]
    cells = [
        result["done"],
        result["engine"],
        happened.replace("|", "/"),
        _seconds(result["detect_seconds"]),
        _seconds(result["recover_seconds"]),
        _number(result["steps_lost"]),
        _number(samples.get("twice")),
        _number(samples.get("skipped")),
        "-" if is_equal is None else ("bit for bit" if is_equal else "no"),
    ]
    return f"| {' | '.join(cells)} |"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def write_into(page: Path, table: str) -> None:
    """Replace what lies between the two marks of a page. Raises: ValueError without both."""
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} needs the lines {BEGIN} and {END}: the table goes between them")
    page.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")


def save(path: Path, stored: dict[str, Any]) -> None:
    """Keep results for another time."""
    path.write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n", encoding="utf-8")
