"""A load that ends the process leaves a mark; two of them are enough."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import torch

from train.checkpoint.load_marks import LoadMarks
from train.distributed import World
from train.errors import CheckpointError

WORLD = World(rank=0, size=1, device=torch.device("cpu"))


def crash(folder: Path, name: str, error: BaseException) -> None:
    with contextlib.suppress(type(error)), LoadMarks(folder, WORLD).loading(name):
        raise error


@pytest.mark.parametrize("error", [SystemExit(), KeyboardInterrupt(), ValueError("bad pickle")])
def test_two_loads_that_do_not_come_to_their_end_are_enough(
    error: BaseException, tmp_path: Path
) -> None:
    crash(tmp_path, "a", error)
    assert not LoadMarks(tmp_path, WORLD).is_hopeless("a")
    crash(tmp_path, "a", error)
    assert LoadMarks(tmp_path, WORLD).is_hopeless("a")
    assert not LoadMarks(tmp_path, WORLD).is_hopeless("b")


def test_a_load_that_succeeds_forgets_those_before(tmp_path: Path) -> None:
    marks = LoadMarks(tmp_path, WORLD)
    crash(tmp_path, "a", SystemExit())
    with marks.loading("a"):
        assert json.loads((tmp_path / ".loading.json").read_text())["failures"] == 2
    crash(tmp_path, "a", SystemExit())
    assert not marks.is_hopeless("a")


@pytest.mark.parametrize("error", [CheckpointError("another engine's"), MemoryError()])
def test_what_is_not_the_fault_of_the_checkpoint_leaves_no_mark(
    error: Exception, tmp_path: Path
) -> None:
    for _ in range(3):
        crash(tmp_path, "a", error)
    assert not LoadMarks(tmp_path, WORLD).is_hopeless("a")


def test_a_damaged_mark_is_none(tmp_path: Path) -> None:
    (tmp_path / ".loading.json").write_text("{")
    assert not LoadMarks(tmp_path, WORLD).is_hopeless("a")
