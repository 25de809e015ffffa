"""Processes: who we are, which device we use, and agreement among ranks.

Owns the process group of one job. Each job takes its own prefix in the launcher's store, so that
several jobs can follow each other in one process (Hydra multirun). A process without a launcher
needs no group and makes none.
"""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from train.health.incarnation import agree_on_name
from train.settings import Device, EngineKind, EngineSettings

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


# A rank whose disk is slow is waited for; one that has died breaks the connection at once.
_ASIDE_TIMEOUT = timedelta(hours=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """The ranks of one job. A lone process is rank 0 of 1, and its collectives do nothing.

    `group`: what its collectives go over; None is the job's own.
    """

    rank: int
    size: int
    device: torch.device
    group: Any = None

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes shared files."""
        return self.rank == 0

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's `value` on all ranks. A collective; the value is pickled."""
        if self.size == 1:
            return value
        values = [value]
        cpu = torch.device("cpu")
        dist.broadcast_object_list(values, src=0, group=self.group, device=cpu)
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's `value`, in rank order, on all ranks. A collective."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def barrier(self) -> None:
        """Wait for all ranks. A collective."""
        if self.size > 1:
            self.gather(None)

    def aside(self) -> World:
        """Return the same ranks over a gloo group of their own, for a thread beside training.

        A collective. Threads that share a group get each other's messages.
        """
        if self.size == 1:
            return self
        return replace(self, group=dist.new_group(backend="gloo", timeout=_ASIDE_TIMEOUT))

    def mesh(self) -> DeviceMesh:
        """Return the one-dimensional mesh of all ranks."""
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh(self.device.type, (self.size,))


def launched_size() -> int:
    """Return the number of ranks that the launcher started, 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_rank() -> int:
    """Return this process's rank, 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def resolve_engine(settings: EngineSettings, num_ranks: int) -> EngineKind:
    """Return the engine that `auto` means on `num_ranks`."""
    if settings.kind is not EngineKind.AUTO:
        return settings.kind
    return EngineKind.SINGLE if num_ranks == 1 else EngineKind.DDP


@contextmanager
def join_world(settings: EngineSettings, *, job_name: str) -> Iterator[World]:
    """Join the other ranks of this job, and leave them at the end.

    `job_name` is equal on all ranks and differs between the jobs of one launch. Both backends are
    made on GPUs: NCCL for tensors, gloo for what the host says.
    """
    has_cuda = settings.device is not Device.CPU and torch.cuda.is_available()
    device = torch.device("cpu")
    if has_cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    size = launched_size()
    is_single = resolve_engine(settings, size) is EngineKind.SINGLE
    if is_single and "MASTER_ADDR" not in os.environ:
        yield World(rank=0, size=1, device=device)
        return
    timeout = timedelta(seconds=settings.timeout_seconds)
    place = PrefixStore(f"trimtab/{job_name}", _launcher_store())
    start = agree_on_name(place, launched_rank(), size, timeout_seconds=settings.timeout_seconds)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if has_cuda else "gloo",
        store=PrefixStore(start, place),
        rank=launched_rank(),
        world_size=size,
        timeout=timeout,
        device_id=device if has_cuda else None,
    )
    try:
        yield World(rank=launched_rank(), size=size, device=device)
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        # Whoever drops the last reference to a gloo group runs its destructor, which joins a thread
        # that may be waiting for the interpreter's lock. Torch's own end of the group lets go of
        # that lock; DDP's reducer, if it outlives the group, does not, and hangs (seen with 2.13).
        # So everything that was built on the group is freed first.
        gc.collect()
        dist.destroy_process_group()


@cache
def _launcher_store() -> Store:
    """Return the launcher's key-value store; one connection serves all jobs of this process."""
    if "MASTER_ADDR" not in os.environ:
        return HashStore()
    store: Store = next(rendezvous("env://"))[0]
    return store
