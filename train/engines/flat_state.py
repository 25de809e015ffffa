"""Tensors of which a rank holds a run of elements, in torch.distributed.checkpoint.

ZeRO cuts parameters wherever its flat partitions end, in the middle of a row. Any run of elements
of a row-major tensor is a few boxes, and boxes are what a distributed checkpoint is made of: so
each rank writes and reads just what it holds, no tensor is ever gathered, and the files are those
of the other engines. Knows nothing of DeepSpeed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from train.distributed import World
from train.engines.dcp import catchable


@dataclass(frozen=True, slots=True)
class Box:
    """A part of a tensor: where it begins in each dimension, and how far it goes."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Yield the boxes that make up the elements `[start, stop)` of a row-major tensor, in order.

    At most 2 n - 1 of them for n dimensions; each is a run of elements itself.
    """
    if start >= stop:
        return
    if len(shape) <= 1:
        yield Box((start,) * len(shape), (stop - start,) * len(shape))
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:  # within one row
        yield from _in_row(shape, last, start, stop)
        return
    if start < first * row:
        yield from _in_row(shape, first - 1, start, first * row)
    if first < last:
        yield Box((first, *(0 for _ in shape[1:])), (last - first, *shape[1:]))
    if last * row < stop:
        yield from _in_row(shape, last, last * row, stop)


def _in_row(shape: tuple[int, ...], number: int, start: int, stop: int) -> Iterator[Box]:
    before = number * math.prod(shape[1:])
    for box in boxes(shape[1:], start - before, stop - before):
        yield Box((number, *box.offsets), (1, *box.sizes))


class FlatPart:
    """What this rank holds of a tensor of `shape`: `elements`, the run of them from `start` on."""

    def __init__(self, shape: tuple[int, ...], start: int, elements: Tensor) -> None:
        self._shape = torch.Size(shape)
        self._boxes: dict[torch.Size, tuple[ChunkStorageMetadata, Tensor]] = {}
        self._properties = TensorProperties.create_from_tensor(elements)
        position = 0
        for box in boxes(tuple(shape), start, start + elements.numel()):
            numel = math.prod(box.sizes)
            offsets, sizes = torch.Size(box.offsets), torch.Size(box.sizes)
            view = elements[position : position + numel].view(sizes)
            self._boxes[offsets] = (ChunkStorageMetadata(offsets=offsets, sizes=sizes), view)
            position += numel

    def size(self) -> torch.Size:
        """Return the shape of the whole."""
        return self._shape

    def at(self, index: MetadataIndex) -> Tensor:
        """Return the box that begins there; a view of the elements."""
        assert index.offset is not None, "a box is asked for by where it begins"
        return self._boxes[index.offset][1]

    def __create_write_items__(self, fqn: str, part: object) -> list[WriteItem]:
        del part
        return [
            WriteItem(
                index=MetadataIndex(fqn, offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk, properties=self._properties, size=self._shape
                ),
            )
            for offsets, (chunk, _) in self._boxes.items()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [chunk for chunk, _ in self._boxes.values()]


class _SavePlanner(DefaultSavePlanner):
    """Saves states that hold `FlatPart`s beside tensors and values."""

    def lookup_object(self, index: MetadataIndex) -> Any:
        """Return what an item of the plan writes."""
        part = self.state_dict[index.fqn]
        return part.at(index) if isinstance(part, FlatPart) else super().lookup_object(index)


class _LoadPlanner(DefaultLoadPlanner):
    """Loads into `FlatPart`s beside tensors and values."""

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Take up the state; the default one refuses types that are not torch's."""
        self.original_state_dict = state_dict
        self.state_dict, self.mappings = flatten_state_dict(state_dict)
        self.metadata = metadata
        self.is_coordinator = is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """Return where an item of the plan is read to."""
        part = self.state_dict[index.fqn]
        return part.at(index) if isinstance(part, FlatPart) else super().lookup_tensor(index)


def write_state(state: dict[str, Any], folder: Path, world: World) -> None:
    """Write a state that may hold `FlatPart`s. A collective.

    Raises: CheckpointError, on all ranks, if any rank could not write its part.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    # One thread: torch 2.13 loses the exceptions of further ones, and with them a full disk.
    writer = FileSystemWriter(folder, single_file_per_rank=True, sync_files=False)
    with catchable():
        save(
            state,
            storage_writer=writer,
            planner=_SavePlanner(),
            process_group=world.group,
            no_dist=world.size == 1,
        )


def read_state(state: dict[str, Any], folder: Path, world: World) -> None:
    """Read into a state that may hold `FlatPart`s, in place. A collective.

    Raises: CheckpointError, on all ranks, if any rank could not read its part.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = FileSystemReader(folder)
    with catchable():
        load(state, storage_reader=reader, planner=_LoadPlanner(), no_dist=world.size == 1)
