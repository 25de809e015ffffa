"""What a test puts into a forked run: kills at chosen places, logs, oracles, full disks.

All of it is patched into the forked process before `train.main` starts: the product has no hooks.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial, wraps
from importlib import import_module
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What is put into a forked run.

    `samples`: where each rank logs the samples it consumes, as `NAME.rank`. `kill_at`: one of
    `KILL_PLACES`, on `kill_rank`, in `kill_attempt` of an incident (None: in any).
    `seconds_a_batch`: slows a run down, so that it can be killed, or asked for something.
    `is_lonely`: making a process group, or asking for one, ends the process with code 99.
    `full_disk`: during these batches, the disk of `run.dir` has no byte left; `full_in_rewind`: it
    has none from just before the intent of a rewind on, or from just behind it.
    `never_sees`: the ranges that the ledger holds from the first step on, which makes a run that
    never met them; `cooled`: the cooling it has from the start, `(scale, from, until, return)`.
    `write_seconds`: how much longer the tensors of step 20 take to be written.
    `is_resume_corrupt`: the weights are perturbed once they were loaded. `more_bad_samples`: these
    are foreign too.
    """

    samples: Path | None = None
    kill_at: str | None = None
    kill_rank: int = 0
    kill_attempt: int | None = None
    seconds_a_batch: float = 0.0
    is_lonely: bool = False
    full_disk: range | None = None
    full_in_rewind: Literal["before_intent", "after_intent"] | None = None
    never_sees: tuple[tuple[int, int], ...] = ()
    cooled: tuple[float, int, int, int] | None = None
    write_seconds: float = 0.0
    is_resume_corrupt: bool = False
    more_bad_samples: range | None = None


