"""Snapshots from a GPU: copied behind the host's back, and in the right order."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Launch

from train.engines.snapshot import HostSnapshot, SnapshotCopier, state_digest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA"),
]

BUSY_CYCLES = 500_000_000  # about a quarter of a second
NUMEL = 1 << 22


@pytest.fixture
def distributed_tasks() -> Iterator[Any]:
    """Return the tasks of tests/distributed."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "distributed"))
    try:
        import snapshot_tasks

        yield snapshot_tasks
    finally:
        sys.path.pop(0)


@pytest.fixture
def copier() -> SnapshotCopier:
    return SnapshotCopier(torch.device("cuda", torch.cuda.current_device()))


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((NUMEL,), value, device="cuda")}


def restored(copier: SnapshotCopier, snapshot: HostSnapshot) -> set[float]:
    """Return the distinct values that a snapshot of `tensors` holds."""
    target = tensors(-1.0)
    copier.put_back(snapshot, target)
    return set(target["weight"].unique().tolist())


def test_copy_waits_for_what_the_device_still_had_to_do(copier: SnapshotCopier) -> None:
    state = tensors(1.0)
    torch.cuda._sleep(BUSY_CYCLES)
    state["weight"].fill_(2.0)
    snapshot = copier.take(state, {}, None)
    assert restored(copier, snapshot) == {2.0}


def test_host_does_not_wait_for_the_copy(copier: SnapshotCopier) -> None:
    state = tensors(1.0)
    used = copier.take(state, {}, None)  # pinned memory is slow to get; a ring gets it once
    used.wait()
    torch.cuda.synchronize()
    torch.cuda._sleep(BUSY_CYCLES)
    is_done = torch.cuda.Event()
    is_done.record()
    snapshot = copier.take(state, {}, used)
    copier.before_write()
    assert not is_done.query(), "the device is still asleep"
    assert not snapshot._checksums.done()
    assert restored(copier, snapshot) == {1.0}


def _asleep(copier: SnapshotCopier, state: dict[str, torch.Tensor]) -> HostSnapshot:
    """Return buffers to write into, on a copy stream that cannot begin with it yet."""
    used = copier.take(state, {}, None)
    used.wait()
    torch.cuda.synchronize()
    assert copier._stream is not None
    with torch.cuda.stream(copier._stream):
        torch.cuda._sleep(BUSY_CYCLES)
    return used


def test_next_write_waits_for_the_copy_on_the_device(copier: SnapshotCopier) -> None:
    state = tensors(1.0)
    snapshot = copier.take(state, {}, _asleep(copier, state))
    copier.before_write()
    state["weight"].fill_(2.0)
    assert restored(copier, snapshot) == {1.0}


def test_without_the_wait_the_write_comes_first(copier: SnapshotCopier) -> None:
    """The test above can fail: this is what it guards against."""
    state = tensors(1.0)
    snapshot = copier.take(state, {}, _asleep(copier, state))
    state["weight"].fill_(2.0)
    assert restored(copier, snapshot) == {2.0}


def test_buffers_in_flight_are_not_written_again(copier: SnapshotCopier) -> None:
    states = [tensors(float(value)) for value in range(5)]  # kept: a copy reads them later
    first = copier.take(states[1], {}, None)
    second = copier.take(states[2], {}, None)
    torch.cuda._sleep(BUSY_CYCLES)
    third = copier.take(states[3], {}, first)
    fourth = copier.take(states[4], {}, third)
    assert restored(copier, second) == {2.0}
    assert restored(copier, fourth) == {4.0}


def test_restore_directly_behind_a_snapshot_reads_what_was_copied(copier: SnapshotCopier) -> None:
    state = tensors(1.0)
    torch.cuda._sleep(BUSY_CYCLES)
    snapshot = copier.take(state, {}, None)
    copier.put_back(snapshot, state)
    assert set(state["weight"].unique().tolist()) == {1.0}


def test_buffers_are_pinned_and_kept(copier: SnapshotCopier) -> None:
    state = tensors(1.0)
    first = copier.take(state, {}, None)
    assert all(slab.is_pinned() for slab in first.slabs)
    pointers = [slab.data_ptr() for slab in first.slabs]
    second = copier.take(state, {}, first)
    assert [slab.data_ptr() for slab in second.slabs] == pointers


def test_digest_is_the_same_on_both_devices() -> None:
    generator = torch.Generator().manual_seed(0)
    here = {"a": torch.randn(1001, generator=generator), "b": torch.randn(3).bfloat16()}
    there = {name: tensor.cuda() for name, tensor in here.items()}
    assert state_digest(here) == state_digest(there)


@pytest.mark.parametrize("engine", ["single", "ddp", "fsdp"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_same_steps_after_a_restore_are_bit_equal(
    engine: str, precision: str, tmp_path: Path, distributed_tasks: Any
) -> None:
    arguments = (str(tmp_path), "snapshots", engine, 2, precision, "{}", "cuda")
    launch = Launch(distributed_tasks.snapshots, *arguments, log=tmp_path / "output")
    assert launch.wait() == (0,), launch.output()
    found: dict[str, Any] = json.loads((tmp_path / "snapshots.0.json").read_text())
    assert found["once"] == found["twice"] == {"digest": True, "kept": [], "steps": True}
    assert found["healed"] == [True, True, True]
    assert found["fresh"] and found["reuses"] and found["last"]
    assert found["refused"]["is_untouched"]


def test_step_and_snapshot_make_the_host_wait_for_nothing(
    tmp_path: Path, distributed_tasks: Any
) -> None:
    launch = Launch(
        distributed_tasks.without_host_sync, str(tmp_path), "sync", log=tmp_path / "output"
    )
    assert launch.wait() == (0,), launch.output()
    found: dict[str, Any] = json.loads((tmp_path / "sync.0.json").read_text())
    assert found["num_steps"] == 3
