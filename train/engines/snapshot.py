"""Copies of one rank's training state in host memory, with checksums, and the way back.

Owns the buffers, the copy stream and the thread that computes checksums. It knows tensors by name
and nothing of engines; an engine says which tensors are its state. No collective anywhere.

A copy lies in slabs of a power of two, because torch rounds pinned allocations up to one. A slot
begins at a multiple of 16 bytes and is filled up with zeros, so that it can be summed as words.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch
from torch import Tensor

from train.errors import CheckpointError, CorruptCheckpointError

_ALIGNMENT_BYTES = 16
_SLAB_BYTES = 1 << 28
_WORD_MASK = (1 << 64) - 1
_CLONE_BYTES = 1 << 26
_NOTHING = torch.empty(0, dtype=torch.uint8)

HostValues = dict[str, tuple[float, ...]]


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one tensor lies: `offset` in bytes from the start of the first slab."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True, eq=False)
class HostSnapshot:
    """One rank's state at one step, in host memory; pinned if it came from a GPU.

    `host_values` is what the state holds outside of tensors (learning rates, counters).
    `slabs` are its bytes; whoever changes one of them makes `restore` refuse it.
    """

    slots: tuple[Slot, ...]
    slabs: tuple[Tensor, ...]
    host_values: HostValues
    _checksums: Future[list[int]]

    @property
    def num_bytes(self) -> int:
        """Host memory that it takes, padding included."""
        return sum(slab.numel() for slab in self.slabs)

    def checksums(self) -> list[int]:
        """Return one checksum a slot; waits until the copy is done and summed.

        What changes between the end of the copy and that of the sum goes unseen.
        """
        return self._checksums.result()

    def wait(self) -> None:
        """Wait until the copy is done and summed, or has failed."""
        wait([self._checksums])

    def is_split(self, slot: Slot) -> bool:
        """True if a slot lies in more than one slab."""
        return slot.offset // _SLAB_BYTES < (slot.offset + slot.num_bytes - 1) // _SLAB_BYTES

    def tensor(self, slot: Slot) -> Tensor:
        """Return a slot as a tensor on the host: a view, a copy only if it is split.

        The storage of a view is no larger than itself: who writes it does not copy it first.
        """
        pieces = [torch.from_numpy(piece.numpy()) for _, piece in _pieces(slot, self.slabs)]
        content = pieces[0] if len(pieces) == 1 else torch.cat([*pieces, _NOTHING])
        return content.view(slot.dtype).view(slot.shape)

    def is_finite(self) -> bool:
        """True if no number in it is NaN or infinite; waits until the copy is done."""
        self.checksums()
        return all(
            is_finite(piece.view(slot.dtype))
            for slot in self.slots
            if slot.dtype.is_floating_point
            for _, piece in _pieces(slot, self.slabs)
        )


class SnapshotCopier:
    """Takes snapshots of tensors on one device and puts them back.

    On a GPU the copy runs on a stream of its own, behind what the current stream had to do; who
    writes to the tensors next calls `before_write`, and then the device waits, not the host.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        # torch leaves it untyped.
        self._stream = torch.cuda.Stream(device) if self._is_cuda else None  # type: ignore[no-untyped-call]
        self._copied: torch.cuda.Event | None = None
        self._checksum_thread = ThreadPoolExecutor(1, thread_name_prefix="snapshot-checksum")

    def take(
        self, tensors: Mapping[str, Tensor], host_values: HostValues, reuse: HostSnapshot | None
    ) -> HostSnapshot:
        """Copy `tensors`; into the buffers of `reuse`, which is lost, if they have the same layout.

        A host sync only if the copy into `reuse` has not ended yet.
        """
        slots = _layout(tensors)
        if reuse is not None:
            reuse.wait()
        is_reused = reuse is not None and reuse.slots == slots
        slabs = reuse.slabs if reuse is not None and is_reused else self._allocate(slots)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):  # does nothing where there is none
            for slot, tensor in zip(slots, tensors.values(), strict=True):
                for start, host in _pieces(slot, slabs):
                    host.copy_(_bytes(tensor)[start : start + len(host)], non_blocking=True)
            self._copied = self._stream.record_event() if self._stream is not None else None
        checksums = self._checksum_thread.submit(_copied_checksums, slots, slabs, self._copied)
        return HostSnapshot(slots, slabs, host_values, checksums)

    def put_back(self, snapshot: HostSnapshot, tensors: Mapping[str, Tensor]) -> None:
        """Check every byte of `snapshot`, then copy it into `tensors` in place.

        Raises: CorruptCheckpointError, CheckpointError, both before any tensor was changed.
        """
        if snapshot.slots != _layout(tensors):
            raise CheckpointError(
                f"The snapshot holds {len(snapshot.slots)} tensors, {snapshot.num_bytes:,} bytes, "
                "and not the state of this engine; restore it in the engine that took it"
            )
        found = [slot_checksum(slot, snapshot.slabs) for slot in snapshot.slots]
        for slot, is_now, was in zip(snapshot.slots, found, snapshot.checksums(), strict=True):
            if is_now != was:
                raise CorruptCheckpointError(
                    f"{slot.name} changed in host memory: its checksum is {is_now:016x}, and was "
                    f"{was:016x} when the snapshot was taken; go back to another snapshot or to "
                    "a checkpoint, and suspect the memory of this host"
                )
        self.before_write()
        for slot, tensor in zip(snapshot.slots, tensors.values(), strict=True):
            for start, host in _pieces(slot, snapshot.slabs):
                _bytes(tensor)[start : start + len(host)].copy_(host, non_blocking=True)

    def before_write(self) -> None:
        """Make what the current stream does next wait for the last copy; the host goes on."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)
            self._copied = None

    def _allocate(self, slots: Sequence[Slot]) -> tuple[Tensor, ...]:
        total = _padded_bytes(slots)
        slabs = tuple(
            torch.empty(
                min(_SLAB_BYTES, total - start), dtype=torch.uint8, pin_memory=self._is_cuda
            )
            for start in range(0, total, _SLAB_BYTES)
        )
        for slot in slots:
            if slot.num_bytes % _ALIGNMENT_BYTES:
                slab, end = divmod(slot.offset + _padded(slot.num_bytes), _SLAB_BYTES)
                slabs[slab - (end == 0)][end - _ALIGNMENT_BYTES : end or None].zero_()
        return slabs


def tensor_of(snapshot: HostSnapshot, name: str) -> Tensor:
    """Return a copy of one tensor of a snapshot; waits until that is done and summed."""
    snapshot.wait()
    slot = next(slot for slot in snapshot.slots if slot.name == name)
    flat = torch.empty(slot.num_bytes, dtype=torch.uint8)
    for start, piece in _pieces(slot, snapshot.slabs):
        flat[start : start + len(piece)] = piece
    return flat.view(slot.dtype).view(slot.shape)


def state_checksums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return what `slot_checksum` returns for a copy of each of `tensors`. A host sync."""
    sums = torch.stack([tensor_checksum(tensor) for tensor in tensors.values()]).tolist()
    return {name: total & _WORD_MASK for name, total in zip(tensors, sums, strict=True)}


