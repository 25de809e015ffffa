"""What does recovery save? The default recipe three times: no fault, a fault, a fault and recovery.

Prints one JSON line a run and one for the comparison; `--output` draws the three curves.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from monitoring.comparison import Curve, write_comparison  # noqa: E402
from monitoring.records import number, read_run  # noqa: E402

COLORS = {
    "no fault": "#98a1b2",
    "fault, nothing acts": "#d4352c",
    "fault, Trimtab recovers": "#1f9d66",
}
RUNS = {
    "no fault": ["chaos=none"],
    "fault, nothing acts": ["chaos=bad_data", "recovery=none"],
    "fault, Trimtab recovers": ["chaos=bad_data"],
}


def running_mean(values: list[float], width: int = 5) -> list[float]:
    """Return the mean of each value and the few before it, to make the end of a run readable."""
    return [fmean(values[max(0, end - width) : end]) for end in range(1, len(values) + 1)]


def train(folder: Path, name: str, overrides: list[str]) -> dict[str, float]:
    """Run the recipe once and return what its summary says."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [str(ROOT / "train/main.py"), "+exp=falcon_like", f"run.dir={folder}"]
    command += [f"run.name={name}", *overrides]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ)
    if done.returncode:
        raise SystemExit(done.stderr)
    summary = json.loads((folder / name / "summary.json").read_text())
    keys = ("validation_loss_nats", "final_loss_nats", "rewinds", "skipped_tokens", "wall_seconds")
    return {key: summary[key] for key in keys}


def main() -> None:
    """Run, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="write the picture (SVG) here")
    parser.add_argument("overrides", nargs="*", help="more overrides for all three runs")
    options = parser.parse_args()
    results, curves = {}, []
    with tempfile.TemporaryDirectory() as scratch:
        for number_, (label, overrides) in enumerate(RUNS.items()):
            name = f"run{number_}"
            results[label] = train(Path(scratch), name, [*overrides, *options.overrides])
            print(json.dumps({"case": label, **results[label]}), flush=True)
            records = read_run(Path(scratch) / name).curve
            points = [(r["clock"], number(r, "loss_nats")) for r in records]
            kept = [(float(x), y) for x, y in points if y is not None]
            curves.append(
                Curve(
                    label=label,
                    xs=[x for x, _ in kept],
                    ys=running_mean([y for _, y in kept]),
                    color=COLORS[label],
                )
            )
    losses = {label: result["validation_loss_nats"] for label, result in results.items()}
    clean, untreated, recovered = losses.values()
    comparison = {
        "case": "comparison",
        "recovered_over_clean": recovered / clean - 1,
        "untreated_over_clean": untreated / clean - 1,
    }
    print(json.dumps(comparison))
    if options.output:
        title = "Loss of the default recipe with a bad stretch of data"
        write_comparison(
            curves,
            options.output,
            title,
            x_label="updates executed",
            y_label="training loss (nats), mean of 5",
        )


if __name__ == "__main__":
    main()
