"""How good is the spike detector? Ours and the public rules on the labelled curves of `tests/data`.

Prints a table and one JSON line a detector and family; `--write` puts the table and a picture into
`docs/`. Windows count logged rows:

    found       flagged within 30 rows of the onset; "late": by the labelled end
    chance      how often a clean stretch of 31 rows holds a flag: a recall no better is luck
    false alarm flags less than 10 rows apart, outside events and the 5 rows after them, where
                nothing was wrong (the 30 rows after the onset of a spike or a mixture are left out)
    too much    a spike or divergence where nothing, or one vetoed update, was right
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.detector_picture import write_picture  # noqa: E402
from benchmarks.public_rules import RULES, Rule  # noqa: E402
from train.recovery.detector import (  # noqa: E402
    CALM_KINDS,
    ROLLBACK_KINDS,
    Verdict,
    VerdictKind,
    default_detector,
)

DATA = ROOT / "tests/data"
DOCUMENT, PICTURE = ROOT / "docs/detector.md", ROOT / "docs/detector-curves.svg"
SEARCHED_ROWS, MERGED_ROWS, SPARED_ROWS = 30, 10, 5
MIXTURE = "legit_mixture_switch"
OURS = "Trimtab"
Detector = Callable[[], Rule]


@dataclass(frozen=True, kw_only=True)
class Event:
    """A labelled stretch, in rows."""

    onset: int
    end: int
    cause: str
    needs: str
    num_bad: int


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One training run as it was logged."""

    name: str
    provenance: str
    family: str
    steps: Sequence[int]
    losses: Sequence[float]
    norms: Sequence[float | None]
    events: Sequence[Event]
    clean_from: int


