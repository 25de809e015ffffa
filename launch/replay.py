"""A replay of one incident: the processes that do it, and what can be refused before they start.

Owns the command line and the default number of ranks. Refuses what the run folder cannot give, in
one line. Called by `launch.cli`; the work is done by `train/replay.py`.
"""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from launch.cluster import parse_cluster
from launch.compose import select
from launch.errors import LaunchError
from launch.local import variables
from monitoring.records import CONFIG_FILE, UnreadableRecordsError
from monitoring.replay_plan import INCIDENTS_FOLDER, NoReplayError, ReplayPlan, read_plan


def replay_entry() -> Path:
    """Return the script that each rank of a replay runs."""
    return Path(__file__).resolve().parent.parent / "train" / "replay.py"


def command(
    run_folder: Path,
    incident: int,
    *,
    num_ranks: int | None = None,
    num_steps: int | None = None,
    output: Path | None = None,
) -> list[str]:
    """Return the command that replays an incident.

    Without `num_ranks` there are as many as the run had on one host. `num_steps`: how far beyond
    the detection.

    Raises:
        LaunchError: the incident cannot be replayed, or not on so many ranks.
    """
    if not (run_folder / CONFIG_FILE).is_file():
        raise LaunchError(f"{run_folder} holds no {CONFIG_FILE}: it is no run folder")
    for name, value, least in (("--nproc", num_ranks, 1), ("--steps", num_steps, 0)):
        if value is not None and value < least:
            raise LaunchError(f"{name}={value} is too small; give {least} or more")
    try:
        plan = read_plan(run_folder, incident)
    except (NoReplayError, UnreadableRecordsError) as error:
        raise LaunchError(str(error)) from error
    ranks = num_ranks or _ranks_of_one_host(run_folder, plan)
    if plan.start.format.startswith("deepspeed") and ranks != plan.start.num_ranks:
        raise LaunchError(
            f"{plan.start.name} was written by DeepSpeed on {plan.start.num_ranks} ranks, and only "
            f"as many can read it; use --nproc {plan.start.num_ranks}"
        )
    arguments = [str(replay_entry()), str(run_folder), "--incident", str(incident)]
    if num_steps is not None:
        arguments += ["--steps", str(num_steps)]
    if output is not None:
        arguments += ["--output", str(output)]
    if ranks == 1:
        return [sys.executable, *arguments]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [sys.executable, *torchrun, *arguments]


def environment(run_folder: Path) -> dict[str, str]:
    """Return what the run's cluster group sets, as far as the caller has not set it himself."""
    from omegaconf import DictConfig, OmegaConf

    config = OmegaConf.load(run_folder / CONFIG_FILE)
    if not isinstance(config, DictConfig):
        raise LaunchError(f"{run_folder / CONFIG_FILE} is damaged: it holds no settings")
    added = variables(parse_cluster(select(config, "cluster")))
    return {name: value for name, value in added.items() if name not in os.environ}


def _ranks_of_one_host(run_folder: Path, plan: ReplayPlan) -> int:
    """Return the run's ranks a host, as its capsule has them, or all if it says nothing."""
    path = run_folder / INCIDENTS_FOLDER / plan.folder_name / "capsule.json"
    try:
        hosts = json.loads(path.read_text())["environment"]["hosts"]
        num_hosts = len(hosts) if isinstance(hosts, Mapping) and hosts else 1
    except (OSError, ValueError, KeyError, TypeError):
        num_hosts = 1
    return max(1, plan.start.num_ranks // num_hosts)
