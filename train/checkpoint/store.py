"""The checkpoints of one run: save, list, verify, load, promote, quarantine, retain.

A checkpoint is a folder `step-S-clock-C`; `writing` makes it, here and now or beside training. A
folder with that name is whole. There is no file that says which is the latest; that is read off the
names, so nothing can lie.

All ranks hold the same catalogue: it changes only by calls that all ranks make in the same order.
Rank 0 writes the shared files. Cursors of samples of another length are mapped where they are read.
Refuses to know what is inside: an engine writes and reads that.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from monitoring.checkpoints import size_text
from monitoring.retention import Rules, plan
from train.checkpoint.info import (
    HEALTH,
    MANIFEST,
    NAME,
    NUM_FILE_THREADS,
    STATE,
    CheckpointInfo,
    Health,
    read_info,
    verify_digests,
    verify_sizes,
)
from train.checkpoint.writing import DOOMED, CheckpointWriter, Draft, Flight, Outcome, sweep
from train.data.units import rescale_cursor, rescale_ledger
from train.distributed import World
from train.durable import as_json, write_json
from train.engines.base import Engine
from train.engines.snapshot import HostSnapshot
from train.errors import CheckpointError, CorruptCheckpointError
from train.state import TrainState

logger = logging.getLogger(__name__)


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
        beside: World | None = None,
        retry_seconds: Sequence[float] = (),
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
        self._beside = beside
        self._retry_seconds = retry_seconds
        self._flight: Flight | None = None
        self._meanwhile: tuple[Health, str] | None = None
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
            named = [path for path in self.folder.iterdir() if NAME.match(path.name)]
            infos = {path.name: read_info(path, self._sequence_length) for path in named}
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
        """Write a checkpoint here and now, and return when it is durable. A collective.

        Raises: CheckpointError, on all ranks, if any rank could not write its part; what was
        written is removed and older checkpoints are untouched.
        """
        assert self._flight is None, "one save in flight, never two"
        draft = self._draft(engine, state, extra, health, staged=None)
        outcome = self._writer(self._world).write(draft, threading.Event())
        if outcome.info is None:
            raise CheckpointError(outcome.problem)
        self._enter(outcome.info)
        self._retain()
        if self._world.is_main:
            sweep(self.folder)
        return outcome.info

    def begin(
        self,
        engine: Engine,
        state: TrainState,
        extra: Mapping[str, object],
        *,
        health: Health,
        staged: HostSnapshot,
    ) -> None:
        """Begin to write a checkpoint beside training; `settle` says what became of it.

        Called on all ranks; no collective in this thread. `staged`: a snapshot of the present
        state, not to be reused before it has settled. The checkpoint is in the catalogue from here
        on, so that nothing which is decided depends on how fast a disk is.
        """
        assert self._beside is not None, "who asks for it asks first whether it can be had"
        assert self._flight is None, "one save in flight, never two"
        if self._catalogue:
            self._retain()  # here, not when one lands: this moment is the same in each execution
        draft = self._draft(engine, state, extra, health, staged)
        expected = CheckpointInfo(
            name=draft.name,
            path=self.folder / draft.name,
            step=state.step,
            cursor=state.cursor,
            clock=state.clock,
            num_bytes=staged.num_bytes,
            digest="",
            world_size=self._world.size,
            format=draft.format,
            health=health,
        )
        self._enter(expected)
        self._meanwhile = None
        self._flight = Flight(self._writer(self._beside), draft)

    @property
    def writes_beside(self) -> bool:
        """True if `begin` can be called: the store was given a group for it."""
        return self._beside is not None

    @property
    def in_flight(self) -> str | None:
        """Name of the checkpoint that is written beside training. Equal on all ranks."""
        return None if self._flight is None else self._catalogue[-1].name

    def has_landed(self) -> bool:
        """True if this rank's part in a save is over, and `settle` may be called. No collective."""
        return self._flight is not None and self._flight.outcome() is not None

    def settle(self, *, waits: bool) -> Outcome | None:
        """Take over what became of the save in flight, None if that is open. A collective if any.

        `waits`: return when it is known; should the present attempt fail, it was the last.
        """
        if self._flight is None:
            return None
        if waits:
            self._flight.wait()
        outcomes = self._world.gather(self._flight.outcome())
        if any(outcome is None for outcome in outcomes):
            return None
        self._flight = None
        failures = [outcome for outcome in outcomes if outcome.info is None]
        outcome: Outcome = (failures or outcomes)[0]
        expected = self._catalogue.pop()
        assert expected.clock == outcome.state.clock, "it was the last to come"
        if outcome.info is not None:
            self._enter(outcome.info)
            if self._meanwhile is not None and outcome.info.health is not Health.QUARANTINED:
                self._set_health(expected.name, *self._meanwhile)
        return outcome

    def close(self) -> None:
        """Leave a save in flight to itself, at the end of a process. No collective."""
        if self._flight is not None:
            self._flight.abandon()

    def _draft(
        self,
        engine: Engine,
        state: TrainState,
        extra: Mapping[str, object],
        health: Health,
        staged: HostSnapshot | None,
    ) -> Draft:
        length = {"sequence_length": self._sequence_length}
        content = {"train_state": state.as_dict(), **length, **extra}
        return Draft(
            name=f"step-{state.step:08d}-clock-{state.clock:08d}",
            state=state,
            state_json=as_json(content),
            format=engine.checkpoint_format,
            health=health,
            pending=engine.begin_save(staged),
        )

    def _writer(self, world: World) -> CheckpointWriter:
        return CheckpointWriter(
            self.folder,
            world,
            retry_seconds=self._retry_seconds,
            sequence_length=self._sequence_length,
        )

    def _enter(self, info: CheckpointInfo) -> None:
        self._catalogue = [known for known in self._catalogue if known.name != info.name] + [info]

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
        if name == self.in_flight:
            self._meanwhile = health, reason  # it is written when the checkpoint has landed
        elif self._world.is_main and (self.folder / name).exists():
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
                # Only renamed: who writes next deletes it, since that takes a disk its time.
                try:
                    info.path.rename(self.folder / f"{DOOMED}{info.name}")
                except OSError as error:
                    logger.warning("%s could not be removed (%s)", info.path, error)


def _problem_of(digests: Sequence[Future[None]]) -> str | None:
    problems = [digest.exception() for digest in digests]
    for problem in problems:
        if problem is not None and not isinstance(problem, CorruptCheckpointError):
            raise problem
    return "; ".join(str(problem) for problem in problems if problem) or None


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
