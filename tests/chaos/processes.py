"""The real command line as processes: start it, find its ranks, end all of it.

A run of the suite is known by a mark in the environment of its processes, which children inherit:
ranks are found even when their launcher is gone. Only processes with the mark are ever ended.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
MAIN = str(ROOT / "train" / "main.py")
MARK = "TRIMTAB_CHAOS"
_OURS_ALONE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", MARK)

# About 30 ms a step on one core; a checkpoint of 1.5 MB every twenty steps.
SMALL = (
    "+exp=falcon_like",
    "model.hidden_size=64",
    "model.num_layers=2",
    "model.num_heads=2",
    "data.sequence_length=64",
    f"data.paths=[{sysconfig.get_paths()['stdlib']}/asyncio]",
    "data.validation_share=0.1",  # of few files
    "tokenizer=bytes",
    "tokenizer.vocab_size=257",
    "run.steps=400",
    "checkpoint.interval_steps=20",
    "checkpoint.good_after_steps=8",
    "schedule.warmup_steps=10",
    "schedule.batch_samples=16",
    "schedule.batch_ramp_start_samples=8",
    "schedule.batch_ramp_steps=40",
    "schedule.batch_ramp_increment_samples=4",
    "optim.lr=3e-3",
    "engine.timeout_seconds=60",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a command is started: what is put before it, and what torchrun is told besides."""

    prefix: tuple[str, ...] = ()
    launcher: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One command, the same at each start.

    `max_restarts`: how often torchrun starts the ranks again by itself. A run of one rank has no
    torchrun unless `is_launched`. `rendezvous`: how torchrun's agents find each other.
    """

    name: str
    arguments: tuple[str, ...] = SMALL
    num_ranks: int = 2
    max_restarts: int = 3
    is_launched: bool = True
    rendezvous: tuple[str, ...] = ("--standalone",)
    num_hosts: int = 1

    def with_arguments(self, *more: str) -> Recipe:
        """Return the same command with more settings; the last of a key counts."""
        keys = {text.partition("=")[0] for text in more}
        kept = tuple(text for text in self.arguments if text.partition("=")[0] not in keys)
        return replace(self, arguments=(*kept, *more))

    def command(self, folder: Path, place: Place) -> list[str]:
        """Return the command line of a run in `folder`, as it is started at `place`."""
        launcher: list[str] = []
        if self.is_launched:
            ranks = str(self.num_ranks // self.num_hosts)
            launcher = ["-m", "torch.distributed.run", *self.rendezvous, *place.launcher]
            launcher += ["--nproc-per-node", ranks, "--max-restarts", str(self.max_restarts)]
        where = [f"run.dir={folder.parent}", f"run.name={folder.name}"]
        return [*place.prefix, sys.executable, *launcher, MAIN, *self.arguments, *where]


@dataclass(slots=True, kw_only=True)
class Launch:
    """One start of a command."""

    recipe: Recipe
    folder: Path
    mark: str
    log: Path
    place: Place = field(default_factory=Place)
    environment: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] = field(init=False)
    started: float = field(init=False)

    def __post_init__(self) -> None:
        self.started = time.monotonic()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.recipe.command(self.folder, self.place),
                cwd=ROOT,
                env={**plain_environment(), MARK: self.mark, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def exit_code(self) -> int | None:
        return self.process.poll()


def plain_environment() -> dict[str, str]:
    """Return this environment without what another launcher has put into it; one thread a rank."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in _OURS_ALONE and not name.startswith(("TORCHELASTIC", "SLURM", "HYDRA"))
    }
    return {**inherited, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "160"}


def marked(mark: str) -> dict[int, dict[str, str]]:
    """Return the environments of all live processes of a run, by process id."""
    wanted, found = f"{MARK}={mark}".encode(), {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            variables = (entry / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended, or is not ours to look at
            continue
        if wanted in variables:
            pairs = (variable.decode(errors="replace").partition("=") for variable in variables)
            found[int(entry.name)] = {name: value for name, _, value in pairs if name}
    return found


def ranks(mark: str, launch: Launch) -> dict[int, int]:
    """Return the live ranks of a run: process id by rank. A lone process is rank 0."""
    if not launch.recipe.is_launched:
        return {0: launch.pid} if launch.exit_code is None else {}
    found = {}
    for pid, variables in marked(mark).items():
        if "RANK" in variables and _runs_main(pid):
            found[int(variables["RANK"])] = pid
    return found


def _runs_main(pid: int) -> bool:
    try:
        return MAIN.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False


def send(number: signal.Signals, *pids: int) -> None:
    """Send a signal to each process that still lives."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def end_all(mark: str) -> None:
    """SIGKILL to every process of a run, whoever its parent is by now."""
    deadline = time.monotonic() + 10
    while (pids := marked(mark)) and time.monotonic() < deadline:
        send(signal.SIGKILL, *pids)
        time.sleep(0.02)
