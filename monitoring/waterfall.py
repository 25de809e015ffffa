"""A run's wall time as a waterfall: from all of it down to training, one loss a row.

Owns the picture, an SVG drawn here: the same one stands in the report, in a page of its own and in
documents, without a chart library. Colours are CSS variables where a page has them. Refuses to
compute: `goodput` has done it. Called by the report and the CLI.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

from monitoring.atomic import write_text_atomically
from monitoring.goodput import Goodput
from monitoring.ticks import nice_ticks

MEANINGS: Mapping[str, str] = {
    "restart": "from the last sign of life to the next process: a queue, a scheduler, a person",
    "startup": "from a process start to its first step: imports, data, loading a checkpoint",
    "compile": "torch.compile, whenever it ran",
    "data_wait": "steps that waited for their batch",
    "checkpoint_stall": "training stood still for a save",
    "evaluation": "held-out losses",
    "hang_detection": "from the last progress of a hung attempt until the watchdog found it",
    "rewind": "going back to a good state",
    "recomputed": "steps lost to a crash or a rewind and done again; refused updates",
    "skipped_tokens": "steps that a rewind threw away together with their samples",
    "idle": "the rest: callbacks, writing the report, a completed run that was continued later",
    "training": "steps that are part of the final model",
}
_COLORS: Mapping[str, str] = {
    "restart": "#b4506e",
    "startup": "#8a94a6",
    "compile": "#6c7a9c",
    "data_wait": "#c99a2e",
    "checkpoint_stall": "#4f86d9",
    "evaluation": "#38a3b8",
    "hang_detection": "#8c4a2f",
    "rewind": "#9b5fc0",
    "recomputed": "#d4665d",
    "skipped_tokens": "#e0925a",
    "idle": "#aab2c0",
    "training": "#2f9e6b",
}
WIDTH_PIXELS = 900
_LEFT, _RIGHT, _ROW, _BAR, _BOTTOM = 132, 168, 27, 17, 30
_NUM_TICKS = 6


def duration(seconds: float) -> str:
    """Seconds for people: `0.4 s`, `12 s`, `3 min 20 s`, `5 h 02 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


def style_of(name: str) -> str:
    """The CSS colour of a class: a page's variable `--NAME`, else a fixed one."""
    return f"var(--{name}, {_COLORS[name]})"


def waterfall_svg(goodput: Goodput, title: str = "", *, is_alone: bool = False) -> str:
    """The picture, 900 pixels wide; classes without time are left out.

    `is_alone`: with a white background and a name space, for a file of its own.
    """
    wall = goodput.wall_seconds
    rows = [("wall time", wall, 0.0, "")]
    left = wall
    for name, seconds in goodput.seconds_by_class().items():
        if seconds > 0 and name != "training":
            left -= seconds
            rows.append((name.replace("_", " "), seconds, max(0.0, left), name))
    rows.append(("training", goodput.training, 0.0, "training"))
    top = 44 if title else 8
    bottom = top + _ROW * len(rows)
    height = bottom + _BOTTOM
    label = title or f"wall time {duration(wall)}, goodput {goodput.goodput:.1%}"
    namespace = ' xmlns="http://www.w3.org/2000/svg"' if is_alone else ""
    parts = [
        f'<svg{namespace} viewBox="0 0 {WIDTH_PIXELS} {height}" '
        f'width="{WIDTH_PIXELS}" height="{height}" role="img" aria-label={quoteattr(label)} '
        'style="max-width:100%;height:auto" '
        'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">'
    ]
    if is_alone:
        parts.append(f'<rect width="{WIDTH_PIXELS}" height="{height}" fill="#ffffff"/>')
    if title:
        parts.append(_text(8, 26, title, size=15, weight=600))
    parts += _axis(wall, top, bottom)
    for index, row in enumerate(rows):
        parts += _row(row, wall, top + _ROW * index, is_last=index == len(rows) - 1)
    parts.append("</svg>\n")
    return "\n".join(parts)


def write_waterfall(parts: Sequence[tuple[str, Goodput]], output: Path) -> Path:
    """Write one waterfall a run, in order, as `.html`; as `.svg` the last one alone.

    Raises:
        ValueError: the output is neither.
        OSError: it cannot be written.
    """
    if output.suffix == ".svg":
        name, goodput = parts[-1]
        picture = waterfall_svg(goodput, headline(name, goodput), is_alone=True)
        write_text_atomically(output, picture)
    elif output.suffix == ".html":
        write_text_atomically(output, _page(parts))
    else:
        raise ValueError(f"{output}: give a path that ends in .html or .svg")
    return output


def headline(name: str, goodput: Goodput) -> str:
    """A run in one line: its name, how long, how many attempts, the share of training."""
    attempts = "1 attempt" if goodput.num_attempts == 1 else f"{goodput.num_attempts} attempts"
    wall = duration(goodput.wall_seconds)
    return f"{name}: {wall} of wall time in {attempts}, goodput {goodput.goodput:.1%}"


def _axis(wall: float, top: int, bottom: int) -> list[str]:
    """Thin lines at round times; hours where there are many."""
    if wall <= 0:
        return []
    unit, name = next(
        ((size, name) for size, name in ((3600.0, "h"), (60.0, "min")) if wall >= 3 * size),
        (1.0, "s"),
    )
    parts = []
    for tick in nice_ticks(0.0, wall / unit, _NUM_TICKS):
        x = _x(tick * unit, wall)
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}" '
            'style="stroke:var(--grid, #e4e7ee)"/>'
        )
        words = f"{tick:,g} {name}"
        parts.append(_text(x, bottom + 18, words, anchor="middle", is_muted=True, size=11))
    return parts


def _row(row: tuple[str, float, float, str], wall: float, y: float, *, is_last: bool) -> list[str]:
    label, seconds, left, name = row
    start, stop = _x(left, wall), _x(left + seconds, wall)
    share = seconds / wall if wall > 0 else 0.0
    color = style_of(name) if name else "var(--muted, #667085)"
    meaning = MEANINGS[name] if name else "from the first process start to the last record"
    hint = f"{label}: {meaning}"
    middle = y + _ROW / 2
    parts = [
        f'<rect x="{start:.1f}" y="{middle - _BAR / 2:.1f}" width="{max(stop - start, 1.0):.1f}" '
        f'height="{_BAR}" rx="2" style="fill:{color}"><title>{escape(hint)}</title></rect>',
        _text(_LEFT - 10, middle + 4, label, anchor="end"),
        _text(WIDTH_PIXELS - 62, middle + 4, duration(seconds), anchor="end"),
        _text(WIDTH_PIXELS - 6, middle + 4, f"{share:.1%}", anchor="end", is_muted=True),
    ]
    if not is_last:  # what is left falls to the next row
        edge = start if name else stop
        y1, y2 = middle + _BAR / 2, middle + _ROW - _BAR / 2
        parts.append(
            f'<line x1="{edge:.1f}" x2="{edge:.1f}" y1="{y1:.1f}" y2="{y2:.1f}" '
            'style="stroke:var(--muted, #667085)"/>'
        )
    return parts


def _x(seconds: float, wall: float) -> float:
    share = seconds / wall if wall > 0 else 0.0
    return _LEFT + share * (WIDTH_PIXELS - _LEFT - _RIGHT)


def _text(
    x: float,
    y: float,
    text: str,
    *,
    size: int = 13,
    anchor: str = "start",
    weight: int = 400,
    is_muted: bool = False,
) -> str:
    color = "var(--muted, #667085)" if is_muted else "var(--ink, #1c2330)"
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" '
        f'text-anchor="{anchor}" style="fill:{color}">{escape(text)}</text>'
    )


def _page(parts: Sequence[tuple[str, Goodput]]) -> str:
    pictures = "".join(
        f"<section><h2>{escape(headline(name, goodput))}</h2>{waterfall_svg(goodput)}</section>\n"
        for name, goodput in parts
    )
    meanings = "".join(
        f'<dt><span style="background:{style_of(name)}"></span>{name.replace("_", " ")}</dt>'
        f"<dd>{escape(meaning)}</dd>\n"
        for name, meaning in MEANINGS.items()
    )
    title = escape(parts[-1][0])
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title} \u2013 goodput</title>
<style>
:root {{ --page: #f5f6f9; --panel: #ffffff; --ink: #1c2330; --muted: #667085; --grid: #e4e7ee; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --page: #10141b; --panel: #181d26; --ink: #e4e8f0; --muted: #98a2b3; --grid: #2b3240; }}
}}
body {{
  margin: 0 auto; max-width: 960px; padding: 24px 16px; background: var(--page);
  color: var(--ink); font: 14px/1.5 system-ui, -apple-system, "Segoe UI", Arial, sans-serif;
}}
section {{
  background: var(--panel); border: 1px solid var(--grid); border-radius: 10px;
  padding: 14px 18px; margin: 0 0 16px;
}}
h2 {{ font-size: 16px; margin: 0 0 10px; overflow-wrap: anywhere; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: 5px 18px; margin: 0; }}
dt span {{
  display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 9px;
}}
dd {{ margin: 0; color: var(--muted); }}
</style>
</head>
<body>
{pictures}<section><dl>
{meanings}</dl></section>
</body>
</html>
"""
