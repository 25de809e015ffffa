"""The checkpoints of one run: save, list, verify, load, promote, quarantine, retain.

A checkpoint is a folder `step-S-clock-C`. It is written under a temporary name, fsynced, given a
manifest with the digest of each file, and renamed: a folder with that name is whole. There is no
file that says which is the latest; that is read off the names, so nothing can lie.

All ranks hold the same catalogue: it changes only by calls that all ranks make in the same order.
Rank 0 writes the shared files. Cursors of samples of another length are mapped where they are read.
Refuses to know what is inside: an engine writes and reads that.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from monitoring.checkpoints import is_intact, sealed, size_text
from monitoring.retention import Rules, plan
from train.checkpoint.info import (
    HEALTH,
    MANIFEST,
    NUM_FILE_THREADS,
    STATE,
    CheckpointInfo,
    Health,
    file_digest,
    verify_digests,
    verify_sizes,
)
from train.data.units import rescale_cursor, rescale_ledger
from train.distributed import World
from train.durable import fsync_file, fsync_folder, write_json
from train.engines.base import Engine
from train.errors import CheckpointError, CorruptCheckpointError
from train.state import TrainState

logger = logging.getLogger(__name__)

_NAME = re.compile(r"^step-(\d{8})-clock-(\d{8})$")
_FORMAT_VERSION = 1


class CheckpointStore:
    """The folder `checkpoints` of one run. Make it, then call `open` on all ranks."""

    def __init__(
        self,
        folder: Path,
        world: World,
        *,
        keep_good: int,
        keep_steps: int = 0,
        reach_steps: int = 0,
        keep_every_steps: int | None = None,
        budget_bytes: int | None = None,
        kept: Callable[[], frozenset[str]] = frozenset,
        sequence_length: int = 0,
    ) -> None:
        self.folder = folder
        self._world = world
        self.rules = Rules(
            keep_good=keep_good,
            keep_steps=keep_steps,
            reach_steps=reach_steps,
            keep_every_steps=keep_every_steps,
            budget_bytes=budget_bytes,
        )
        self._kept = kept
        self._sequence_length = sequence_length
        self._catalogue: list[CheckpointInfo] = []
        self.unreadable: tuple[str, ...] = ()
        """Names of folders that should be checkpoints, and are left alone."""

    def open(self) -> None:
        """Read the catalogue and clear what a killed save left. A collective."""
        found: tuple[list[CheckpointInfo], tuple[str, ...]] | None = None
        if self._world.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(".saving-*"):
                shutil.rmtree(leftover, ignore_errors=True)
            named = [path for path in self.folder.iterdir() if _NAME.match(path.name)]
            infos = {path.name: _read_info(path, self._sequence_length) for path in named}
            readable = [info for info in infos.values() if info is not None]
            unreadable = tuple(sorted(name for name, info in infos.items() if info is None))
            found = sorted(readable, key=lambda info: info.clock), unreadable
        self._catalogue, self.unreadable = self._world.broadcast(found)

    def entries(self) -> list[CheckpointInfo]:
        """Return all checkpoints, oldest clock first."""
        return list(self._catalogue)

    def trusted(self, health: Health) -> list[CheckpointInfo]:
        """Return the checkpoints of one health, oldest clock first."""
        return [info for info in self._catalogue if info.health is health]

    def save(
        self, engine: Engine, state: TrainState, extra: Mapping[str, object], *, health: Health
    ) -> CheckpointInfo:
        """Write a checkpoint and return when it is durable. A collective.

        Raises: CheckpointError, on all ranks, if any rank could not write its part; what was
        written is removed and older checkpoints are untouched.
        """
        name = f"step-{state.step:08d}-clock-{state.clock:08d}"
        temporary = self.folder / f".saving-{name}"
        failure: str | None = None
        try:
            if self._world.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()
        except OSError as error:
            failure = str(error)
        self._agree(failure, temporary)
        try:
            engine.save(temporary)
        except Exception as error:  # noqa: BLE001 - torch wraps a full disk in many classes
            failure = f"{type(error).__name__}: {_last_line(error)}"
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
                info = self._publish(temporary, name, merged, engine, state, extra, health)
        except OSError as error:
            failure = str(error)
        self._agree(failure, temporary)
        info = self._world.broadcast(info)
        self._catalogue = [known for known in self._catalogue if known.name != name] + [info]
        self._retain()
        return info

    def _agree(
        self, failure: str | None, temporary: Path, payload: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """Return every rank's payload, or raise on all ranks if one has failed. A collective."""
        answers = self._world.gather((failure, payload or {}))
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
        name: str,
        files: dict[str, dict[str, object]],
        engine: Engine,
        state: TrainState,
        extra: Mapping[str, object],
        health: Health,
    ) -> CheckpointInfo:
        length = {"sequence_length": self._sequence_length}
        write_json(temporary / STATE, {"train_state": state.as_dict(), **length, **extra})
        path = temporary / STATE
        files[STATE] = {"bytes": path.stat().st_size, "sha256": file_digest(path)}
        manifest = {
            "version": _FORMAT_VERSION,
            "step": state.step,
            "cursor": state.cursor,
            "sequence_length": self._sequence_length,
            "clock": state.clock,
            "world_size": self._world.size,
            "format": engine.checkpoint_format,
            "saved_unix_seconds": time.time(),
            "files": files,
        }
        write_json(temporary / HEALTH, {"health": str(health), "reason": ""})
        for folder in {path.parent for path in temporary.rglob("*")}:
            fsync_folder(folder)
        write_json(temporary / MANIFEST, sealed(manifest))
        final = self.folder / name
        if final.exists():  # an older one of the same clock was corrupt
            final.rename(self.folder / f"replaced-{name}-{os.getpid()}")
        temporary.rename(final)
        fsync_folder(self.folder)
        info = _read_info(final, self._sequence_length)
        assert info is not None, "the checkpoint that was just written can be read"
        return info

    def load(self, engine: Engine, info: CheckpointInfo) -> dict[str, Any]:
        """Load a checkpoint into the engine and return its extra state. A collective.

        Its bytes are digested while they are read, so it is only known at the end whether they
        were right. Raises: CorruptCheckpointError, on all ranks; if sizes and files were right,
        the engine may then hold what must not be trained on: load another, or end.
        """
        if info.format != engine.checkpoint_format:
            raise CheckpointError(
                f"{info.path} was written as {info.format}, and engine.kind={engine.name} here "
                f"reads {engine.checkpoint_format}; start with the engine, ranks and ZeRO stage "
                "that wrote it, or make it readable by all engines with `trimtab convert`"
            )
        mine: dict[str, Any] = {}
        state_text = b""
        problem: str | None = None
        try:
            files = json.loads((info.path / MANIFEST).read_text())["files"]
            mine = {n: files[n] for n in sorted(files)[self._world.rank :: self._world.size]}
            verify_sizes(info.path, mine)
            state_text = (info.path / STATE).read_bytes()  # a rank that cannot says so to all
        except CorruptCheckpointError as error:
            problem = str(error)
        except (OSError, ValueError, KeyError) as error:
            problem = f"{info.path} cannot be read ({error})"
        self._agree_it_is_whole(problem)
        failure: Exception | None = None
        with ThreadPoolExecutor(NUM_FILE_THREADS, thread_name_prefix="digests") as threads:
            digests = [
                threads.submit(verify_digests, info.path, {name: entry})
                for name, entry in mine.items()
            ]
            if not engine.reads_together:  # one rank's bad file would leave the others waiting
                self._agree_it_is_whole(_problem_of(digests))
            try:
                engine.load(info.path)
            except Exception as error:  # noqa: BLE001 - a bad byte may show as anything
                failure = error
        self._agree_it_is_whole(_problem_of(digests))
        if failure is not None:
            raise failure
        return _at_length(json.loads(state_text), self._sequence_length)

    def _agree_it_is_whole(self, problem: str | None) -> None:
        """Raise CorruptCheckpointError on all ranks if one has a problem. A collective."""
        problems = [answer for answer in self._world.gather(problem) if answer]
        if problems:
            raise CorruptCheckpointError("; ".join(problems))

    def promote(self, info: CheckpointInfo) -> None:
        """Call a candidate good. Called on all ranks; no collective.

        If that cannot be written, it holds for this process; a restart calls it good again later.
        """
        self._set_health(info.name, Health.GOOD, "")

    def quarantine(self, name: str, reason: str) -> None:
        """Never load a checkpoint again. Called on all ranks; no collective.

        If that cannot be written, it holds for this process; the journal says it to the next one.
        """
        self._set_health(name, Health.QUARANTINED, reason)

    def _set_health(self, name: str, health: Health, reason: str) -> None:
        known = {info.name: info.health for info in self._catalogue}
        if known.get(name) in (None, health):
            return
        self._catalogue = [
            replace(info, health=health) if info.name == name else info for info in self._catalogue
        ]
        if self._world.is_main and (self.folder / name).exists():
            try:
                write_json(self.folder / name / HEALTH, {"health": str(health), "reason": reason})
            except OSError as error:
                logger.warning("the health of %s could not be written (%s)", name, error)

    def _retain(self) -> None:
        """Delete what the rules do not keep. Called on all ranks; no collective."""
        decided = plan(self._catalogue, self.rules, needed=self._kept())
        if decided.over_budget_bytes and self._world.is_main:
            logger.warning(
                "checkpoint.disk_budget=%s cannot be met: what must stay takes %s more; raise it, "
                "or keep less with checkpoint.keep_every_steps and checkpoint.keep_incidents",
                size_text(self.rules.budget_bytes or 0),
                size_text(decided.over_budget_bytes),
            )
        for info in [info for info in self._catalogue if info.name in decided.removed]:
            self._catalogue.remove(info)
            if self._world.is_main:
                # Renamed first: a kill in the middle leaves nothing that looks whole.
                doomed = self.folder / f".saving-old-{info.name}"
                try:
                    info.path.rename(doomed)
                except OSError as error:
                    logger.warning("%s could not be removed (%s)", info.path, error)
                shutil.rmtree(doomed, ignore_errors=True)


