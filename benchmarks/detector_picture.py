"""The picture of `docs/detector.md`: small multiples of curves, verdicts and other rules' flags."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from monitoring.atomic import write_text_atomically  # noqa: E402
from monitoring.ticks import log_ticks  # noqa: E402
from train.recovery.detector import CALM_KINDS, VerdictKind  # noqa: E402

if TYPE_CHECKING:
    from benchmarks.detector_quality import Curve

# Curve, first and last step, title. One panel a kind of event, failures included.
PANELS = (
    ("made_b1_random_bytes_5", 440, 560, "five batches of random bytes"),
    ("made_b6_foreign_50", 330, 500, "fifty foreign batches"),
    ("made_c2_foreign_1", 495, 615, "one foreign batch: a veto is enough"),
    ("made_a11_noln_mix_B6", 200, 320, "natural spikes, no layer norm"),
    ("made_e2_flip30_embed_space", 500, 660, "a bit flip that raises the level"),
    ("made_e7_flip25_page", 480, 600, "a bit flip that heals"),
    ("made_f2_lr_creep_slow", 300, 720, "slow divergence"),
    ("made_j2_early_bad20_at60", 1, 140, "bad data soon after the start"),
    ("made_g2_lic_to_py", 290, 450, "mixture switch, not announced: taken for a spike"),
    ("public_mixtral8x7b_0.8.0_dgx_a100_lts_fa48608", 2400, 3900, "Mixtral 8x7B, every 5th step"),
    ("public_mng_10-10_Muon_eb5659", 4900, 5200, "heavy tail: lone outliers"),
    ("public_llmc_sidd", 9900, 10200, "clean GPT-2 run"),
)
MARKS = {
    VerdictKind.OUTLIER: ("#b7791f", "outlier"),
    VerdictKind.SPIKE: ("#d4352c", "spike"),
    VerdictKind.DIVERGENCE: ("#7a4fd0", "divergence"),
    VerdictKind.NONFINITE: ("#1c2330", "not finite"),
    VerdictKind.LEVEL_SHIFT: ("#1f9d66", "level shift"),
}
OTHERS = {
    "Lightning SpikeDetection": "Lightning",
    "OLMo skip-step": "OLMo",
    "metaseq ratio 1.1": "metaseq 1.1",
    "ZClip 2.5": "ZClip",
}
COLUMNS, WIDTH, HEIGHT, GAP, LEFT, TOP = 3, 290, 150, 62, 66, 86


def write_picture(
    output: Path,
    curves: Sequence[Curve],
    kinds: Mapping[str, Mapping[str, Sequence[VerdictKind]]],
    ours: str,
) -> None:
    """Draw the panels whose curves are given."""
    by_name = {curve.name: curve for curve in curves}
    panels = [panel for panel in PANELS if panel[0] in by_name]
    num_rows = math.ceil(len(panels) / COLUMNS)
    width = LEFT + COLUMNS * (WIDTH + GAP)
    height = TOP + num_rows * (HEIGHT + GAP + 44)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img" aria-label="Verdicts on labelled curves" '
        'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">',
        f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>',
        _text(LEFT, 30, "Verdicts on labelled curves", size=17, color="#1c2330"),
        *_legend(),
    ]
    for order, (name, first, last, title) in enumerate(panels):
        x = LEFT + order % COLUMNS * (WIDTH + GAP)
        y = TOP + 20 + order // COLUMNS * (HEIGHT + GAP + 44)
        parts += _panel(by_name[name], kinds, ours, (first, last), title, (x, y))
    write_text_atomically(output, "\n".join([*parts, "</svg>\n"]))


def _legend() -> list[str]:
    parts, x = [], float(LEFT)
    for color, label in MARKS.values():
        parts.append(f'<circle cx="{x + 5}" cy="52" r="4.5" fill="{color}"/>')
        parts.append(_text(x + 15, 56, label))
        x += 34 + 6.6 * len(label)
    parts.append(f'<rect x="{x}" y="46" width="14" height="12" fill="#d4352c" opacity="0.12"/>')
    parts.append(_text(x + 20, 56, "labelled; ticks below: flags of the public rules"))
    return parts


def _panel(
    curve: Curve,
    kinds: Mapping[str, Mapping[str, Sequence[VerdictKind]]],
    ours: str,
    span: tuple[int, int],
    title: str,
    corner: tuple[float, float],
) -> list[str]:
    left, top = corner
    rows = [row for row, step in enumerate(curve.steps) if span[0] <= step <= span[1]]
    losses = [curve.losses[row] for row in rows if math.isfinite(curve.losses[row])]
    low, high = math.log10(min(losses)), math.log10(max(losses))
    low, high = low - 0.06 * (high - low), high + 0.06 * (high - low)

    def place(row: int) -> tuple[float, float]:
        share = (curve.steps[row] - span[0]) / (span[1] - span[0])
        level = (math.log10(curve.losses[row]) - low) / (high - low)
        return left + share * WIDTH, top + HEIGHT * (1 - level)

    parts = [_text(left, top - 8, title, size=12.5, color="#1c2330")]
    for event in curve.events:
        if event.onset > rows[-1] or event.end < rows[0]:
            continue
        start = place(max(event.onset, rows[0]))[0]
        width = max(2.0, place(min(event.end, rows[-1]))[0] - start)
        color = {"rollback": "#d4352c", "ambiguous": "#98a1b2"}.get(event.needs, "#2f6fde")
        parts.append(
            f'<rect x="{start:.1f}" y="{top}" width="{width:.1f}" height="{HEIGHT}" '
            f'fill="{color}" opacity="0.13"/>'
        )
    for tick in log_ticks(low, high)[:6]:
        y = top + HEIGHT * (1 - (math.log10(tick) - low) / (high - low))
        parts.append(
            f'<path d="M{left} {y:.1f}h{WIDTH}" stroke="#e6e8ee"/>'
            + _text(left - 6, y + 4, f"{tick:g}", anchor="end")
        )
    finite = [row for row in rows if math.isfinite(curve.losses[row])]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, finite))
    parts.append(f'<polyline points="{points}" fill="none" stroke="#4b5565" stroke-width="1.1"/>')
    for row in finite:
        kind = kinds[ours][curve.name][row]
        if kind in MARKS:
            x, y = place(row)
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" fill="{MARKS[kind][0]}"/>')
    for order, (name, label) in enumerate(OTHERS.items()):
        y = top + HEIGHT + 8 + 11 * order
        parts.append(_text(left - 6, y + 7, label, size=9, anchor="end"))
        flagged = [row for row in finite if kinds[name][curve.name][row] not in CALM_KINDS]
        path = "".join(f"M{place(row)[0]:.1f} {y}v7" for row in flagged)
        parts.append(f'<path d="{path or "M0 0"}" stroke="#2f6fde" stroke-width="1.2"/>')
    bottom = top + HEIGHT + 8 + 11 * len(OTHERS) + 10
    parts.append(_text(left, bottom, f"step {span[0]:,}", size=10))
    parts.append(_text(left + WIDTH, bottom, f"{span[1]:,}", size=10, anchor="end"))
    return parts


def _text(
    x: float,
    y: float,
    text: str,
    *,
    size: float = 11,
    color: str = "#5b6474",
    anchor: str = "start",
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{color}" '
        f'text-anchor="{anchor}">{escape(text)}</text>'
    )
