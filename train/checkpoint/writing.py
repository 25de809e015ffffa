"""One checkpoint's way to the disk: written, sealed, published, and tried again if that failed.

    scan    for numbers that are not finite: then it is quarantined from the start
    write   the engine's files, into a folder of another name
    seal    fsync and SHA-256, each rank its share
    publish state.json, health.json, manifest.json last; then the folder gets its name

A folder that has its name is whole. `CheckpointWriter` does this in whichever thread calls it, over
the group of that thread; a `Flight` does it beside training. Neither knows of other checkpoints.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from monitoring.checkpoints import sealed
from train.checkpoint.info import (
    HEALTH,
    MANIFEST,
    NUM_FILE_THREADS,
    STATE,
    CheckpointInfo,
    Health,
    file_digest,
    read_info,
)
from train.distributed import World
from train.durable import fsync_file, fsync_folder, write_atomically, write_json
from train.engines.base import PendingWrite
from train.errors import CheckpointError
from train.state import TrainState

logger = logging.getLogger(__name__)

DOOMED = ".saving-old-"
"""How the name of a checkpoint begins that is being deleted: no one takes it for whole."""

_FORMAT_VERSION = 1
# Beside training, on cores that are taken: about a tenth of one. On free ones it changes nothing.
_NICENESS = 10
_CLOSE_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """What a checkpoint is to be; `state_json` is the text of its `state.json`."""

    name: str
    state: TrainState
    state_json: str
    format: str
    health: Health
    pending: PendingWrite


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a save: `info`, or None and the `problem`, on one line."""

    state: TrainState
    info: CheckpointInfo | None = None
    problem: str = ""


