"""Good states in host memory: a ring of a few, for going back in seconds.

Each rank keeps its own part. A snapshot is lost with its process, so it stands beside the
checkpoints on disk, never instead of them. All ranks hold the same catalogue: it changes only by
calls that all ranks make in the same order.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

from train.checkpoint.info import CheckpointInfo, Health
from train.distributed import World
from train.engines.base import Engine
from train.engines.snapshot import HostSnapshot
from train.errors import CorruptCheckpointError
from train.state import TrainState

logger = logging.getLogger(__name__)

# A ring may fill this share of the host memory that is free when the run starts.
_MAX_MEMORY_SHARE = 0.5
# With the copy that a save is written from, if that is not a snapshot too, this share.
_MAX_SHARE_WITH_STAGING = 0.75


class Memory(TypedDict):
    """Bytes of one state of one rank, ranks on this host, and its free bytes, None if unknown."""

    state_bytes: int
    ranks_on_host: int
    available_bytes: int | None


@dataclass(slots=True, kw_only=True)
class _Slot:
    info: CheckpointInfo
    tensors: HostSnapshot
    extra: dict[str, Any]


class SnapshotRing:
    """The last `size` snapshots of one run, 2 or more, or none.

    Neither the youngest good one nor the one that will be good next is given up for another, so
    snapshots may come further apart than they were asked for.
    """

    def __init__(self, engine: Engine, world: World, *, size: int) -> None:
        self._engine = engine
        self._world = world
        self._size = size
        self._slots: list[_Slot] = []
        self._spare: list[HostSnapshot] = []
        self._lent: HostSnapshot | None = None

    def entries(self) -> list[CheckpointInfo]:
        """Return what the ring holds, oldest first."""
        return [slot.info for slot in self._slots]

    def trusted(self, health: Health) -> list[CheckpointInfo]:
        """Return the snapshots of one health, oldest first."""
        return [slot.info for slot in self._slots if slot.info.health is health]

    def take(
        self, state: TrainState, extra: Mapping[str, object], *, health: Health
    ) -> float | None:
        """Copy the present state into the ring and return the seconds that the step waited.

        None if it was not taken: the ring has no room for it now.

        Called on all ranks; no collective.
        """
        if self._size == 0:
            return None
        started = time.perf_counter()
        name = snapshot_name(state)
        self._give_up([slot for slot in self._slots if slot.info.name == name])
        if len(self._slots) >= self._size:
            good = [slot for slot in self._slots if slot.info.health is Health.GOOD]
            candidates = [slot for slot in self._slots if slot not in good]
            # The oldest candidate is the next good one: without it, none would ever become good.
            expendable = good[:-1][:1] or candidates[1:][-1:]
            if not expendable and good and candidates:
                return None
            self._give_up(expendable or self._slots[:1])
        tensors = self._engine.snapshot(self._spare.pop() if self._spare else None)
        info = CheckpointInfo(
            name=name,
            path=Path("memory") / name,
            step=state.step,
            cursor=state.cursor,
            clock=state.clock,
            num_bytes=tensors.num_bytes,
            digest="",
            world_size=self._world.size,
            format="memory",
            health=health,
        )
        everything = {"train_state": state.as_dict(), **deepcopy(dict(extra))}
        self._slots.append(_Slot(info=info, tensors=tensors, extra=everything))
        return time.perf_counter() - started

    def promote(self, info: CheckpointInfo) -> None:
        """Call a candidate good. Called on all ranks; no collective."""
        for slot in self._slots:
            if slot.info.name == info.name:
                slot.info = replace(slot.info, health=Health.GOOD)

    def holds(self, name: str) -> bool:
        """True if the ring holds the state of that name."""
        return any(slot.info.name == name for slot in self._slots)

    def peek(self, name: str) -> HostSnapshot | None:
        """Return this rank's part of a state, None if the ring does not hold it. No collective."""
        return next((slot.tensors for slot in self._slots if slot.info.name == name), None)

    def restore(self, name: str) -> dict[str, Any]:
        """Bring a state back into the engine and return its extra state. A collective.

        Raises: CorruptCheckpointError, on all ranks, if any rank's part fails its checksum; that
        snapshot is given up, and the caller loads a checkpoint from disk.
        """
        slot = next(slot for slot in self._slots if slot.info.name == name)
        problem: str | None = None
        try:
            self._engine.restore(slot.tensors)
        except CorruptCheckpointError as error:
            problem = str(error)
        answers = self._world.gather(problem)
        problems = [f"rank {rank}: {answer}" for rank, answer in enumerate(answers) if answer]
        if problems:
            self._give_up([slot])
            raise CorruptCheckpointError(f"snapshot {name} in memory: {'; '.join(problems)}")
        return deepcopy(slot.extra)

    def stage(self, name: str) -> HostSnapshot:
        """Return a copy of the present state, called `name`, that stays as it is until `give_back`.

        The one that was just taken, if there is one, so that one copy serves memory and disk. A
        ring of size 0 keeps the buffers of this copy alone. Called on all ranks; no collective.
        """
        assert self._lent is None, "one save in flight, never two"
        slot = next((slot for slot in self._slots if slot.info.name == name), None)
        if slot is not None:
            self._lent = slot.tensors
        else:
            self._lent = self._engine.snapshot(self._spare.pop() if self._spare else None)
        return self._lent

    def give_back(self) -> None:
        """Let the buffers that `stage` has lent be written again."""
        lent, self._lent = self._lent, None
        if lent is not None and all(slot.tensors is not lent for slot in self._slots):
            self._spare.append(lent)

    def forget(self, name: str) -> None:
        """Give up the state of that name."""
        self._give_up([slot for slot in self._slots if slot.info.name == name])

    def forget_after(self, clock: int) -> None:
        """Give up the snapshots younger than `clock`: they lie on what was rewound."""
        self._give_up([slot for slot in self._slots if slot.info.clock > clock])

    def _give_up(self, slots: list[_Slot]) -> None:
        for slot in slots:
            self._slots.remove(slot)
            if slot.tensors is not self._lent:
                self._spare.append(slot.tensors)


