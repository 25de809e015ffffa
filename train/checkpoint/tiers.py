"""Where a rewind can go, fastest first: snapshots in memory, then checkpoints on disk.

A state of one name is the same in both. Owns the choice and the fall from one tier to the next;
refuses to know what a rewind is for. Its methods are called on all ranks.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import Any

from train.checkpoint.info import CheckpointInfo, Health
from train.checkpoint.load_marks import MAX_FAILED_LOADS, LoadMarks
from train.checkpoint.snapshots import SnapshotRing
from train.checkpoint.store import CheckpointStore
from train.engines.base import Engine
from train.errors import CorruptCheckpointError

logger = logging.getLogger(__name__)


class Tiers:
    """The ring and the store of one run as one catalogue."""

    def __init__(
        self, store: CheckpointStore, ring: SnapshotRing, marks: LoadMarks | None = None
    ) -> None:
        self.store = store
        self.ring = ring
        self._marks = marks

    def good(self) -> list[CheckpointInfo]:
        """Return all states that a rewind may go to, oldest clock first, each name once."""
        by_name = {info.name: info for info in self.ring.trusted(Health.GOOD)}
        by_name.update({info.name: info for info in self.store.trusted(Health.GOOD)})
        return sorted(by_name.values(), key=lambda info: info.clock)

    def promote_before(self, step: int) -> None:
        """Call all candidates up to `step` good: enough calm steps have followed."""
        for tier in (self.ring, self.store):
            for info in tier.trusted(Health.CANDIDATE):
                if info.step <= step:
                    tier.promote(info)

    def find(self, name: str) -> CheckpointInfo | None:
        """Return the state of that name, or None if no tier has it."""
        entries = [*self.ring.entries(), *self.store.entries()]
        return next((info for info in reversed(entries) if info.name == name), None)

    def load_first(
        self, engine: Engine, candidates: list[CheckpointInfo]
    ) -> tuple[CheckpointInfo, dict[str, Any]]:
        """Load the first state that is whole, each from the fastest tier that has it.

        A collective. What is not whole is given up or quarantined, and said so.
        Raises: CorruptCheckpointError if none can be read.
        """
        for info in candidates:
            if self.ring.holds(info.name):
                try:
                    return info, self.ring.restore(info.name)
                except CorruptCheckpointError as error:
                    logger.warning("%s; falling back to disk", error)
            on_disk = next((i for i in self.store.entries() if i.name == info.name), None)
            if on_disk is None:
                continue
            marks = self._marks
            if marks is not None and marks.is_hopeless(info.name):
                logger.warning(
                    "loading checkpoint %s has ended the process %d times; it is quarantined, and "
                    "the one before is used",
                    info.name,
                    MAX_FAILED_LOADS,
                )
                self.store.quarantine(info.name, f"{MAX_FAILED_LOADS} loads ended the process")
                marks.clear()
                continue
            try:
                with marks.loading(info.name) if marks is not None else nullcontext():
                    return on_disk, self.store.load(engine, on_disk)
            except CorruptCheckpointError as error:
                logger.warning(
                    "checkpoint %s is corrupt (%s); falling back to the one before",
                    info.name,
                    error,
                )
                self.store.quarantine(info.name, f"corrupt: {error}")
        raise CorruptCheckpointError(
            f"none of {len(candidates)} checkpoints in {self.store.folder} can be read; bring one "
            "back from a copy, or start over with run.overwrite=true"
        )