class CheckpointWriter:
    """Writes checkpoints into `folder`, trying again after each of `retry_seconds`."""

    def __init__(
        self,
        folder: Path,
        world: World,
        *,
        retry_seconds: Sequence[float] = (),
        sequence_length: int = 0,
    ) -> None:
        self._folder = folder
        self._world = world
        self._retry_seconds = tuple(retry_seconds)
        self._sequence_length = sequence_length

    def write(self, draft: Draft, gives_up: threading.Event) -> Outcome:
        """Return what became of it, equal on all ranks, when that is durable. A collective.

        `gives_up`: set it on all ranks, and no further attempt is made.
        """
        problem = ""
        if self._world.device.type == "cuda":
            torch.cuda.set_device(self._world.device)  # a new thread begins with the first one
        if self._world.is_main:
            sweep(self._folder)
        for number, seconds in enumerate((*self._retry_seconds, None), start=1):
            try:
                return Outcome(state=draft.state, info=self._attempt(draft))
            except CheckpointError as error:
                problem = str(error)
            if seconds is None:
                break
            if self._world.is_main:
                logger.warning(
                    "the checkpoint of step %d could not be written (%s): attempt %d of %d, the "
                    "next in %g s",
                    *(draft.state.step, problem, number, len(self._retry_seconds) + 1, seconds),
                )
            gives_up.wait(seconds)
            if any(self._world.gather(gives_up.is_set())):
                break
        return Outcome(state=draft.state, problem=problem)

    def _attempt(self, draft: Draft) -> CheckpointInfo:
        """Write it once. Raises: CheckpointError on all ranks; what was written is removed."""
        temporary = self._folder / f".saving-{draft.name}"
        failure: str | None = None
        is_finite = True
        try:
            if self._world.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()
            is_finite = draft.pending.is_finite()  # this waits for the copy, which may have failed
        except Exception as error:  # noqa: BLE001 - a device may say so as anything
            failure = _one_line(error)
        everywhere = self._agree(failure, temporary, is_finite)
        broken = [rank for rank, is_finite in enumerate(everywhere) if not is_finite]
        try:
            draft.pending.write(temporary, self._world)
        except Exception as error:  # noqa: BLE001 - torch wraps a full disk in many classes
            failure = _one_line(error)
        self._agree(failure, temporary)  # all parts are there: what is missing below is an error
        files: dict[str, dict[str, object]] = {}
        try:
            files = self._seal(temporary)
        except OSError as error:
            failure = str(error)
        parts = self._agree(failure, temporary, files)
        info: CheckpointInfo | None = None
        try:
            if self._world.is_main:
                merged = {name: entry for part in parts for name, entry in part.items()}
                info = self._publish(temporary, draft, merged, broken)
        except OSError as error:
            failure = str(error)
        self._agree(failure, temporary)
        published: CheckpointInfo = self._world.broadcast(info)
        return published

    def _agree(self, failure: str | None, temporary: Path, payload: Any = None) -> list[Any]:
        """Return every rank's payload, or raise on all ranks if one has failed. A collective."""
        answers = self._world.gather((failure, payload))
        failures = [f"rank {rank}: {answer[0]}" for rank, answer in enumerate(answers) if answer[0]]
        if failures:
            if self._world.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError("; ".join(failures))
        return [answer[1] for answer in answers]

    def _seal(self, folder: Path) -> dict[str, dict[str, object]]:
        """Fsync and digest this rank's share of the files."""
        mine = sorted(path for path in folder.rglob("*") if path.is_file())
        mine = mine[self._world.rank :: self._world.size]

        def seal(path: Path) -> dict[str, object]:
            fsync_file(path)
            return {"bytes": path.stat().st_size, "sha256": file_digest(path)}

        with ThreadPoolExecutor(NUM_FILE_THREADS, thread_name_prefix="digests") as threads:
            entries = threads.map(seal, mine)
            return {
                str(path.relative_to(folder)): entry
                for path, entry in zip(mine, entries, strict=True)
            }

    def _publish(
        self,
        temporary: Path,
        draft: Draft,
        files: dict[str, dict[str, object]],
        broken_ranks: Sequence[int],
    ) -> CheckpointInfo:
        """Write what makes it whole, and give it its name. On rank 0 alone."""
        path = temporary / STATE
        write_atomically(path, draft.state_json)
        files[STATE] = {"bytes": path.stat().st_size, "sha256": file_digest(path)}
        manifest = {
            "version": _FORMAT_VERSION,
            "step": draft.state.step,
            "cursor": draft.state.cursor,
            "sequence_length": self._sequence_length,
            "clock": draft.state.clock,
            "world_size": self._world.size,
            "format": draft.format,
            "saved_unix_seconds": time.time(),
            "files": files,
        }
        health, reason = draft.health, ""
        if broken_ranks:
            health = Health.QUARANTINED
            reason = f"numbers of rank {', '.join(map(str, broken_ranks))} are not finite"
        write_json(temporary / HEALTH, {"health": str(health), "reason": reason})
        for folder in {path.parent for path in temporary.rglob("*")}:
            fsync_folder(folder)
        write_json(temporary / MANIFEST, sealed(manifest))
        final = self._folder / draft.name
        if final.exists():  # an older one of the same clock was corrupt
            final.rename(self._folder / f"replaced-{draft.name}-{os.getpid()}")
        temporary.rename(final)
        fsync_folder(self._folder)
        info = read_info(final, self._sequence_length)
        assert info is not None, "the checkpoint that was just written can be read"
        return info


class Flight:
    """A save in flight, in a thread beside training; the thread never keeps a process alive."""

    def __init__(self, writer: CheckpointWriter, draft: Draft) -> None:
        self._outcome: Future[Outcome] = Future()
        self._gives_up = threading.Event()
        self._thread = threading.Thread(
            target=self._fly, args=(writer, draft), name="checkpoint", daemon=True
        )
        self._thread.start()

    def _fly(self, writer: CheckpointWriter, draft: Draft) -> None:
        with suppress(OSError):  # where threads have no priority of their own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        outcome = Outcome(state=draft.state, problem="the thread that wrote it has ended")
        try:
            outcome = writer.write(draft, self._gives_up)
        except Exception as error:  # noqa: BLE001 - a group that broke may show as anything
            outcome = Outcome(state=draft.state, problem=_one_line(error))
        finally:
            self._outcome.set_result(outcome)

    def outcome(self) -> Outcome | None:
        """Return what became of it, None while that is open."""
        return self._outcome.result() if self._outcome.done() else None

    def wait(self) -> None:
        """Return when this rank's outcome is known; a failed attempt is not made again."""
        self._gives_up.set()
        self._outcome.result()

    def abandon(self) -> None:
        """Leave it alone, after a few seconds in which it can end by itself. No collective."""
        self._gives_up.set()
        self._thread.join(_CLOSE_SECONDS)


def sweep(folder: Path) -> None:
    """Delete what retention has put out of the way."""
    for doomed in folder.glob(f"{DOOMED}*"):
        shutil.rmtree(doomed, ignore_errors=True)


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1][:300] if lines else ''}"
