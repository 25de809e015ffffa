"""One state on its way through torch.distributed.checkpoint: from the engine, or from a copy.

Names and layout are the same either way, so every engine reads what any engine wrote. A copy in
host memory stands in for the tensors one by one: nothing is moved to a device or gathered.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from train.distributed import World
from train.engines.snapshot import HostSnapshot, Slot, is_finite
from train.engines.update_norm import local_part
from train.errors import CheckpointError

if TYPE_CHECKING:
    from torch.distributed.checkpoint.planner import SavePlanner


class DcpWrite:
    """See `PendingWrite`. `state` has the parts `model` and `optimizer`, both flat.

    `staged`: a snapshot of the same state; its slots are named PARAMETER/KIND.
    """

    def __init__(self, state: dict[str, dict[str, Any]], staged: HostSnapshot | None) -> None:
        self._staged = staged
        self._split: dict[str, Slot] = {}
        self._state = state if staged is None else self._on_host(state, staged)

    def write(self, folder: Path, world: World) -> None:
        """See `PendingWrite.write`. Raises: CheckpointError on all ranks, if one has failed."""
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        if self._staged is not None:
            self._staged.wait()
        # One thread: torch 2.13 loses the exceptions of further ones, and with them a full disk.
        writer = FileSystemWriter(
            folder,
            single_file_per_rank=True,
            sync_files=False,
            # A copy is on the host: a loader for the device would wait for the kernels of training.
            per_thread_copy_ahead=10_000_000 if self._staged is None else 0,
        )
        with catchable():
            save(
                self._state,
                storage_writer=writer,
                planner=self._planner(),
                process_group=world.group,
                no_dist=world.size == 1,
            )

    def is_finite(self) -> bool:
        """See `PendingWrite.is_finite`."""
        if self._staged is not None:
            return self._staged.is_finite()
        tensors = (value for part in self._state.values() for value in part.values())
        return all(is_finite(local_part(value)) for value in tensors if isinstance(value, Tensor))

    def _on_host(
        self, state: Mapping[str, Mapping[str, Any]], staged: HostSnapshot
    ) -> dict[str, dict[str, Any]]:
        """Return `state` with the copies in place of its tensors."""
        slots = {slot.name: slot for slot in staged.slots}

        def stand_in(part: str, key: str, value: object) -> object:
            if not isinstance(value, Tensor):
                return value
            slot = slots[_slot_name(part, key)]
            if staged.is_split(slot):  # put together when its turn comes, one at a time
                self._split[f"{part}.{key}"] = slot
                local = torch.empty((), dtype=slot.dtype).expand(slot.shape)
            else:
                local = staged.tensor(slot)
            if not isinstance(value, DTensor):
                return local
            # Not `from_local`: that would move it to the device of the mesh.
            return DTensor(local, value._spec, requires_grad=False)  # type: ignore[no-untyped-call]

        return {
            part: {key: stand_in(part, key, value) for key, value in content.items()}
            for part, content in state.items()
        }

    def _planner(self) -> SavePlanner:
        from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
        from torch.distributed.checkpoint.metadata import MetadataIndex

        staged, split = self._staged, self._split

        class Planner(DefaultSavePlanner):
            """Puts a tensor together that lies in several slabs, when it is written."""

            def lookup_object(self, index: MetadataIndex) -> Any:
                slot = split.get(index.fqn)
                if slot is None or staged is None:
                    return super().lookup_object(index)
                return staged.tensor(slot)

        return Planner()


def _slot_name(part: str, key: str) -> str:
    """Return the name in a snapshot of what the state calls `key`."""
    if part == "model":
        return f"{key}/parameter"
    parameter, _, kind = key.removeprefix("state.").rpartition(".")
    return f"{parameter}/{kind}"


def accept_lone_process() -> None:
    """Silence torch's remark that a lone process saves alone, in all threads; it is meant to."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled", append=False)


@contextmanager
def catchable() -> Iterator[None]:
    """Turn torch's CheckpointException, which no `except Exception` catches, into our own."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        for failure, _ in error.failures.values():
            if isinstance(failure, KeyboardInterrupt | SystemExit):
                raise failure from error
        raise CheckpointError(str(error).strip().splitlines()[-1]) from error
