"""How long from the command to the first finished step, warm? One JSON line a case.

The limit is what any trainer pays: an interpreter that imports torch, twice (torchrun and worker).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent


def first_step_seconds(folder: Path, name: str, ranks: int) -> float:
    """Start a run of one step and return the seconds until its timeline shows that step."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), str(ROOT / "train/main.py"), "+exp=falcon_like"]
    command += [f"run.dir={folder}", f"run.name={name}", "run.steps=40"]
    started = time.time()
    subprocess.run(command, check=True, capture_output=True)
    for line in (folder / name / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["kind"] == "first_step":
            return float(event["time"]) - started
    raise SystemExit("the run had no first step")


def import_torch_seconds() -> float:
    """Return the seconds of an interpreter that imports torch and ends."""
    started = time.time()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return time.time() - started


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    limit = median(import_torch_seconds() for _ in range(options.repeats))
    print(json.dumps({"case": "import torch", "seconds": round(limit, 2)}))
    with tempfile.TemporaryDirectory() as scratch:
        first_step_seconds(Path(scratch), "cold", 1)
        for ranks in (1, 2):
            seconds = median(
                first_step_seconds(Path(scratch), f"{ranks}-{repeat}", ranks)
                for repeat in range(options.repeats)
            )
            case = f"command to first step, {ranks} rank(s)"
            ratio = round(seconds / (2 * limit), 2)
            print(
                json.dumps({"case": case, "seconds": round(seconds, 2), "over_two_imports": ratio})
            )


if __name__ == "__main__":
    main()
