"""How fast does one device train a model of a given shape? One JSON line a case.

Runs the real entry point for a few steps and reads its metrics: median tokens/s and MFU (PaLM's
convention, arXiv 2204.02311 appendix B) of the steps after the first few, and the share of time
that a step waited for data.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
# hidden size, layers, heads, key-value heads, vocabulary, sequence length, samples a batch
SHAPES = {
    "nano": (128, 4, 4, 1, 2048, 128, 16),
    "125M": (768, 12, 12, 1, 32768, 1024, 32),
    "1.3B": (2048, 24, 16, 1, 32768, 2048, 8),
}
WARM_UP_STEPS = 5


def measure(shape: str, num_steps: int, overrides: list[str]) -> dict[str, float | str]:
    """Train `num_steps` steps of one shape and return its figures."""
    hidden, layers, heads, kv_heads, vocabulary, length, batch = SHAPES[shape]
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [str(ROOT / "train/main.py"), "+exp=falcon_like", f"run.dir={scratch}"]
        command += [f"model.hidden_size={hidden}", f"model.num_layers={layers}"]
        command += [f"model.num_heads={heads}", f"model.num_kv_heads={kv_heads}"]
        command += [f"data.sequence_length={length}", f"schedule.batch_samples={batch}"]
        command += [
            "schedule.batch_ramp_steps=0",
            f"model.vocab_size={vocabulary}",
            "optim.lr=1e-4",
            "schedule.warmup_steps=2",
        ]
        command += ["checkpoint.save_at_start=false", "checkpoint.save_at_end=false"]
        command += ["checkpoint.interval_steps=1000000", "recovery=none", "run.name=bench"]
        command += [f"run.steps={num_steps}", f"data.validation_samples={batch}", *overrides]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            return {"case": shape, "error": done.stderr[-3000:]}
        lines = (Path(scratch) / "bench/metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines][WARM_UP_STEPS:]
    waits = sum(r["data_seconds"] for r in records) / sum(r["step_seconds"] for r in records)
    return {
        "case": shape,
        "tokens_per_second": round(median(r["tokens_per_second"] for r in records)),
        "mfu": round(median(r["mfu"] or 0.0 for r in records), 4),
        "step_milliseconds": round(1e3 * median(r["step_seconds"] for r in records), 2),
        "data_wait_share": round(waits, 5),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="default: nano")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("overrides", nargs="*", help="more overrides, e.g. engine=fsdp")
    options = parser.parse_args()
    for shape in options.shape or ["nano"]:
        figures = measure(shape, options.steps, options.overrides)
        print(json.dumps({**figures, "overrides": " ".join(options.overrides)}), flush=True)


if __name__ == "__main__":
    main()
