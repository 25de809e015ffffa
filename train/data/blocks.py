"""A memory of aligned blocks of a pure function of the index, for callers that walk along it.

Asked for 64 neighbouring indices many times a second, numpy spends its time on starting operations;
a block of some thousand values costs little more than one of 64. Owns the blocks that were made
last. Refuses to know what is in them. `train.data.order` and `train.data.mixture` keep one each.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

# 64 KiB: of half as many, starting operations takes a third of the time; twice leave the cache.
BLOCK_INDICES = 8192
_NUM_SLOTS = 4


def first_if_consecutive(indices: npt.NDArray[np.int64]) -> int | None:
    """Return the first of `indices`, int64 [n] with n > 0, if each other is the one before plus 1.

    Bytes are compared since that takes half a microsecond; `np.diff` and a reduction take three.
    """
    first, count = int(indices[0]), len(indices)
    if int(indices[-1]) - first != count - 1:
        return None
    wanted = np.arange(first, first + count, dtype=np.int64)
    return first if indices.tobytes() == wanted.tobytes() else None


class BlockMemory:
    """The blocks of `make(first, count)` that were read last.

    `make` returns an array whose last axis has `count` entries, those of the indices
    `[first, first + count)`. Any thread may call: a slot is replaced whole, and two threads that
    miss at once make the same block twice.
    """

    def __init__(self, make: Callable[[int, int], npt.NDArray[np.int64]]) -> None:
        self._make = make
        self._slots: list[tuple[int, npt.NDArray[np.int64]] | None] = [None] * _NUM_SLOTS
        self._jump: tuple[int, int, npt.NDArray[np.int64]] | None = None

    def read(self, first: int, count: int) -> npt.NDArray[np.int64]:
        """Return a new array of the entries at indices `[first, first + count)`."""
        number, offset = divmod(first, BLOCK_INDICES)
        if offset + count <= BLOCK_INDICES:
            if not self._has(number) and (few := self._jumped_to(first, count)) is not None:
                return few.copy()
            return self._block(number)[..., offset : offset + count].copy()
        last = (first + count - 1) // BLOCK_INDICES
        pieces = [self._block(at) for at in range(number, last + 1)]
        pieces[0] = pieces[0][..., offset:]
        pieces[-1] = pieces[-1][..., : first + count - last * BLOCK_INDICES]
        return np.concatenate(pieces, axis=-1)

    def _jumped_to(self, first: int, count: int) -> npt.NDArray[np.int64] | None:
        """Return the entries alone, unless others of their block or the one before were kept.

        Whoever jumps here may not stay, and a first block costs a millisecond.
        """
        if self._has(first // BLOCK_INDICES - 1):
            return None
        jump = self._jump
        if jump is not None and jump[:2] == (first, count):
            return jump[2]
        if jump is not None and jump[0] // BLOCK_INDICES == first // BLOCK_INDICES:
            return None
        few = self._make(first, count)
        self._jump = (first, count, few)
        return few

    def pick(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64] | None:
        """Return the entries at `indices`, in any order, if one kept block has them all."""
        number = int(indices.min()) // BLOCK_INDICES
        if int(indices.max()) - number * BLOCK_INDICES >= BLOCK_INDICES or not self._has(number):
            return None
        picked: npt.NDArray[np.int64] = self._block(number)[..., indices - number * BLOCK_INDICES]
        return picked

    def _has(self, number: int) -> bool:
        slot = self._slots[number % _NUM_SLOTS]
        return slot is not None and slot[0] == number

    def _block(self, number: int) -> npt.NDArray[np.int64]:
        slot = self._slots[number % _NUM_SLOTS]
        if slot is not None and slot[0] == number:
            return slot[1]
        block = self._make(number * BLOCK_INDICES, BLOCK_INDICES)
        self._slots[number % _NUM_SLOTS] = (number, block)
        return block