def install(fault: Fault, disk: Path) -> None:
    """Patch the product in this process; `disk` is what can be full."""
    import train.assembly
    import train.build
    import train.recovery.control

    train.recovery.control.POLL_SECONDS = 0.02
    _log_samples(fault)
    if fault.is_lonely:
        train.build.join_world = lambda *_, **__: os._exit(99)  # type: ignore[assignment]
    if fault.full_disk is not None:
        _fill_disk(disk / "ballast", fault.full_disk)
    if fault.full_in_rewind is not None and _rank() == 0:
        _fill_disk_in_a_rewind(disk / "ballast", fault.full_in_rewind)
    if fault.never_sees:
        ledger = train.assembly.SkipLedger
        train.assembly.SkipLedger = partial(ledger, fault.never_sees)  # type: ignore[assignment, misc]
    if fault.cooled is not None:
        _cool(fault.cooled)
    if fault.write_seconds:
        _write_slowly(fault.write_seconds)
    if fault.is_resume_corrupt:
        _corrupt_the_resume()
    if fault.more_bad_samples is not None:
        _poison(fault.more_bad_samples)
    if fault.kill_at is not None and _rank() == fault.kill_rank:
        KILL_PLACES[fault.kill_at](fault)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Replace `owner.name` by `around(original, *arguments)`."""
    original = getattr(owner, name)

    @wraps(original)
    def patched(*arguments: Any, **keywords: Any) -> Any:
        return around(original, *arguments, **keywords)

    setattr(owner, name, patched)


def _log_samples(fault: Fault) -> None:
    from train.checkpoint.snapshots import SnapshotRing
    from train.checkpoint.store import CheckpointStore
    from train.data.read_ahead import ReadAhead
    from train.data.stream import SampleStream
    from train.recovery.rewind import Rewinder

    def note(record: Mapping[str, object]) -> None:
        if fault.samples is not None:
            with Path(f"{fault.samples}.{_rank()}").open("a") as file:
                file.write(json.dumps(record) + "\n")

    def at(original: Any, self: Any, cursor: int, num_samples: int) -> Any:
        time.sleep(fault.seconds_a_batch)
        batch = original(self, cursor, num_samples)
        note({"kind": "batch", "cursor": cursor, "samples": batch.indices.tolist()})
        return batch

    def finish(original: Any, self: Any, intent: Any) -> Any:
        result = original(self, intent)
        note({"kind": "rewind", "skip": list(intent.skip)})
        return result

    def restore(original: Any, *arguments: Any) -> Any:
        result = original(*arguments)
        note({"kind": "load", "tier": "memory"})
        return result

    def load(original: Any, *arguments: Any) -> Any:
        result = original(*arguments)
        note({"kind": "load", "tier": "disk"})
        return result

    note({"kind": "start"})
    _wrap(SampleStream, "at", at)
    _wrap(ReadAhead, "at", at)
    _wrap(SnapshotRing, "restore", restore)
    _wrap(CheckpointStore, "load", load)
    _wrap(Rewinder, "_finish", finish)


def _fill(ballast: Path) -> None:
    with ballast.open("ab", buffering=0) as file, suppress(OSError):
        while file.write(b"\0" * 4096):
            pass


def _fill_disk(ballast: Path, batches: range) -> None:
    from train.data.read_ahead import ReadAhead
    from train.data.stream import SampleStream

    batch = 0

    def at(original: Any, *arguments: Any) -> Any:
        nonlocal batch
        batch += 1
        if batch in batches:
            # Again before each batch, since whoever fails to write may free what it had written.
            _fill(ballast)
        elif batch == batches.stop:
            ballast.unlink()
        return original(*arguments)

    _wrap(SampleStream, "at", at)
    _wrap(ReadAhead, "at", at)


def _fill_disk_in_a_rewind(ballast: Path, moment: str) -> None:
    from train.recovery.capsule import Capsules
    from train.recovery.rewind import Rewinder

    def fill_first(original: Any, *arguments: Any) -> Any:
        _fill(ballast)
        return original(*arguments)

    if moment == "before_intent":
        _wrap(Capsules, "capture", fill_first)
    else:
        _wrap(Rewinder, "_finish", fill_first)


def _cool(cooled: tuple[float, int, int, int]) -> None:
    from train.recovery.history import Cooling, RecoveryHistory

    scale, from_step, until_step, return_step = cooled

    def replace(original: Any, self: Any, records: Any) -> Any:
        original(self, records)
        self.coolings.append(
            Cooling(
                scale=scale, from_step=from_step, until_step=until_step, return_step=return_step
            )
        )

    _wrap(RecoveryHistory, "replace", replace)


def _poison(samples: range) -> None:
    import train.assembly
    from train.data.spoiled import PoisonedSource

    def source(original: Any, plain: Any, config: Any, vocab_size: int, *rest: Any) -> Any:
        return PoisonedSource(
            original(plain, config, vocab_size, *rest),
            start=samples.start,
            stop=samples.stop,
            vocab_size=vocab_size,
            seed=1,
        )

    _wrap(train.assembly, "inject_into_source", source)


def _write_slowly(seconds: float) -> None:
    from train.engines.dcp import DcpWrite

    def write(original: Any, self: Any, folder: Path, world: Any) -> None:
        original(self, folder, world)
        if "step-00000020" in folder.name:
            time.sleep(seconds)

    _wrap(DcpWrite, "write", write)


def _corrupt_the_resume() -> None:
    import torch

    from train.recovery.rewind import Rewinder

    def resume(original: Any, self: Any) -> Any:
        resumed = original(self)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self._engine.model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise * parameter.std() * 4)
        return resumed

    _wrap(Rewinder, "resume", resume)


def _is_meant(record: Any, fault: Fault) -> bool:
    return fault.kill_attempt in (None, record.attempt)


def _at_record(moment: str, is_it: Callable[[Any], bool]) -> Callable[[Fault], None]:
    """Kill before, after, or in the middle of writing a record; others than rank 0 beside it."""

    def install_it(fault: Fault) -> None:
        from train.recovery.journal import Journal
        from train.recovery.rewind import Rewinder

        def write(original: Any, self: Any, record: Any, **keywords: Any) -> None:
            if not (is_it(record) and _is_meant(record, fault)):
                original(self, record, **keywords)
                return
            if moment == "before":
                _die()
            path = getattr(self, "path", None)
            size = path.stat().st_size if path is not None and path.exists() else 0
            original(self, record, **keywords)
            if moment == "torn":
                os.truncate(path, size + (path.stat().st_size - size) // 2)
            _die()

        if fault.kill_rank == 0:
            _wrap(Journal, "append", write)
        else:
            _wrap(Rewinder, "_write", write)

    return install_it


@contextmanager
def _inside(finish: list[Any], intent: Any) -> Iterator[None]:
    finish.append(intent)
    yield
    finish.pop()


def _in_rewind(module: str, name: str, method: str) -> Callable[[Fault], None]:
    """Kill once `method` has been called inside a rewind, behind its intent."""

    def install_it(fault: Fault) -> None:
        from train.recovery.rewind import Rewinder

        intents: list[Any] = []

        def call(original: Any, *arguments: Any) -> Any:
            result = original(*arguments)
            if intents and _is_meant(intents[-1], fault):
                _die()
            return result

        def finish(original: Any, self: Any, intent: Any) -> Any:
            with _inside(intents, intent):
                return original(self, intent)

        _wrap(getattr(import_module(module), name), method, call)
        _wrap(Rewinder, "_finish", finish)

    return install_it


def _at_capsule(moment: str) -> Callable[[Fault], None]:
    def install_it(fault: Fault) -> None:
        import train.recovery.capsule as capsule

        if moment == "in":
            _wrap(capsule, "write_atomically", _half_written)
            return

        def capture(original: Any, self: Any, intent: Any, state: Any) -> None:
            if moment == "before" and _is_meant(intent, fault):
                _die()
            original(self, intent, state)
            if _is_meant(intent, fault):
                _die()

        _wrap(capsule.Capsules, "capture", capture)

    return install_it


def _half_written(original: Any, path: Path, content: str) -> None:
    del original
    half = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    half.write_text(content[: len(content) // 2])
    _die()


def _in_save(step: int) -> Callable[[Fault], None]:
    """Kill when the tensors of a checkpoint are written, but nothing else."""

    def install_it(fault: Fault) -> None:
        from train.engines.dcp import DcpWrite

        def write(original: Any, self: Any, folder: Path, world: Any) -> None:
            original(self, folder, world)
            if f"step-{step:08d}" in folder.name:
                _die()

        _wrap(DcpWrite, "write", write)

    return install_it


def _in_writer(method: str, moment: str) -> Callable[[Fault], None]:
    """Kill in the thread that writes the checkpoint of step 20, around one of its acts."""

    def install_it(fault: Fault) -> None:
        from train.checkpoint.writing import CheckpointWriter

        def act(original: Any, self: Any, folder: Path, *rest: Any) -> Any:
            is_meant = "step-00000020" in folder.name
            if is_meant and moment == "before":
                _die()
            result = original(self, folder, *rest)
            if is_meant:
                _die()
            return result

        _wrap(CheckpointWriter, method, act)

    return install_it


def _with_manifest(fault: Fault) -> None:
    """Kill when the manifest of step 20 is written, but its folder has another name."""
    import train.checkpoint.writing as writing

    def write_json(original: Any, path: Path, value: object) -> None:
        original(path, value)
        if path.name == writing.MANIFEST and "step-00000020" in path.parent.name:
            _die()

    _wrap(writing, "write_json", write_json)


def _with_half_a_file(fault: Fault) -> None:
    """Kill when half of the tensors of step 20 are written."""
    from train.engines.dcp import DcpWrite

    def write(original: Any, self: Any, folder: Path, world: Any) -> None:
        original(self, folder, world)
        if "step-00000020" in folder.name:
            for path in folder.iterdir():
                os.truncate(path, path.stat().st_size // 2)
            _die()

    _wrap(DcpWrite, "write", write)


def _at_step(step: int) -> Callable[[Fault], None]:
    """Kill when the checkpoint of `step` is durable, and all reports up to there are written."""

    def install_it(fault: Fault) -> None:
        from train.checkpoint.saver import Saver

        def save(original: Any, self: Any, state: Any, *rest: Any, **more: Any) -> None:
            original(self, state, *rest, **more)
            if state.step == step:
                self.settle(waits=True)
                _die()

        _wrap(Saver, "save", save)

    return install_it


def _at_request(moment: str) -> Callable[[Fault], None]:
    """Kill around an operator's request: taken, before its answer, in it, after it."""

    def install_it(fault: Fault) -> None:
        import train.recovery.control as control

        def next_request(original: Any, *arguments: Any) -> Any:
            request = original(*arguments)
            if request is not None:
                _die()
            return request

        def answer(original: Any, *arguments: Any, **keywords: Any) -> None:
            if moment == "before_answer":
                _die()
            original(*arguments, **keywords)
            _die()

        def write_json(original: Any, *arguments: Any) -> None:
            original(*arguments)
            _die()

        if moment == "taken":
            _wrap(control.Inbox, "next_request", next_request)
        elif moment == "in_answer":
            _wrap(control, "write_json", write_json)
        else:
            _wrap(control.Inbox, "answer", answer)

    return install_it