@dataclass
class Score:
    """Counts over curves; ratios are None where there is nothing to count."""

    num_rollback: int = 0
    num_found: int = 0
    num_found_rollback: int = 0
    num_found_late: int = 0
    delays: list[int] = field(default_factory=list)
    chances: list[float | None] = field(default_factory=list)
    num_windows: int = 0
    num_hit_windows: int = 0
    num_skips: int = 0
    num_skips_found: int = 0
    num_skips_hit: int = 0
    num_nothing: int = 0
    num_too_much: int = 0
    num_clean: int = 0
    num_false: int = 0
    num_false_rollback: int = 0

    def add(self, other: Score) -> None:
        """Add the counts of another curve."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def figures(self) -> dict[str, float | None]:
        """Return recall, false alarms per 10,000 clean rows and the rest, as shares and rows."""
        pooled = _ratio(self.num_hit_windows, self.num_windows) or 0.0
        chances = [pooled if chance is None else chance for chance in self.chances]
        found = self.num_found + self.num_skips_found
        return {
            "recall": _ratio(self.num_found, self.num_rollback),
            "chance": _ratio(sum(chances), len(chances)),
            "recall_rollback": _ratio(self.num_found_rollback, self.num_rollback),
            "recall_late": _ratio(self.num_found_late, self.num_rollback),
            "precision": _ratio(found, found + self.num_false),
            "delay_rows": median(self.delays) if self.delays else None,
            "false_per_10k": _ratio(1e4 * self.num_false, self.num_clean),
            "false_rollback_per_10k": _ratio(1e4 * self.num_false_rollback, self.num_clean),
            "skips_hit": _ratio(self.num_skips_hit, self.num_skips),
            "too_much": _ratio(self.num_too_much, self.num_skips + self.num_nothing),
        }


def load_curves(folder: Path = DATA) -> list[Curve]:
    """Read all curves and their labels."""
    labels = json.loads((folder / "labels.json").read_text())
    rows: dict[str, list[dict[str, str]]] = {name: [] for name in labels}
    with gzip.open(folder / "curves.csv.gz", "rt", newline="") as file:
        for row in csv.DictReader(file):
            rows[row["curve"]].append(row)
    return [_curve(name, label, rows[name]) for name, label in labels.items()]


def _curve(name: str, label: dict[str, object], rows: Sequence[dict[str, str]]) -> Curve:
    steps = [int(row["step"]) for row in rows]
    row_of = {step: row for row, step in enumerate(steps)}
    events = [
        Event(
            onset=row_of[spike["onset"]],
            end=row_of.get(spike["end"], len(rows) - 1),
            cause=spike["cause"],
            needs=spike["needs"],
            num_bad=max(1, spike.get("bad_batches", 1)),
        )
        for spike in label["spikes"]  # type: ignore[attr-defined]
    ]
    return Curve(
        name=name,
        provenance=str(label["provenance"]),
        family=str(label["family"]),
        steps=steps,
        losses=[float(row["loss"]) for row in rows],
        norms=[float(row["grad_norm"]) if row["grad_norm"] else None for row in rows],
        events=events,
        clean_from=int(label.get("clean_from", 0)),  # type: ignore[call-overload]
    )


def replay(make: Detector, curve: Curve) -> list[VerdictKind]:
    """Return the kind of verdict on each row."""
    detector = make()
    rows = zip(curve.steps, curve.losses, curve.norms, strict=True)
    verdicts = [detector.update(*row) for row in rows]
    return [item.kind if isinstance(item, Verdict) else item for item in verdicts]


def score(curve: Curve, kinds: Sequence[VerdictKind]) -> Score:
    """Compare the verdicts on one curve with its labels."""
    last = len(kinds) - 1
    flags = [kind not in CALM_KINDS for kind in kinds]
    severe = [kind in ROLLBACK_KINDS for kind in kinds]
    is_spared = [False] * len(kinds)
    result = Score()
    for event in curve.events:
        searched = range(event.onset, min(last, event.onset + SEARCHED_ROWS) + 1)
        near = range(event.onset, min(last, event.end + SPARED_ROWS) + 1)
        is_long = event.needs in ("rollback", "ambiguous") or event.cause == MIXTURE
        for row in {*near, *searched} if is_long else near:
            is_spared[row] = True
        if event.needs == "rollback":
            _score_spike(result, event, flags, severe, searched)
        elif event.needs in ("skip_update", "none"):
            _score_harmless(result, event, flags, kinds, searched, near)
    clean = [row for row in range(curve.clean_from, len(kinds)) if not is_spared[row]]
    result.num_clean = len(clean)
    result.num_false = _episodes(row for row in clean if flags[row])
    result.num_false_rollback = _episodes(row for row in clean if severe[row])
    result.num_windows, result.num_hit_windows = _windows(is_spared, flags)
    known = result.num_windows >= 100
    chance = result.num_hit_windows / result.num_windows if known else None
    result.chances = [chance] * result.num_rollback
    return result


def _score_spike(
    result: Score, event: Event, flags: Sequence[bool], severe: Sequence[bool], searched: range
) -> None:
    result.num_rollback += 1
    delay = next((row - event.onset for row in searched if flags[row]), None)
    if delay is not None:
        result.num_found += 1
        result.delays.append(delay)
    result.num_found_rollback += any(severe[row] for row in searched)
    result.num_found_late += any(flags[event.onset : event.end + 1])


def _score_harmless(
    result: Score,
    event: Event,
    flags: Sequence[bool],
    kinds: Sequence[VerdictKind],
    searched: range,
    near: range,
) -> None:
    if event.needs == "skip_update":
        result.num_skips += 1
        result.num_skips_found += any(flags[row] for row in searched)
        result.num_skips_hit += any(flags[event.onset : event.onset + event.num_bad])
    else:
        result.num_nothing += 1
    too_much = (VerdictKind.SPIKE, VerdictKind.DIVERGENCE)
    result.num_too_much += any(kinds[row] in too_much for row in near)


def _episodes(rows: Iterable[int]) -> int:
    count, last = 0, -MERGED_ROWS - 1
    for row in rows:
        count += row - last > MERGED_ROWS
        last = row
    return count


def _windows(is_spared: Sequence[bool], flags: Sequence[bool]) -> tuple[int, int]:
    """Count the clean windows as long as a search, and those of them that hold a flag."""
    total = hit = length = 0
    last = -SEARCHED_ROWS - 1
    for row, (spared, flag) in enumerate(zip(is_spared, flags, strict=True)):
        length = 0 if spared else length + 1
        last = row if flag else last
        if length > SEARCHED_ROWS:
            total += 1
            hit += last >= row - SEARCHED_ROWS
    return total, hit


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def pooled(scores: Iterable[Score]) -> Score:
    """Return the sum of the counts."""
    total = Score()
    for item in scores:
        total.add(item)
    return total


COLUMNS = {
    "recall": "recall %",
    "chance": "chance %",
    "recall_rollback": "at rollback level %",
    "recall_late": "by the end %",
    "precision": "precision %",
    "delay_rows": "delay, rows",
    "false_per_10k": "false alarms",
    "false_rollback_per_10k": "at rollback level",
    "too_much": "too much %",
}
FAMILY_COLUMNS = ("recall", "recall_rollback", "false_per_10k", "too_much")


def cell(key: str, value: float | None) -> str:
    """Return a figure as the table shows it."""
    if value is None:
        return "–"
    if key in ("delay_rows",):
        return f"{value:g}"
    return f"{value:.1f}" if key.startswith("false") else f"{100 * value:.0f}"


def markdown(names: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Return a table in Markdown."""
    lines = [f"| {' | '.join(names)} |", "|---|" + "---:|" * (len(names) - 1)]
    lines += [f"| {label} | {' | '.join(cells)} |" for label, cells in rows]
    return "\n".join(lines)


