"""What does a save cost? Stall and background of async saves against sync ones. JSON lines.

Runs the real entry point at 200M parameters (2.4 GB of state) on 1 and 2 ranks, once with
checkpoint.is_async and once without, and reads what the loop wrote down itself. Beside it, the
limits: one copy of the state in memory, and one write of it to the same disk with fsync, both by
as many processes at once as there are ranks.

Targets: the async stall is at most a tenth of a sync save, and less than 1.5 copies of the state;
a step while a save is under way takes at most 1.15 times the normal. Each line says which are met.

The first save of a run is left out: it is at once by design, and buffers are made for it. On a CPU
the write takes cores from the training that it goes on beside; how many are left over is said.
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
MAX_STALL_OVER_SYNC = 0.10
MAX_STALL_OVER_COPY = 1.5
MAX_STEP_RATIO = 1.15
# Run by as many processes at once as there are ranks: copy a share of the state, then write it.
LIMITS = """
import os, sys, time, torch
torch.set_num_threads(1)
size, path = int(sys.argv[1]), sys.argv[2]
source, target = torch.ones(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
def copied():
    started = time.perf_counter()
    target.copy_(source)
    return time.perf_counter() - started
copy_seconds = sorted(copied() for _ in range(5))[2]
started = time.perf_counter()
with open(path, "wb") as file:
    file.write(memoryview(target.numpy()))
    os.fsync(file.fileno())
print(copy_seconds, time.perf_counter() - started)
os.unlink(path)
"""


def arguments(shape: str, num_ranks: int, folder: Path, options: argparse.Namespace) -> list[str]:
    """Return the command line of one run, without the way it saves."""
    hidden, layers, heads = SHAPES[shape]
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(num_ranks), str(ROOT / "train/main.py"), "+exp=falcon_like"),
        *(f"run.dir={folder.parent}", f"run.name={folder.name}", f"run.steps={options.steps}"),
        *(f"model.hidden_size={hidden}", f"model.num_layers={layers}", f"model.num_heads={heads}"),
        *("data.sequence_length=64", f"schedule.batch_samples={num_ranks * options.samples}"),
        *("schedule.batch_ramp_steps=0", "optim.lr=1e-5", "schedule.warmup_steps=2"),
        *("recovery=ladder", "recovery.veto=nonfinite", "recovery.threshold_sigma=1000"),
        *(f"checkpoint.interval_steps={options.interval}", "checkpoint.good_after_steps=2"),
        *("checkpoint.keep_good=2", "checkpoint.save_at_end=false"),
        *(
            f"data.validation_samples={num_ranks}",
            f"engine={'single' if num_ranks == 1 else 'fsdp'}",
        ),
        *options.overrides,
    ]


def records(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(command: list[str], folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Run to the end and return its metrics and its events."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
    return records(folder / "metrics.jsonl"), records(folder / "events.jsonl")


def saves_of(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the saves but the first, each with the whole stall: the copy to memory is part of it.

    Where a save goes to memory and to disk, one copy serves both and is told of as a snapshot.
    """
    copies = {event["clock"]: event["seconds"] for event in events if event["kind"] == "snapshot"}
    saves = [event for event in events if event["kind"] == "checkpoint_saved"]
    return [
        {**save, "copy": copies.get(save["clock"], 0.0)} for save in sorted(saves, key=_clock)[1:]
    ]


def _clock(record: dict[str, Any]) -> int:
    return int(record["clock"])


def step_seconds(
    metrics: list[dict[str, Any]], saves: list[dict[str, Any]], warm_clock: int
) -> tuple[list[float], list[float]]:
    """Return the seconds of steps while a save was under way, and of those without one."""
    spans = [(save["time"] - save["background_seconds"], save["time"]) for save in saves]
    during, without = [], []
    for record in metrics:
        began, ended = record["time"] - record["step_seconds"], record["time"]
        if record["clock"] <= warm_clock:
            continue
        if any(start <= began and ended <= stop for start, stop in spans):
            during.append(record["step_seconds"])
        elif not any(began < stop and start < ended for start, stop in spans):
            without.append(record["step_seconds"])
    return during, without


def limits(num_bytes: int, num_ranks: int, folder: Path) -> tuple[float, float]:
    """Return the seconds of copying the state in memory and of writing it, by all ranks at once."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", LIMITS, str(num_bytes // num_ranks), str(folder / str(rank))],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(num_ranks)
    ]
    answers = [process.communicate()[0].split() for process in processes]
    return max(float(copy) for copy, _ in answers), max(float(write) for _, write in answers)


def measure(shape: str, num_ranks: int, options: argparse.Namespace) -> dict[str, object]:
    """Return all figures of one case."""
    with tempfile.TemporaryDirectory(prefix="trimtab-checkpoint-", dir=options.dir) as scratch:
        root = Path(scratch)
        command = arguments(shape, num_ranks, root / "at-once", options)
        _, sync_events = run([*command, "checkpoint.is_async=false"], root / "at-once")
        command = arguments(shape, num_ranks, root / "beside", options)
        metrics, events = run([*command, "checkpoint.is_async=true"], root / "beside")
        at_once, beside = saves_of(sync_events), saves_of(events)
        num_bytes = int(beside[0]["bytes"])
        copy_seconds, disk_seconds = limits(num_bytes, num_ranks, root)
    during, without = step_seconds(metrics, beside, warm_clock=options.interval)
    # In a run, the last save is at once too, as everything is that nothing goes on beside.
    beside = [save for save in beside if save["background_seconds"] > 0]
    sync = median(save["seconds"] for save in at_once)
    stall = median(save["seconds"] + save["copy"] for save in beside)
    background = median(save["background_seconds"] for save in beside)
    if not without:
        raise RuntimeError("a save was always under way: give a larger --interval")
    normal = median(without)
    ratio = median(during) / normal if during else None
    spare_cores = len(os.sched_getaffinity(0)) - num_ranks
    met = {
        "stall_over_sync": stall <= MAX_STALL_OVER_SYNC * sync,
        "stall_over_copy": stall < MAX_STALL_OVER_COPY * copy_seconds,
        "step_ratio": ratio is not None and ratio <= MAX_STEP_RATIO,
    }
    return {
        "case": f"{shape}, {num_ranks} rank{'s' if num_ranks > 1 else ''}",
        "state_bytes": num_bytes,
        "num_saves": len(beside),
        "sync_save_seconds": round(sync, 3),
        "async_stall_seconds": round(stall, 3),
        "async_stall_without_copy_seconds": round(median(save["seconds"] for save in beside), 3),
        "background_seconds": round(background, 2),
        "memcpy_seconds": round(copy_seconds, 3),
        "disk_write_seconds": round(disk_seconds, 3),
        "sync_bytes_per_second": round(num_bytes / sync),
        "background_bytes_per_second": round(num_bytes / background),
        "disk_bytes_per_second": round(num_bytes / disk_seconds),
        "memcpy_bytes_per_second": round(num_bytes / copy_seconds),
        "stall_over_sync": round(stall / sync, 3),
        "stall_over_copy": round(stall / copy_seconds, 2),
        "step_seconds": round(normal, 3),
        "step_seconds_while_saving": round(median(during), 3) if during else None,
        "step_ratio": None if ratio is None else round(ratio, 3),
        "num_steps_while_saving": len(during),
        "spare_cores": spare_cores,
        "targets_met": met,
        "why_not": _why_not(met, spare_cores),
    }


def _why_not(met: dict[str, bool], spare_cores: int) -> str:
    if all(met.values()):
        return ""
    if not met["step_ratio"] and spare_cores <= 0:
        return "no core is spare: training and writing share those that there are"
    return "see the figures"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="default: 200M")
    parser.add_argument("--ranks", type=int, action="append", help="default: 1 and 2")
    parser.add_argument("--steps", type=int, default=61)
    parser.add_argument("--interval", type=int, default=20, help="steps between saves")
    parser.add_argument("--samples", type=int, default=1, help="samples of 64 tokens a rank")
    parser.add_argument("--dir", help="where the checkpoints go; default: the temporary folder")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    for shape in options.shape or ["200M"]:
        for num_ranks in options.ranks or [1, 2]:
            print(json.dumps(measure(shape, num_ranks, options)), flush=True)


if __name__ == "__main__":
    main()
