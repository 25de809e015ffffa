"""How tests run the product: the real command line, and forked ranks that are cheap to start.

`command` is what a user types, in new processes. `Launch` forks ranks from a server that has torch
loaded already (a second instead of five), gives them the environment that torchrun would, and can
log the samples that a run consumes, slow it down, or kill it at a chosen place. All of that is done
by patching inside the forked process: the product has no hooks.
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
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, wraps
from pathlib import Path
from typing import Any

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
    "run.steps=40",
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
)
# Batches 20 to 23 are foreign: samples 144 to 175, since the ramp makes the first four half as big.
BAD_DATA = ("chaos=bad_data", "chaos.start=20 batches", "chaos.length=4 batches")
BAD_SAMPLES = range(144, 176)

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What is put into a forked run.

    `samples`: where each rank logs the samples it consumes, as `NAME.rank`. `kill_at`: one of
    `KILL_PLACES`, on `kill_rank`. `seconds_a_batch`: slows a run down, so that it can be killed.
    `is_lonely`: making a process group, or asking for one, ends the process with code 99.
    `full_disk`: during these batches, the disk of `run.dir` has no byte left.
    """

    samples: Path | None = None
    kill_at: str | None = None
    kill_rank: int = 0
    seconds_a_batch: float = 0.0
    is_lonely: bool = False
    full_disk: range | None = None


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
    _log_samples(fault)
    if fault.is_lonely:
        import train.build

        train.build.join_world = lambda *_, **__: os._exit(99)  # type: ignore[assignment]
    if fault.full_disk is not None:
        disk = next(a for a in arguments if a.startswith("run.dir=")).partition("=")[2]
        _fill_disk(Path(disk) / "ballast", fault.full_disk)
    if fault.kill_at is not None and int(os.environ.get("RANK", "0")) == fault.kill_rank:
        KILL_PLACES[fault.kill_at]()
    from train.main import main

    return main()


def _log_samples(fault: Fault) -> None:
    from train.data.stream import SampleStream
    from train.recovery.rewind import Rewinder

    rank = os.environ.get("RANK", "0")

    def note(record: Mapping[str, object]) -> None:
        if fault.samples is not None:
            with Path(f"{fault.samples}.{rank}").open("a") as file:
                file.write(json.dumps(record) + "\n")

    original_at = SampleStream.at

    def at(self: SampleStream, cursor: int, num_samples: int) -> Any:
        time.sleep(fault.seconds_a_batch)
        batch = original_at(self, cursor, num_samples)
        note({"rewind": False, "cursor": cursor, "samples": batch.indices.tolist()})
        return batch

    original_finish = Rewinder._finish

    def finish(self: Rewinder, intent: Any) -> Any:
        result = original_finish(self, intent)
        note({"rewind": True, "skip": list(intent.skip)})
        return result

    SampleStream.at = at  # type: ignore[method-assign]
    Rewinder._finish = finish  # type: ignore[method-assign]


def _fill_disk(ballast: Path, batches: range) -> None:
    from train.data.stream import SampleStream

    original = SampleStream.at
    batch = 0

    def at(self: SampleStream, cursor: int, num_samples: int) -> Any:
        nonlocal batch
        batch += 1
        if batch in batches:
            # Again before each batch, since whoever fails to write may free what it had written.
            with ballast.open("ab", buffering=0) as file, suppress(OSError):
                while file.write(b"\0" * 4096):
                    pass
        elif batch == batches.stop:
            ballast.unlink()
        return original(self, cursor, num_samples)

    SampleStream.at = at  # type: ignore[method-assign]


def _die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_at_journal(phase: str, moment: str) -> Callable[[], None]:
    """Return a patch that kills before, after, or in the middle of writing a record."""

    def install() -> None:
        from train.recovery.journal import Journal

        original = Journal.append

        def append(self: Journal, incident: Any) -> None:
            if incident.phase != phase:
                return original(self, incident)
            before = self.path.stat().st_size if self.path.exists() else 0
            if moment == "before":
                _die()
            original(self, incident)
            if moment == "torn":
                whole = self.path.stat().st_size
                os.truncate(self.path, before + (whole - before) // 2)
            return _die()

        Journal.append = append  # type: ignore[method-assign]

    return install


def _kill_after(module: str, name: str, method: str) -> Callable[[], None]:
    """Return a patch that kills once `method` has been called inside a rewind."""

    def install() -> None:
        from importlib import import_module

        from train.recovery.rewind import Rewinder

        owner = getattr(import_module(module), name)
        original, original_finish = getattr(owner, method), Rewinder._finish
        is_rewinding = False

        @wraps(original)
        def patched(self: Any, *arguments: Any) -> Any:
            result = original(self, *arguments)
            if is_rewinding:
                _die()
            return result

        def finish(self: Any, intent: Any) -> Any:
            nonlocal is_rewinding
            is_rewinding = True
            return original_finish(self, intent)

        setattr(owner, method, patched)
        Rewinder._finish = finish  # type: ignore[method-assign]

    return install


def _kill_in_save(step: int) -> Callable[[], None]:
    """Return a patch that kills when the tensors of a checkpoint are written, but nothing else."""

    def install() -> None:
        from train.engines.torch_engine import TorchEngine

        original = TorchEngine.save

        def save(self: TorchEngine, folder: Path) -> None:
            original(self, folder)
            if f"step-{step:08d}" in folder.name:
                _die()

        TorchEngine.save = save  # type: ignore[method-assign]

    return install


_STORE = ("train.checkpoint.store", "CheckpointStore")
KILL_PLACES: dict[str, Callable[[], None]] = {
    "before_intent": _kill_at_journal("intent", "before"),
    "torn_intent": _kill_at_journal("intent", "torn"),
    "after_intent": _kill_at_journal("intent", "after"),
    "after_load": _kill_after(*_STORE, "load"),
    "after_quarantine": _kill_after(*_STORE, "quarantine"),
    "torn_done": _kill_at_journal("done", "torn"),
    "after_done": _kill_at_journal("done", "after"),
    "in_save_of_step_20": _kill_in_save(20),
}


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


def incidents(folder: Path) -> list[dict[str, Any]]:
    """Return the finished incidents of the journal, without what differs between any two runs."""
    done = [record for record in records(folder / "journal.jsonl") if record["phase"] == "done"]
    return [{k: v for k, v in record.items() if k not in ("time", "crc")} for record in done]


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
