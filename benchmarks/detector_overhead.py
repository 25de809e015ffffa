"""What does the detector cost a step? Microseconds of `update`, one JSON line a case.

On a real curve, calm and in spikes, with the loss and the gradient norm, and with all signals of a
model of 80 layer groups. It reads numbers that are in the step's one fused reduce already, so it
needs no collective of its own and no host sync.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.detector_quality import load_curves  # noqa: E402
from train.recovery.detector import SpikeDetector  # noqa: E402

LIMIT_MICROSECONDS, LIMIT_ALL_SIGNALS_MICROSECONDS = 20, 40
CALM, SPIKING = "public_bng_log_bigger", "made_a11_noln_mix_B6"
Update = Callable[[SpikeDetector, int, float, float | None, Sequence[float]], object]


def with_norm(
    detector: SpikeDetector, step: int, loss: float, norm: float | None, groups: Sequence[float]
) -> object:
    """Judge the loss and the gradient norm."""
    return detector.update(step, loss, norm)


def with_all(
    detector: SpikeDetector, step: int, loss: float, norm: float | None, groups: Sequence[float]
) -> object:
    """Judge all signals."""
    return detector.update(
        step, loss, norm, update_norm=norm, group_norms=groups, nonfinite_share=0.0
    )


def measure(name: str, update: Update, num_groups: int, repeats: int) -> dict[str, object]:
    """Time each step of a curve, replayed `repeats` times by a new detector."""
    curve = next(curve for curve in load_curves() if curve.name == name)
    noise = random.Random(0)
    groups = [[math.exp(noise.gauss(0, 0.2)) for _ in range(num_groups)] for _ in range(61)]
    rows = list(zip(curve.steps, curve.losses, curve.norms, strict=True))
    microseconds = []
    for _ in range(repeats):
        detector = SpikeDetector()
        for row, (step, loss, norm) in enumerate(rows):
            norms = groups[row % len(groups)]
            start = time.perf_counter_ns()
            update(detector, step, loss, norm, norms)
            microseconds.append((time.perf_counter_ns() - start) / 1e3)
    microseconds.sort()
    return {
        "curve": name,
        "groups": num_groups,
        "steps": len(microseconds),
        "median_microseconds": round(microseconds[len(microseconds) // 2], 2),
        "p99_microseconds": round(microseconds[len(microseconds) * 99 // 100], 2),
        "limit_microseconds": LIMIT_ALL_SIGNALS_MICROSECONDS if num_groups else LIMIT_MICROSECONDS,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    cases: tuple[tuple[str, Update, int], ...] = (
        ("loss and gradient norm", with_norm, 0),
        ("all signals, 20 groups", with_all, 20),
        ("all signals, 80 groups", with_all, 80),
    )
    for state, curve in (("calm", CALM), ("spikes", SPIKING)):
        for label, update, num_groups in cases:
            figures = measure(curve, update, num_groups, options.repeats)
            print(json.dumps({"case": label, "state": state, **figures}), flush=True)


if __name__ == "__main__":
    main()
