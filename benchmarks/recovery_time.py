"""How long from detection to the next applied update? From memory, from disk, by a restart.

Runs the real entry point. A rewind is asked for in the middle of the run, first with snapshots in
memory, then with checkpoints on disk alone; both are timed from the decision to the end of the
first update after it. For the restart, the same run is killed and the same command started again,
timed from the kill: what a job does whose recovery is to load its last checkpoint. Nothing is
counted that a cluster would add (scheduling, nodes that come and go). One JSON line a case.

The step itself is in all three, and at 200M parameters on a CPU it is most of the time from memory;
so both are given: up to the end of the next update, and up to the moment when it can begin. The
batch is one sample of 64 tokens a rank, to keep it small.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# hidden size, layers, heads; the head is tied to an embedding of 2,048 tokens.
SHAPES = {"10M": (320, 9, 5), "200M": (1024, 19, 8)}
TIMEOUT_SECONDS = 900


def command(shape: str, num_ranks: int, folder: Path, *overrides: str) -> list[str]:
    """Return the command line of one run."""
    hidden, layers, heads = SHAPES[shape]
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(num_ranks), str(ROOT / "train/main.py"), "+exp=falcon_like"),
        *(f"run.dir={folder.parent}", f"run.name={folder.name}", "run.steps=100000"),
        *(f"model.hidden_size={hidden}", f"model.num_layers={layers}", f"model.num_heads={heads}"),
        *("data.sequence_length=64", f"schedule.batch_samples={num_ranks}"),
        *("schedule.batch_ramp_steps=0", "optim.lr=1e-5", "schedule.warmup_steps=2"),
        *("recovery=ladder", "recovery.veto=nonfinite", "recovery.threshold_sigma=1000"),
        *("checkpoint.interval_steps=4", "checkpoint.good_after_steps=2", "checkpoint.keep_good=2"),
        "checkpoint.save_at_end=false",
        f"engine={'single' if num_ranks == 1 else 'fsdp'}",
        *overrides,
    ]


class Job:
    """One start of a run, in a session of its own."""

    def __init__(self, arguments: list[str], folder: Path) -> None:
        self.folder = folder
        self.started = time.time()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self._log = (folder.parent / "output").open("a")
        self._process = subprocess.Popen(
            arguments,
            env=environment,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait_for(self, is_there: Callable[[dict[str, Any]], bool], file: str) -> dict[str, Any]:
        """Return the first record of `file` for which `is_there`, as soon as it is written."""
        deadline = time.time() + TIMEOUT_SECONDS
        while time.time() < deadline:
            for record in records(self.folder / file):
                if is_there(record):
                    return record
            if self._process.poll() is not None:
                raise RuntimeError((self.folder.parent / "output").read_text()[-3000:])
            time.sleep(0.05)
        raise TimeoutError(f"{file}: nothing after {TIMEOUT_SECONDS} s")

    def kill(self) -> float:
        """End it at once and return when."""
        killed = time.time()
        for pid in [*_children(self._process.pid), self._process.pid]:  # ranks have own sessions
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()
        return killed


def _children(pid: int) -> list[int]:
    """Return the processes that `pid` has started, and those that they have."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, task.read_text().split()):
                found += [child, *_children(child)]
    return found


def records(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a file of JSON lines."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines if line]


def ask_for_rewind(folder: Path, step: int) -> None:
    """Leave a request as `trimtab rewind RUN --to STEP` does."""
    requests = folder / "control" / "requests"
    requests.mkdir(parents=True, exist_ok=True)
    temporary = requests / ".request"
    temporary.write_text(json.dumps({"kind": "rewind", "to_step": step, "amount": "0 tokens"}))
    temporary.rename(requests / "request.json")


def measure_rewind(shape: str, num_ranks: int, folder: Path, *overrides: str) -> dict[str, float]:
    """Return the seconds from the decision to ready, and to the end of the next update."""
    job = Job(command(shape, num_ranks, folder, *overrides), folder)
    try:
        job.wait_for(lambda r: r["step"] >= 11, "metrics.jsonl")
        ask_for_rewind(folder, 8)
        event = job.wait_for(lambda r: r["kind"] == "rewind", "events.jsonl")
        first = job.wait_for(lambda r: r["clock"] > event["from_clock"], "metrics.jsonl")
        job.wait_for(lambda r: r["clock"] > event["from_clock"] + 2, "metrics.jsonl")
    finally:
        job.kill()
    steps = [r["step_seconds"] for r in records(folder / "metrics.jsonl") if r["step"] > 4]
    decided = event["time"] - event["seconds"]
    snapshots = [r["seconds"] for r in records(folder / "events.jsonl") if r["kind"] == "snapshot"]
    return {
        "ready_seconds": event["seconds"],
        "next_update_seconds": first["time"] - decided,
        "step_seconds": median(steps),
        "snapshot_stall_seconds": median(snapshots[1:]) if len(snapshots) > 1 else 0.0,
    }


def measure_restart(shape: str, num_ranks: int, folder: Path) -> float:
    """Return the seconds from a kill to the end of the first update of the restarted job."""
    arguments = command(shape, num_ranks, folder, "checkpoint.keep_snapshots=0")
    job = Job(arguments, folder)
    job.wait_for(lambda r: r["step"] >= 9, "metrics.jsonl")
    killed = job.kill()
    again = Job(arguments, folder)
    try:
        first = again.wait_for(lambda r: r["attempt"] == 1, "metrics.jsonl")
    finally:
        again.kill()
    return float(first["time"]) - killed


def measure(shape: str, num_ranks: int) -> dict[str, object]:
    """Return all figures of one case."""
    with tempfile.TemporaryDirectory(prefix="trimtab-recovery-") as scratch:
        root = Path(scratch)
        memory = measure_rewind(shape, num_ranks, root / "memory")
        disk = measure_rewind(shape, num_ranks, root / "disk", "checkpoint.keep_snapshots=0")
        restart = measure_restart(shape, num_ranks, root / "restart")
    ready = restart - memory["step_seconds"]
    return {
        "case": f"{shape}, {num_ranks} rank{'s' if num_ranks > 1 else ''}",
        "step_seconds": round(memory["step_seconds"], 3),
        "snapshot_stall_seconds": round(memory["snapshot_stall_seconds"], 3),
        "memory_ready_seconds": round(memory["ready_seconds"], 3),
        "memory_next_update_seconds": round(memory["next_update_seconds"], 3),
        "disk_ready_seconds": round(disk["ready_seconds"], 3),
        "disk_next_update_seconds": round(disk["next_update_seconds"], 3),
        "restart_next_update_seconds": round(restart, 3),
        "restart_over_memory": round(restart / memory["next_update_seconds"], 1),
        "restart_over_disk": round(restart / disk["next_update_seconds"], 1),
        "restart_over_memory_until_ready": round(ready / memory["ready_seconds"], 1),
        "restart_over_disk_until_ready": round(ready / disk["ready_seconds"], 1),
        "memory_in_steps": round(memory["next_update_seconds"] / memory["step_seconds"], 2),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="default: all")
    parser.add_argument("--ranks", type=int, action="append", help="default: 1 and 2")
    options = parser.parse_args()
    for shape in options.shape or list(SHAPES):
        for num_ranks in options.ranks or [1, 2]:
            print(json.dumps(measure(shape, num_ranks)), flush=True)


if __name__ == "__main__":
    main()
