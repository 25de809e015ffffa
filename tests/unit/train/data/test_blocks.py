"""Blocks that are kept, against the function that makes them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from train.data.blocks import BLOCK_INDICES, BlockMemory, first_if_consecutive


class Counting:
    """Makes blocks of two rows and counts them."""

    def __init__(self) -> None:
        self.made: list[int] = []

    def __call__(self, first: int, count: int) -> np.ndarray:
        self.made.append(first)
        indices = np.arange(first, first + count, dtype=np.int64)
        return np.stack([indices, -indices])


@pytest.mark.parametrize("first", [0, 5, BLOCK_INDICES - 3, 7 * BLOCK_INDICES, 2**61])
@pytest.mark.parametrize("count", [1, 64, BLOCK_INDICES, 3 * BLOCK_INDICES + 5])
def test_what_is_read_is_what_is_made(first: int, count: int) -> None:
    memory = BlockMemory(Counting())
    for _ in range(2):
        expected = np.arange(first, first + count, dtype=np.int64)
        assert np.array_equal(memory.read(first, count), np.stack([expected, -expected]))


def test_a_block_is_made_once_for_all_who_walk_along_it() -> None:
    make = Counting()
    memory = BlockMemory(make)
    for first in range(0, 4 * BLOCK_INDICES, 64):
        memory.read(first, 64)
    jump, *blocks = make.made  # at first it is not known that there will be a walk
    assert jump == 0 and blocks == [BLOCK_INDICES * number for number in range(4)]


def test_what_is_read_may_be_written_to() -> None:
    memory = BlockMemory(Counting())
    memory.read(0, 64)[:] = 0
    assert memory.read(0, 64)[0].tolist() == list(range(64))


def test_threads_read_the_same() -> None:
    memory = BlockMemory(Counting())
    firsts = [at * 1000 % (40 * BLOCK_INDICES) for at in range(2000)]
    with ThreadPoolExecutor(4) as threads:
        found = threads.map(lambda first: memory.read(first, 64)[0], firsts)
        assert all(
            np.array_equal(row, np.arange(first, first + 64))
            for first, row in zip(firsts, found, strict=True)
        )


@pytest.mark.parametrize(
    ("indices", "first"),
    [([4], 4), ([4, 5, 6], 4), ([4, 6, 5, 7], None), ([4, 4, 6], None), ([7, 6, 5], None)],
)
def test_successive_indices_are_told_from_others(indices: list[int], first: int | None) -> None:
    assert first_if_consecutive(np.array(indices, dtype=np.int64)) == first


def test_successive_indices_with_gaps_in_memory_are_seen() -> None:
    indices = np.arange(20, dtype=np.int64)
    assert first_if_consecutive(indices[::2]) is None
    assert first_if_consecutive(np.repeat(indices, 2)[::2]) == 0