def _problem_of(digests: Sequence[Future[None]]) -> str | None:
    problems = [digest.exception() for digest in digests]
    for problem in problems:
        if problem is not None and not isinstance(problem, CorruptCheckpointError):
            raise problem
    return "; ".join(str(problem) for problem in problems if problem) or None


def _read_info(path: Path, sequence_length: int) -> CheckpointInfo | None:
    """Return what a folder says of itself, or None if it is not a checkpoint."""
    match = _NAME.match(path.name)
    if match is None:
        return None
    try:
        text = (path / MANIFEST).read_bytes()
        manifest = json.loads(text)
        if not is_intact(manifest):
            raise ValueError(f"{MANIFEST} does not match its own digest")
        old_length = manifest.get("sequence_length") or sequence_length
        health = Health(json.loads((path / HEALTH).read_text())["health"])
        return CheckpointInfo(
            name=path.name,
            path=path,
            step=int(match[1]),
            cursor=_cursor_at_length(int(manifest["cursor"]), old_length, sequence_length),
            clock=int(match[2]),
            num_bytes=sum(entry["bytes"] for entry in manifest["files"].values()),
            digest=sha256(text).hexdigest(),
            world_size=manifest["world_size"],
            format=manifest["format"],
            health=health,
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        logger.warning("%s is not a readable checkpoint and is left alone (%s)", path, error)
        return None


def _cursor_at_length(cursor: int, old: int, new: int) -> int:
    return cursor if new in (0, old) else rescale_cursor(cursor, old, new)


def _at_length(state: dict[str, Any], sequence_length: int) -> dict[str, Any]:
    """Return a checkpoint's state with cursor and ledger in samples of the present length."""
    old = state.get("sequence_length") or sequence_length
    if sequence_length in (0, old):
        return state
    train_state = state["train_state"]
    cursor = rescale_cursor(train_state["cursor"], old, sequence_length)
    logger.warning(
        "data.sequence_length is %d now and was %d: cursor %d becomes %d, and the skip ledger is "
        "mapped by tokens",
        sequence_length,
        old,
        train_state["cursor"],
        cursor,
    )
    without_proof = {key: value for key, value in state.items() if key != "last_samples"}
    return {
        **without_proof,
        "sequence_length": sequence_length,
        "train_state": {**train_state, "cursor": cursor},
        "ledger": rescale_ledger(state["ledger"], old, sequence_length),
    }


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1][:300] if lines else ""