def _is_intent(record: Any) -> bool:
    return bool(record.phase == "intent")


def _is_done(record: Any) -> bool:
    return bool(record.phase == "done" and record.target_checkpoint)


def _is_veto(record: Any) -> bool:
    return bool(record.rung == "veto")


def _is_request(record: Any) -> bool:
    return bool(record.request)


_STORE = ("train.checkpoint.store", "CheckpointStore")
KILL_PLACES: dict[str, Callable[[Fault], None]] = {
    "before_capsule": _at_capsule("before"),
    "in_capsule": _at_capsule("in"),
    "after_capsule": _at_capsule("after"),
    "before_intent": _at_record("before", _is_intent),
    "torn_intent": _at_record("torn", _is_intent),
    "after_intent": _at_record("after", _is_intent),
    "after_load_from_memory": _in_rewind("train.checkpoint.snapshots", "SnapshotRing", "restore"),
    "after_load_from_disk": _in_rewind(*_STORE, "load"),
    "after_ledger": _in_rewind("train.data.ledger", "SkipLedger", "add"),
    "after_quarantine": _in_rewind(*_STORE, "quarantine"),
    "before_done": _at_record("before", _is_done),
    "torn_done": _at_record("torn", _is_done),
    "after_done": _at_record("after", _is_done),
    "before_note": _at_record("before", _is_veto),
    "torn_note": _at_record("torn", _is_veto),
    "after_note": _at_record("after", _is_veto),
    "request_taken": _at_request("taken"),
    "before_request_record": _at_record("before", _is_request),
    "torn_request_record": _at_record("torn", _is_request),
    "after_request_record": _at_record("after", _is_request),
    "before_answer": _at_request("before_answer"),
    "in_answer": _at_request("in_answer"),
    "after_answer": _at_request("after_answer"),
    "half_a_file": _with_half_a_file,
    "in_save_of_step_20": _in_save(20),
    "before_seal": _in_writer("_seal", "before"),
    "after_seal": _in_writer("_seal", "after"),
    "before_publish": _in_writer("_publish", "before"),
    "with_manifest": _with_manifest,
    "after_publish": _in_writer("_publish", "after"),
    "in_save_of_step_40": _in_save(40),
    "after_save_of_step_20": _at_step(20),
}