def main() -> None:
    """Replay, score, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the table and the picture")
    parser.add_argument("--family", help="only families that begin so")
    options = parser.parse_args()
    curves = [c for c in load_curves() if c.family.startswith(options.family or "")]
    detectors: dict[str, Detector] = {OURS: default_detector, **RULES}
    kinds = {
        name: {curve.name: replay(make, curve) for curve in curves}
        for name, make in detectors.items()
    }
    scores = {
        name: {curve.name: score(curve, kinds[name][curve.name]) for curve in curves}
        for name in detectors
    }
    families = sorted({curve.family for curve in curves})
    overall: list[tuple[str, list[str]]] = []
    by_family: list[tuple[str, list[str]]] = []
    for family in ["all", *families]:
        chosen = [curve.name for curve in curves if family in ("all", curve.family)]
        for name in detectors:
            total = pooled(scores[name][key] for key in chosen)
            figures = total.figures()
            print(json.dumps({"detector": name, "family": family, **figures}))
            if family == "all":
                overall.append((name, [cell(key, figures[key]) for key in COLUMNS]))
            elif name == OURS:
                counts = [total.num_rollback, total.num_skips + total.num_nothing, total.num_clean]
                cells = [cell(key, figures[key]) for key in FAMILY_COLUMNS]
                by_family.append((f"`{family}`", [*map(str, counts), *cells]))
    table = Table("detector", *COLUMNS.values(), title="false alarms: per 10,000 clean rows")
    for name, cells in overall:
        table.add_row(name, *cells)
    Console().print(table)
    if options.write:
        first = markdown(["detector", *COLUMNS.values()], overall)
        names = ["family", "need rollback", "harmless", "clean rows"]
        second = markdown([*names, *(COLUMNS[key] for key in FAMILY_COLUMNS)], by_family)
        text = DOCUMENT.read_text()
        for marker, block in (("overall", first), ("families", second)):
            before, rest = text.split(f"<!-- {marker} -->\n", 1)
            after = rest.split(f"<!-- end of {marker} -->", 1)[1]
            start, end = f"<!-- {marker} -->\n", f"\n<!-- end of {marker} -->"
            text = f"{before}{start}\n{block}\n{end}{after}"
        DOCUMENT.write_text(text)
        write_picture(PICTURE, curves, kinds, OURS)


if __name__ == "__main__":
    main()