def state_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Return the host memory that a snapshot of `tensors` takes."""
    return _padded_bytes(_layout(tensors))


def state_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 over the names, shapes, types and checksums of `tensors`. A host sync."""
    sums = state_checksums(tensors)
    digest = hashlib.sha256()
    for slot in _layout(tensors):
        line = f"{slot.name} {slot.shape} {slot.dtype} {sums[slot.name]:016x}\n"
        digest.update(line.encode())
    return digest.hexdigest()


def is_finite(tensor: Tensor) -> bool:
    """True if no number in `tensor` is NaN or infinite. A host sync."""
    if not tensor.numel():
        return True
    # One pass and no copy, ten times as fast as a norm; both are NaN if one number is.
    return all(math.isfinite(extreme) for extreme in torch.aminmax(tensor))


def slot_checksum(slot: Slot, slabs: Sequence[Tensor]) -> int:
    """Return the sum of a slot's 64-bit words modulo 2^64: no single flipped bit goes unseen."""
    padded = Slot(slot.name, slot.shape, slot.dtype, slot.offset, _padded(slot.num_bytes))
    words = (piece.view(torch.int64).sum() for _, piece in _pieces(padded, slabs))
    return sum(int(word) for word in words) & _WORD_MASK


def _copied_checksums(
    slots: Sequence[Slot], slabs: Sequence[Tensor], copied: torch.cuda.Event | None
) -> list[int]:
    if copied is not None:
        copied.synchronize()
    return [slot_checksum(slot, slabs) for slot in slots]


def tensor_checksum(tensor: Tensor) -> Tensor:
    """Return what `slot_checksum` returns for a copy of `tensor`, signed, on its device."""
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, tensor.nbytes, _CLONE_BYTES):
        piece = _bytes(tensor)[start : start + _CLONE_BYTES]
        missing = -len(piece) % 8
        if missing or piece.storage_offset() % 8:
            piece = torch.nn.functional.pad(piece, (0, missing)).clone()
        total += piece.view(torch.int64).sum()
    return total


def _layout(tensors: Mapping[str, Tensor]) -> tuple[Slot, ...]:
    slots = []
    offset = 0
    for name, tensor in tensors.items():
        slots.append(Slot(name, tuple(tensor.shape), tensor.dtype, offset, tensor.nbytes))
        offset += _padded(tensor.nbytes)
    return tuple(slots)


def _pieces(slot: Slot, slabs: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Yield a slot's bytes slab by slab, each with its start in the slot."""
    start = 0
    while start < slot.num_bytes:
        slab, within = divmod(slot.offset + start, _SLAB_BYTES)
        piece = slabs[slab][within : within + slot.num_bytes - start]
        yield start, piece
        start += len(piece)


def _bytes(tensor: Tensor) -> Tensor:
    """Return a view of a tensor's bytes; one that has gaps is refused by `view`."""
    return tensor.detach().view(-1).view(torch.uint8)


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def _padded_bytes(slots: Sequence[Slot]) -> int:
    return slots[-1].offset + _padded(slots[-1].num_bytes) if slots else 0
