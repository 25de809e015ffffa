"""Several loss curves in one small SVG, for a README: drawn here, without a chart library.

Owns the picture's layout, ticks and colours. Refuses interaction and more than a handful of curves;
the report is for looking closely. Called by the CLI, the examples and the benchmarks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

from monitoring.atomic import write_text_atomically
from monitoring.figure import decimate
from monitoring.ticks import log_ticks, nice_ticks

WIDTH_PIXELS = 900
HEIGHT_PIXELS = 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 20, 74, 52
_MAX_POINTS = 1_500
_COLORS = ("#1f9d66", "#2f6fde", "#d4352c", "#b7791f", "#7a4fd0", "#4b5565")
_LOG_RATIO = 6.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One line: `ys` over `xs`, both of one length; None or NaN breaks the line."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float | None]
    color: str | None = None

    def __post_init__(self) -> None:
        if len(self.xs) != len(self.ys):
            raise ValueError(
                f"curve {self.label!r} has {len(self.xs)} xs and {len(self.ys)} ys; give as many"
            )


def write_comparison(
    curves: Sequence[Curve],
    output: Path,
    title: str,
    *,
    x_label: str = "step",
    y_label: str = "loss (nats)",
    region: tuple[float, float] | None = None,
    region_label: str = "",
) -> Path:
    """Write the curves as a 900 by 420 SVG with its own white background and return its path.

    Curves are drawn in order, so that the last one lies on top where they agree. `region` shades
    an interval of x, such as the poisoned batches. The y-axis is logarithmic where the curves span
    more than a factor of six.

    Raises:
        ValueError: the output is not an `.svg`.
    """
    if output.suffix != ".svg":
        raise ValueError(f"{output}: only .svg can be written; give a path that ends in .svg")
    frame = _Frame(curves)
    parts = [_head(title)]
    if region is not None:
        parts.append(_region(frame, region))
    parts += _axes(frame, x_label, y_label)
    for order, curve in enumerate(curves):
        parts.append(_line(frame, curve, _color(curve, order)))
    if region is not None and region_label:
        parts.append(_region_label(frame, region, region_label))
    parts += _legend(curves)
    parts.append("</svg>\n")
    write_text_atomically(output, "\n".join(parts))
    return output


class _Frame:
    """Maps data to pixels."""

    def __init__(self, curves: Sequence[Curve]) -> None:
        xs = [x for curve in curves for x in curve.xs if math.isfinite(x)]
        ys = [y for curve in curves for y in curve.ys if y is not None and math.isfinite(y)]
        self.x_low, self.x_high = _spread(xs)
        low, high = _spread(ys)
        self.is_log = bool(ys) and min(ys) > 0 and max(ys) / min(ys) > _LOG_RATIO
        if self.is_log:
            low, high = math.log10(min(ys)), math.log10(max(ys))
        margin = 0.05 * (high - low)
        self.y_low, self.y_high = low - margin, high + margin

    def x(self, value: float) -> float:
        share = (value - self.x_low) / (self.x_high - self.x_low)
        return _LEFT + share * (WIDTH_PIXELS - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        scaled = math.log10(value) if self.is_log else value
        share = (scaled - self.y_low) / (self.y_high - self.y_low)
        return HEIGHT_PIXELS - _BOTTOM - share * (HEIGHT_PIXELS - _TOP - _BOTTOM)

    def y_ticks(self) -> list[float]:
        if not self.is_log:
            return nice_ticks(self.y_low, self.y_high, 9)
        return log_ticks(self.y_low, self.y_high)


def _spread(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _head(title: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH_PIXELS}" height="{HEIGHT_PIXELS}" '
        f'viewBox="0 0 {WIDTH_PIXELS} {HEIGHT_PIXELS}" role="img" aria-label={quoteattr(title)} '
        'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">\n'
        f"<title>{escape(title)}</title>\n"
        f'<rect width="{WIDTH_PIXELS}" height="{HEIGHT_PIXELS}" rx="8" fill="#ffffff"/>\n'
        + _label(_LEFT, 28, title, size=16, color="#1c2330", weight=600)
    )


def _region(frame: _Frame, region: tuple[float, float]) -> str:
    start, stop = _region_pixels(frame, region)
    height = HEIGHT_PIXELS - _TOP - _BOTTOM
    return (
        f'<rect x="{start:.1f}" y="{_TOP}" width="{stop - start:.1f}" height="{height}" '
        'fill="#d4352c" fill-opacity="0.10"/>'
    )


def _region_label(frame: _Frame, region: tuple[float, float], label: str) -> str:
    start, stop = _region_pixels(frame, region)
    is_left = start < 0.7 * WIDTH_PIXELS
    at, anchor = (stop + 6, "start") if is_left else (start - 6, "end")
    text = _label(at, _TOP + 13, label, size=12, color="#b02a22", anchor=anchor)
    halo = 'stroke="#ffffff" stroke-width="4" paint-order="stroke"'
    return f"<g {halo}>{text}</g>"


def _region_pixels(frame: _Frame, region: tuple[float, float]) -> tuple[float, float]:
    start = max(frame.x(region[0]), float(_LEFT))
    stop = min(frame.x(region[1]), float(WIDTH_PIXELS - _RIGHT))
    return start, max(stop, start + 2.0)


def _axes(frame: _Frame, x_label: str, y_label: str) -> list[str]:
    bottom, right = HEIGHT_PIXELS - _BOTTOM, WIDTH_PIXELS - _RIGHT
    parts: list[str] = []
    for tick in frame.y_ticks():
        y = frame.y(tick)
        parts.append(
            f'<line x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e6e8ee"/>'
        )
        parts.append(_label(_LEFT - 8, y + 4, f"{tick:g}", anchor="end"))
    for tick in nice_ticks(frame.x_low, frame.x_high, 8):
        x = frame.x(tick)
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 5}" stroke="#98a1b2"/>'
        )
        parts.append(_label(x, bottom + 19, f"{tick:,g}", anchor="middle"))
    parts.append(f'<line x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}" stroke="#98a1b2"/>')
    middle = (_LEFT + right) / 2
    parts.append(_label(middle, HEIGHT_PIXELS - 12, x_label, anchor="middle"))
    scale = ", log scale" if frame.is_log else ""
    turned = _label(0, 0, y_label + scale, anchor="middle")
    parts.append(f'<g transform="translate(18 {(_TOP + bottom) / 2:.0f}) rotate(-90)">{turned}</g>')
    return parts


def _line(frame: _Frame, curve: Curve, color: str) -> str:
    ys = [y if y is not None and math.isfinite(y) else None for y in curve.ys]
    commands: list[str] = []
    is_drawing = False
    for index in decimate(ys, _MAX_POINTS):
        value = ys[index]
        if value is None:
            is_drawing = False
            continue
        commands.append(
            f"{'L' if is_drawing else 'M'}{frame.x(curve.xs[index]):.1f} {frame.y(value):.1f}"
        )
        is_drawing = True
    return (
        f'<path d="{"".join(commands)}" fill="none" stroke={quoteattr(color)} stroke-width="2" '
        'stroke-linejoin="round" stroke-linecap="round"/>'
    )


def _legend(curves: Sequence[Curve]) -> list[str]:
    parts: list[str] = []
    x = float(_LEFT)
    for order, curve in enumerate(curves):
        color = quoteattr(_color(curve, order))
        parts.append(
            f'<line x1="{x:.0f}" x2="{x + 22:.0f}" y1="50" y2="50" stroke={color} '
            'stroke-width="3" stroke-linecap="round"/>'
        )
        parts.append(_label(x + 30, 54, curve.label, size=13, color="#1c2330"))
        x += 30 + 7.2 * len(curve.label) + 26
    return parts


def _color(curve: Curve, order: int) -> str:
    return curve.color or _COLORS[order % len(_COLORS)]


def _label(
    x: float,
    y: float,
    text: str,
    *,
    size: int = 12,
    color: str = "#5b6474",
    anchor: str = "start",
    weight: int = 400,
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" '
        f'fill="{color}" text-anchor="{anchor}">{escape(text)}</text>'
    )
