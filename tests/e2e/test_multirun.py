"""Hydra's multirun under torchrun: several jobs in one launch, each in its own folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from harness import MAIN, TIMEOUT_SECONDS, TINY, environment, losses_by_clock, records, summary


def sweep(arguments: list[str], cwd: Path, num_ranks: int = 2) -> tuple[int, str]:
    ranks = ["--standalone", "--nproc-per-node", str(num_ranks)]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *ranks, MAIN, "-m", *TINY, *arguments],
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    return done.returncode, done.stdout


def test_jobs_of_a_sweep_run_one_after_another_in_folders_named_by_what_varies(
    tmp_path: Path,
) -> None:
    code, output = sweep(["optim.lr=1e-2,2e-2"], tmp_path)
    assert code == 0, output
    runs = {path.name: path for path in (tmp_path / "runs").iterdir()}
    assert sorted(runs) == ["falcon_like,optim.lr=0.01", "falcon_like,optim.lr=0.02"]
    for folder in runs.values():
        assert summary(folder)["finished"] is True
    starts = [records(folder / "events.jsonl")[0] for folder in sorted(runs.values())]
    born = [start["uptime"] - start["process_seconds"] for start in starts]
    assert born[1] > records(min(runs.values()) / "events.jsonl")[-1]["uptime"]
    assert [start["launcher_seconds"] is None for start in starts] == [False, True]
    first, second = (losses_by_clock(folder) for folder in runs.values())
    assert first != second
    assert [path.name for path in tmp_path.iterdir()] == ["runs"], "Hydra left nothing behind"


def test_job_that_fails_does_not_keep_the_others_from_running(tmp_path: Path) -> None:
    code, output = sweep(["model.num_heads=3,2"], tmp_path)
    assert code != 0
    assert output.count("model.num_heads=3 does not divide model.hidden_size=32") == 1
    runs = [path.name for path in (tmp_path / "runs").iterdir()]
    assert runs == ["falcon_like,model.num_heads=2"]
    assert summary(tmp_path / "runs" / runs[0])["finished"] is True
