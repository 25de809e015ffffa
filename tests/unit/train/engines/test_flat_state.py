"""Runs of elements as boxes: they cover the run, in order, and travel through a checkpoint."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train.distributed import World
from train.engines.flat_state import FlatPart, boxes, read_state, write_state
from train.errors import CheckpointError

# Engines accept it for their process.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

WORLD = World(rank=0, size=1, device=torch.device("cpu"))

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


@given(SHAPES, st.data())
def test_boxes_are_the_run_in_order_and_few(shape: tuple[int, ...], data: st.DataObject) -> None:
    numel = math.prod(shape)
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    whole = torch.arange(numel).reshape(shape)
    found = []
    for box in boxes(shape, start, stop):
        part = whole
        for dimension, (offset, size) in enumerate(zip(box.offsets, box.sizes, strict=True)):
            part = part.narrow(dimension, offset, size)
        found.append(part.reshape(-1))
    assert torch.cat(found or [torch.empty(0)]).tolist() == list(range(start, stop))
    assert len(found) <= 2 * len(shape) - 1


def test_a_scalar_is_one_box() -> None:
    (box,) = boxes((), 0, 1)
    assert box.offsets == box.sizes == ()
    assert list(boxes((), 0, 0)) == []


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 13, 24])
def test_parts_are_read_as_a_whole_and_a_whole_as_parts(tmp_path: Path, cut: int) -> None:
    whole = torch.randn(4, 6)
    flat = whole.reshape(-1)
    write_state(
        {"model": {"a": FlatPart((4, 6), 0, flat), "b": torch.tensor(3.0), "c": (1, None)}},
        tmp_path,
        WORLD,
    )
    read = {"model": {"a": torch.zeros(4, 6), "b": torch.zeros(()), "c": None}}
    elements = torch.zeros(flat[cut:].numel())
    parts = {"model": {"a": FlatPart((4, 6), cut, elements), "b": torch.zeros(()), "c": None}}
    for state in (read, parts):
        read_state(state, tmp_path, WORLD)
        assert float(state["model"]["b"]) == 3.0  # type: ignore[arg-type]
        assert state["model"]["c"] == (1, None)
    assert torch.equal(read["model"]["a"], whole)  # type: ignore[arg-type]
    assert torch.equal(elements, flat[cut:])


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    write_state({"a": torch.zeros(4, 6)}, tmp_path, WORLD)
    with pytest.raises(CheckpointError, match="Size mismatch"):
        read_state({"a": FlatPart((6, 4), 0, torch.zeros(24))}, tmp_path, WORLD)