def snapshot_name(state: TrainState) -> str:
    """Return the name of a state, in memory and on disk."""
    return f"step-{state.step:08d}-clock-{state.clock:08d}"


def affordable_size(
    wanted: int, *, state_bytes: int, ranks_on_host: int, available_bytes: int | None
) -> int:
    """Return how many snapshots fit into the host's memory, at most `wanted`.

    `available_bytes`: free memory of the host, None if it cannot be known.
    """
    if available_bytes is None or state_bytes == 0:
        return wanted
    fits = int(_MAX_MEMORY_SHARE * available_bytes) // (state_bytes * ranks_on_host)
    if fits >= wanted:
        return wanted
    logger.warning(
        "checkpoint.keep_snapshots=%d needs %.1f GiB of host memory for each of %d ranks, and half "
        "of what is free is %.1f GiB: %s; set checkpoint.keep_snapshots=0 to silence this",
        wanted,
        wanted * state_bytes / 2**30,
        ranks_on_host,
        _MAX_MEMORY_SHARE * available_bytes / 2**30,
        f"keeping {fits}" if fits >= 2 else "rewinds go to checkpoints on disk",
    )
    return fits if fits >= 2 else 0


def has_room_to_stage(
    num_snapshots: int, *, state_bytes: int, ranks_on_host: int, available_bytes: int | None
) -> bool:
    """Return whether one state more than the snapshots fits, for saves beside training."""
    if available_bytes is None:
        return True
    needed = (num_snapshots + 1) * state_bytes * ranks_on_host
    if needed <= _MAX_SHARE_WITH_STAGING * available_bytes:
        return True
    logger.warning(
        "checkpoint.is_async=true needs %.1f GiB of host memory beside %d snapshots, and %.1f GiB "
        "are free: training waits for each save; set checkpoint.is_async=false to silence this",
        *(state_bytes * ranks_on_host / 2**30, num_snapshots, available_bytes / 2**30),
    )
    return False


def available_memory() -> int | None:
    """Return the host memory that can be had without swapping, None if it is not known."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None
