"""Copies in host memory: what goes in comes out, and no flipped bit does."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from train.engines import snapshot as snapshot_module
from train.engines.snapshot import (
    HostSnapshot,
    SnapshotCopier,
    slot_checksum,
    state_bytes,
    state_digest,
)
from train.errors import CheckpointError, CorruptCheckpointError

CPU = torch.device("cpu")


@pytest.fixture
def copier() -> SnapshotCopier:
    return SnapshotCopier(CPU)


def state(seed: int = 0) -> dict[str, Tensor]:
    """Return tensors of every kind that an engine has, and some odd ones."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "matrix": torch.randn(7, 9, generator=generator),
        "step": torch.tensor(float(seed)),
        "odd_bf16": torch.randn(11, generator=generator).bfloat16(),
        "none_on_this_rank": torch.zeros(0, 4),
        "view": torch.randn(30, generator=generator)[3:26],
        "bytes": torch.randint(0, 255, (5,), generator=generator, dtype=torch.uint8),
        "exactly_16_bytes": torch.randn(4, generator=generator),
    }


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(params=[1 << 28, 16, 48], ids=["one_slab", "16_bytes", "48_bytes"])
def slab_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Let tensors lie across the borders of slabs, as only large ones do otherwise."""
    monkeypatch.setattr(snapshot_module, "_SLAB_BYTES", request.param)
    size: int = request.param
    return size


@pytest.mark.usefixtures("slab_bytes")
def test_what_was_taken_comes_back_and_nothing_else_does(copier: SnapshotCopier) -> None:
    tensors = state()
    before = copies(tensors)
    snapshot = copier.take(tensors, {"lr": (0.1,)}, None)
    for tensor in tensors.values():
        tensor.zero_()
    copier.put_back(snapshot, tensors)
    assert same(tensors, before)
    assert snapshot.host_values == {"lr": (0.1,)}


@pytest.mark.usefixtures("slab_bytes")
def test_snapshot_takes_what_was_announced(copier: SnapshotCopier) -> None:
    tensors = state()
    snapshot = copier.take(tensors, {}, None)
    assert snapshot.num_bytes == state_bytes(tensors)
    used = sum(tensor.nbytes for tensor in tensors.values())
    assert used <= snapshot.num_bytes < used + 16 * len(tensors)


def test_slabs_have_at_most_their_size(slab_bytes: int, copier: SnapshotCopier) -> None:
    slabs = copier.take(state(), {}, None).slabs
    assert all(slab.numel() == slab_bytes for slab in slabs[:-1])
    assert 0 < slabs[-1].numel() <= slab_bytes


@pytest.mark.usefixtures("slab_bytes")
def test_no_flipped_bit_is_restored(copier: SnapshotCopier) -> None:
    tensors = state()
    snapshot = copier.take(tensors, {}, None)
    snapshot.wait()
    for tensor in tensors.values():
        tensor.zero_()
    before = copies(tensors)
    num_refused = 0
    for slab in snapshot.slabs:
        for position in range(slab.numel()):
            for bit in range(8):
                slab[position] ^= 1 << bit
                with pytest.raises(CorruptCheckpointError, match="changed in host memory"):
                    copier.put_back(snapshot, tensors)
                slab[position] ^= 1 << bit
                num_refused += 1
    assert num_refused == 8 * snapshot.num_bytes
    assert same(tensors, before), "not one tensor was touched"


def test_refusal_names_the_tensor(copier: SnapshotCopier) -> None:
    tensors = state()
    snapshot = copier.take(tensors, {}, None)
    snapshot.wait()
    for slot in snapshot.slots:
        if slot.num_bytes:
            snapshot.slabs[0][slot.offset] ^= 1
            with pytest.raises(CorruptCheckpointError, match=f"^{slot.name} changed"):
                copier.put_back(snapshot, tensors)
            snapshot.slabs[0][slot.offset] ^= 1


@pytest.mark.parametrize("change", ["name", "shape", "dtype", "number"])
def test_snapshot_of_other_tensors_is_refused(change: str, copier: SnapshotCopier) -> None:
    snapshot = copier.take(state(), {}, None)
    other = state(1)
    if change == "name":
        other["another"] = other.pop("exactly_16_bytes")
    elif change == "shape":
        other["matrix"] = other["matrix"].T.contiguous()
    elif change == "dtype":
        other["matrix"] = other["matrix"].view(torch.int32)
    else:
        del other["exactly_16_bytes"]
    before = copies(other)
    with pytest.raises(CheckpointError, match="restore it in the engine that took it"):
        copier.put_back(snapshot, other)
    assert same(other, before)


def test_buffers_are_written_again(copier: SnapshotCopier) -> None:
    first = copier.take(state(0), {}, None)
    pointers = [slab.data_ptr() for slab in first.slabs]
    second = copier.take(state(1), {}, first)
    assert [slab.data_ptr() for slab in second.slabs] == pointers
    target = state(2)
    copier.put_back(second, target)
    assert same(target, state(1))


def test_buffers_of_another_layout_are_not_written_again(copier: SnapshotCopier) -> None:
    first = copier.take({"other": torch.zeros(3)}, {}, None)
    second = copier.take(state(), {}, first)
    assert second.slabs[0].data_ptr() != first.slabs[0].data_ptr()
    copier.put_back(second, state(1))


def test_buffers_are_not_written_before_their_checksums_are_done(copier: SnapshotCopier) -> None:
    first = copier.take(state(0), {}, None)
    before = [slab.clone() for slab in first.slabs]
    unfinished: Future[list[int]] = Future()
    pending = replace(first, _checksums=unfinished)
    found: list[HostSnapshot] = []
    thread = threading.Thread(target=lambda: found.append(copier.take(state(1), {}, pending)))
    thread.start()
    thread.join(0.05)
    assert not found
    assert all(torch.equal(*pair) for pair in zip(first.slabs, before, strict=True))
    unfinished.set_result([])
    thread.join()
    assert not torch.equal(found[0].slabs[0], before[0])


def test_tensor_with_gaps_is_refused(copier: SnapshotCopier) -> None:
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        copier.take({"gaps": torch.zeros(4, 4)[:, :2]}, {}, None)


def test_digest_is_that_of_the_bytes_wherever_they_lie() -> None:
    tensors = state()
    assert tensors["view"].storage_offset() % 8 != 0
    assert state_digest(tensors) == state_digest(copies(tensors))


def test_digest_agrees_with_the_checksums_of_a_copy(
    copier: SnapshotCopier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot_module, "_CLONE_BYTES", 64)
    tensors = state()
    snapshot = copier.take(tensors, {}, None)
    again = [slot_checksum(slot, snapshot.slabs) for slot in snapshot.slots]
    assert again == snapshot.checksums()
    alone = [snapshot_module.tensor_checksum(tensor).item() for tensor in tensors.values()]
    assert [checksum & (1 << 64) - 1 for checksum in alone] == again


def test_digest_sees_every_bit_and_every_name() -> None:
    tensors = state()
    digest = state_digest(tensors)
    for tensor in tensors.values():
        flat = tensor.view(-1).view(torch.uint8)
        for position in range(len(flat)):
            flat[position] ^= 64
            assert state_digest(tensors) != digest
            flat[position] ^= 64
    assert state_digest(tensors) == digest
    assert state_digest({f"{name}_": tensor for name, tensor in tensors.items()}) != digest


def test_each_tensor_of_a_snapshot_can_be_looked_at(
    copier: SnapshotCopier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot_module, "_SLAB_BYTES", 64)
    tensors = state()
    snapshot = copier.take(tensors, {}, None)
    for name, tensor in tensors.items():
        found = snapshot_module.tensor_of(snapshot, name)
        assert found.shape == tensor.shape and found.dtype == tensor.dtype
        assert torch.equal(found.view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))
