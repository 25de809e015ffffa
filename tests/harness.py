"""How tests run the product: the real command line, and forked ranks that are cheap to start.

`command` is what a user types, in new processes. `Launch` forks ranks from a server that has torch
loaded already (a second instead of five) and gives them the environment that torchrun would. What
is put into such a run is in `faults`; what it left behind is read by the functions at the end.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from faults import Fault, install

ROOT = Path(__file__).resolve().parent.parent
MAIN = str(ROOT / "train" / "main.py")
TIMEOUT_SECONDS = 120

# A model that learns bytes well enough in 20 steps (about 0.2 s) that a foreign stretch is a spike.
TINY = (
    "+exp=falcon_like",
    "model.hidden_size=32",
    "model.num_layers=2",
    "model.num_heads=2",
    "data.sequence_length=32",
    f"data.paths=[{sysconfig.get_paths()['stdlib']}/asyncio]",
    "tokenizer=bytes",
    "tokenizer.vocab_size=257",
    "data.validation_share=0.1",  # of few files
    "run.steps=40",
    "checkpoint.retry_seconds=[0.05]",
    "checkpoint.max_failures=20",
    "run.seed=20",  # its batches differ less than those of most seeds
    "checkpoint.interval_steps=5",
    "checkpoint.good_after_steps=3",
    "schedule.warmup_steps=2",
    "schedule.batch_ramp_steps=4",
    "schedule.batch_samples=8",
    "schedule.batch_ramp_start_samples=4",
    "optim.lr=1e-2",
    "engine.timeout_seconds=60",
    "recovery.warmup_steps=6",
    "recovery.window_steps=12",
    "recovery.step_scale=1",
    "recovery.token_scale=1",
    "recovery.skip=10 batches",
    "recovery.margin=0 batches",
    "recovery.announced_steps=2",  # the batch ramp is four steps long
    "recovery.threshold_sigma=3",  # 20 steps are few to know the noise from
    "health.max_same_failures=0",  # tests kill a run again and again
)
# Batches 20 to 23 are foreign: samples 144 to 175, since the ramp makes the first four half as big.
BAD_DATA = ("chaos=bad_data", "chaos.start=20 batches", "chaos.length=4 batches")
BAD_SAMPLES = range(144, 176)
LADDER = (
    *TINY,
    "recovery=ladder",
    "recovery.ladder=[replay,skip,skip_further,cool]",
    "recovery.skip=2 batches",
    "recovery.rewind_steps=5",
    "recovery.cool_factor=0.01",
    "recovery.cool_steps=12",
    "recovery.cooldown_steps=20",
)
# The learning rate of steps 21 to 26 is a hundred times too high: no attempt but the last helps.
SHOCK = ("chaos=lr_shock", "chaos.start=20 steps", "chaos.length=6 steps", "chaos.factor=100")
ATTEMPTS = ("replay", "skip", "skip_further", "cool")
# From batch 20 on, for good: a level that the ladder has to let in.
NEW_LEVEL = (*BAD_DATA, "chaos.length=400 batches")
# Good states of every third step lie in memory alone; on disk there are those of 0, 10, 20, ...
MEMORY_FIRST = (*TINY, "checkpoint.interval_steps=10", "checkpoint.snapshot_interval_steps=3")

_PRELOADED = ["harness", "train.main", "train.build", "torch._inductor", "monitoring.report"]
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """How a run ended; `exit_codes` is by rank, one for a command."""

    exit_codes: tuple[int, ...]
    output: str
    folder: Path

    @property
    def exit_code(self) -> int:
        return max(self.exit_codes, key=abs)

    def expect(self, exit_code: int) -> Result:
        assert set(self.exit_codes) == {exit_code}, f"{self.exit_codes}\n{self.output}"
        return self


def environment() -> dict[str, str]:
    """Return the environment of all test processes: one thread each, for the bits and the peace."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in _RANK_VARIABLES and not name.startswith(("TORCHELASTIC", "SLURM", "HYDRA"))
    }
    return {**inherited, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}


