"""A job on Slurm: the script on disk and its submission.

Owns `launch/job.sbatch` in the run's folder, written whole or not at all, and the call to sbatch.
Refuses to leave files behind where there is no sbatch.
Called by `launch.cli`.
"""

import shutil
import subprocess
from pathlib import Path

from launch.errors import LaunchError
from monitoring.atomic import write_text_atomically


def submit(script: str, run_folder: Path) -> str:
    """Write the script under `run_folder`, submit it, and return the job's id.

    Raises:
        LaunchError: sbatch is missing or refused the job.
    """
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        raise LaunchError(
            "cluster.kind=slurm but sbatch is not on PATH; run this on a login node of the"
            " cluster, use cluster=local, or add --dry-run to see the script"
        )
    path = run_folder / "launch" / "job.sbatch"
    write_text_atomically(path, script)
    (run_folder / "logs").mkdir(exist_ok=True)  # Slurm drops the output of a job without it
    done = subprocess.run(
        [sbatch, "--parsable", str(path)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        why = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise LaunchError(f"sbatch refused {path}: {why}")
    return done.stdout.strip().partition(";")[0]
