"""What do the searches for silent corruption cost? One JSON line a case.

Runs the real entry point under `ddp`, with replicas compared at each step and every third step
executed twice, and reads its own timeline: the median of a check, its share of a step, and its
share of a run at the default interval. The batch is one sample of `--tokens` tokens a rank: the
smaller the step, the larger the share.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# hidden size, layers, heads; the head is tied to an embedding of 2,048 tokens.
SHAPES = {"10M": (320, 9, 5), "200M": (1024, 19, 8)}
WARM_UP_STEPS = 2
REEXECUTION_INTERVAL = 3
DEFAULT_INTERVAL = 100


def command(shape: str, num_ranks: int, tokens: int, num_steps: int, folder: Path) -> list[str]:
    """Return the command line of one run."""
    hidden, layers, heads = SHAPES[shape]
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(num_ranks), str(ROOT / "train/main.py"), "+exp=falcon_like"),
        *(f"run.dir={folder}", "run.name=bench", f"run.steps={num_steps}", "engine=ddp"),
        *(f"model.hidden_size={hidden}", f"model.num_layers={layers}", f"model.num_heads={heads}"),
        *(f"data.sequence_length={tokens}", f"schedule.batch_samples={num_ranks}"),
        *("schedule.batch_ramp_steps=0", "optim.lr=1e-5", "schedule.warmup_steps=2"),
        *("data.validation_samples=0", "recovery=none", "checkpoint.interval_steps=1000000"),
        *("checkpoint.save_at_start=false", "checkpoint.save_at_end=false"),
        *("checkpoint.keep_snapshots=0", "integrity.replica_check_interval_steps=1"),
        f"integrity.reexecution_interval_steps={REEXECUTION_INTERVAL}",
    ]


def records(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def measure(shape: str, num_ranks: int, tokens: int, num_steps: int) -> dict[str, object]:
    """Run one shape and return its figures."""
    with tempfile.TemporaryDirectory() as scratch:
        done = subprocess.run(
            command(shape, num_ranks, tokens, num_steps, Path(scratch)),
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            check=False,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            return {"case": shape, "error": (done.stdout + done.stderr)[-3000:]}
        metrics = records(Path(scratch) / "bench" / "metrics.jsonl")
        events = records(Path(scratch) / "bench" / "events.jsonl")
    plain = [
        record["step_seconds"]
        for record in metrics
        if record["step"] > WARM_UP_STEPS and record["step"] % REEXECUTION_INTERVAL
    ]
    step = median(plain)
    checks = [event for event in events if event["kind"] == "integrity_check"]
    assert not any(event["ranks"] for event in checks), "no alarm without a fault"
    replicas = median(
        event["seconds"]
        for event in checks
        if event["check"] == "replicas" and event["step"] > WARM_UP_STEPS
    )
    twice = [event["seconds"] for event in checks if event["check"] == "reexecution"]
    extra = median(twice[1:] or twice) - step  # the first one makes its buffers
    return {
        "case": shape,
        "num_ranks": num_ranks,
        "tokens_per_rank": tokens,
        "step_milliseconds": round(1e3 * step, 1),
        "replica_check_milliseconds": round(1e3 * replicas, 1),
        "replica_check_share_of_step": round(replicas / step, 4),
        "replica_check_share_every_100": round(replicas / step / DEFAULT_INTERVAL, 6),
        "reexecution_extra_milliseconds": round(1e3 * extra, 1),
        "reexecution_extra_steps": round(extra / step, 2),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="default: both")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=14)
    options = parser.parse_args()
    for shape in options.shape or list(SHAPES):
        print(json.dumps(measure(shape, options.ranks, options.tokens, options.steps)), flush=True)


if __name__ == "__main__":
    main()