def command(
    arguments: Sequence[str], folder: Path, *, num_ranks: int | None = None, cwd: Path = ROOT
) -> Result:
    """Run `train/main.py` as a user does, under torchrun if `num_ranks` is given."""
    launcher = [sys.executable]
    if num_ranks is not None:
        ranks = ["--standalone", "--nproc-per-node", str(num_ranks)]
        launcher += ["-m", "torch.distributed.run", *ranks]
    done = subprocess.run(
        [*launcher, MAIN, *arguments, *place(folder)],
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    return Result(exit_codes=(done.returncode,), output=done.stdout, folder=folder)


def place(folder: Path) -> list[str]:
    return [f"run.dir={folder.parent}", f"run.name={folder.name}"]


@cache
def _forkserver() -> Any:
    os.environ.update(environment())
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Launch:
    """`target(*arguments)` in forked ranks, each the leader of its own session."""

    def __init__(
        self,
        target: Callable[..., object],
        *arguments: object,
        log: Path,
        num_ranks: int = 1,
    ) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        port = _free_port()
        self._ranks = [
            _forkserver().Process(
                target=_enter, args=(rank, num_ranks, port, str(log), target, arguments)
            )
            for rank in range(num_ranks)
        ]
        for process in self._ranks:
            process.start()

    def wait(self, timeout_seconds: float = TIMEOUT_SECONDS) -> tuple[int, ...]:
        """Return the exit codes; as under torchrun, one rank that fails ends the others."""
        deadline = time.monotonic() + timeout_seconds
        while any(process.exitcode is None for process in self._ranks):
            failed = [process for process in self._ranks if process.exitcode]
            if failed:
                for process in self._ranks:
                    process.join(timeout=3)  # they may be ending by themselves
                self.kill()
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"no end after {timeout_seconds} s\n{self.output()}")
            time.sleep(0.01)
        return tuple(int(process.exitcode) for process in self._ranks)

    def kill(self) -> None:
        """SIGKILL to every rank, together with whatever it has started."""
        for process in self._ranks:
            if process.exitcode is None:
                try:
                    os.killpg(process.pid, signal.SIGKILL)
                except ProcessLookupError:  # not yet a leader: it has not started anything
                    process.kill()
        for process in self._ranks:
            process.join(timeout=10)

    def output(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""


def _enter(
    rank: int,
    num_ranks: int,
    port: int,
    log: str,
    target: Callable[..., object],
    arguments: Sequence[object],
) -> None:
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    for name in _RANK_VARIABLES:
        os.environ.pop(name, None)
    if num_ranks > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import torch

    torch.set_num_threads(1)
    code = target(*arguments)
    sys.stdout.flush()
    sys.exit(code if isinstance(code, int) else 0)


def start(
    arguments: Sequence[str],
    folder: Path,
    *,
    num_ranks: int = 1,
    fault: Fault | None = None,
) -> Launch:
    """Start a forked run of `train.main.main` with these arguments."""
    log = folder.parent / f"{folder.name}.output"
    everything = [*arguments, *place(folder)]
    return Launch(_main, everything, fault or Fault(), log=log, num_ranks=num_ranks)


def run(
    arguments: Sequence[str],
    folder: Path,
    *,
    num_ranks: int = 1,
    fault: Fault | None = None,
) -> Result:
    """Run `train.main.main` in forked ranks to its end."""
    launch = start(arguments, folder, num_ranks=num_ranks, fault=fault)
    exit_codes = launch.wait()
    return Result(exit_codes=exit_codes, output=launch.output(), folder=folder)


def _main(arguments: list[str], fault: Fault) -> int:
    sys.argv = [MAIN, *arguments]
    run_dir = next(a for a in arguments if a.startswith("run.dir=")).partition("=")[2]
    install(fault, Path(run_dir))
    from train.main import main

    return main()


def records(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a JSON-lines file."""
    found = []
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def metrics(folder: Path) -> list[dict[str, Any]]:
    return records(folder / "metrics.jsonl")


def losses_by_clock(folder: Path) -> dict[int, float]:
    """Return the loss at each clock; a clock that ran twice must have come out the same."""
    losses: dict[int, float] = {}
    for record in metrics(folder):
        clock, loss = record["clock"], record["loss_nats"]
        assert losses.setdefault(clock, loss) == loss, f"clock {clock} ran twice and differs"
    return losses


def losses_by_step(folder: Path, from_step: int = 0) -> dict[int, float]:
    """Return the losses of the surviving lineage: of each step, the last time that it was run."""
    losses = {record["step"]: record["loss_nats"] for record in metrics(folder)}
    return {step: loss for step, loss in sorted(losses.items()) if step > from_step}


def journal(folder: Path) -> list[dict[str, Any]]:
    """Return all whole records of the journal, without what differs between any two runs."""
    found = records(folder / "journal.jsonl")
    return [{k: v for k, v in record.items() if k not in ("time", "crc")} for record in found]


def incidents(folder: Path) -> list[dict[str, Any]]:
    """Return the finished rewinds of the journal, without what differs between any two runs."""
    return [r for r in journal(folder) if r["phase"] == "done" and r["target_checkpoint"]]


def rungs(folder: Path) -> list[str]:
    """Return what was done in a run, in order, apart from refused updates."""
    done = [record for record in journal(folder) if record["phase"] == "done"]
    return [record["rung"] for record in done if record["rung"] != "veto"]


def lineage(samples: Path, rank: int = 0) -> list[int]:
    """Return the samples of the surviving lineage, in the order in which they were trained on.

    A batch that begins at a cursor replaces all that was trained on from there on before.
    """
    batches: list[dict[str, Any]] = []
    for record in records(Path(f"{samples}.{rank}")):
        if record["kind"] == "batch":
            while batches and batches[-1]["cursor"] >= record["cursor"]:
                batches.pop()
            batches.append(record)
    return [sample for batch in batches for sample in batch["samples"]]


def sequence(
    num_samples: int,
    skips: Iterable[Sequence[int]],
    returns: Iterable[Sequence[int]] = (),
) -> list[int]:
    """Return what a run has to train on, by the plainest means: lists.

    `skips`: `[start, stop)` in positions; `returns`: (position, start, stop). The order goes on
    around what was put back, which stays where it was put.
    """
    order = list(range(4 * num_samples))
    skipped: set[int] = set()
    for position, start, stop in sorted(returns):
        order[position:position] = order[start:stop]
    for start, stop in skips:
        skipped.update(range(start, stop))
    kept = [sample for position, sample in enumerate(order) if position not in skipped]
    return kept[:num_samples]


def assert_trained_once(folder: Path, samples: Path, rank: int = 0) -> None:
    """Assert that the surviving lineage is the sequence without the journal's skips, each once."""
    done = [record for record in journal(folder) if record["phase"] == "done"]
    trained = lineage(samples, rank)
    returns = [record["returned"] for record in done if record["returned"]]
    assert trained == sequence(len(trained), [record["skip"] for record in done], returns)


def summary(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return loaded


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest clock first."""
    found = (folder / "checkpoints").glob("step-*")
    return sorted(found, key=lambda path: path.name.rpartition("-")[2])


def health(checkpoint: Path) -> dict[str, str]:
    loaded: dict[str, str] = json.loads((checkpoint / "health.json").read_text())
    return loaded


def tensors(checkpoint: Path) -> dict[str, Any]:
    """Return all tensors of a checkpoint by their full names, whole."""
    import torch
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    whole = checkpoint.parent / f"{checkpoint.name}.pt"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp_to_torch_save(checkpoint, whole)
            tree = torch.load(whole, weights_only=False)
    finally:
        whole.unlink(missing_ok=True)
    flat: dict[str, Any] = {}

    def walk(prefix: str, node: Any) -> None:
        if isinstance(node, torch.Tensor):
            flat[prefix] = node
        elif isinstance(node, dict):
            for key, value in node.items():
                walk(f"{prefix}/{key}", value)

    walk("", tree)
    assert flat, f"{checkpoint} holds tensors"
    return flat


def assert_same_tensors(one: Path, other: Path) -> None:
    """Assert that two checkpoints hold the same bits, moments and step counters included."""
    import torch

    ours, theirs = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys()
    assert any("exp_avg_sq" in name for name in ours), "moments are compared too"
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different, f"{len(different)} of {len(ours)} tensors differ: {different[:5]}"


def wait_for_step(launch: Launch, folder: Path, step: int, *, attempt: int) -> None:
    """Return when `metrics.jsonl` shows that this attempt has come to `step`."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        if any(r["attempt"] == attempt and r["step"] >= step for r in metrics(folder)):
            return
        time.sleep(0.005)
    launch.kill()
    raise TimeoutError(f"step {step} never came\n{launch.output()}")


def ask(folder: Path, name: str, **fields: object) -> None:
    """Leave an operator's request, as `trimtab rewind`, `skip` and `unskip` do."""
    requests = folder / "control" / "requests"
    requests.mkdir(parents=True, exist_ok=True)
    draft = requests / f".{name}"
    draft.write_text(json.dumps({"operator": "a test", **fields}))
    draft.rename(requests / f"{name}.json")


def answer(folder: Path, name: str) -> dict[str, Any] | None:
    """Return the answer to a request, None if there is none; an answered one is off the list."""
    path = folder / "control" / "answers" / f"{name}.json"
    if not path.exists():
        return None
    assert not (folder / "control" / "requests" / f"{name}.json").exists()
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


def callback_states(checkpoint: Path) -> dict[str, Any]:
    """Return what the callbacks, the detector among them, keep in a checkpoint."""
    loaded: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())["callbacks"]
    return loaded
