"""Keyed permutations of `[0, size)` for any size, computed a value at a time: no table is built.

A generalised Feistel network over rows x columns, both near the root of the size, whose product
exceeds the size by next to nothing; what falls outside is sent through again (cycle-walking). Each
round moves along the rows by a hash of the column, or the other way. With four rounds, pairs that
begin in one column keep their distance twice as often as they should; with five that is gone, so
six have one to spare. Sides of a few values need more: five and six values, twenty rounds.
Called by `train.data.order`.

Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002, methods 2 and 3;
Patarin, "Security of Random Feistel Schemes with 5 or More Rounds", CRYPTO 2004.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

MAX_SIZE = 2**50
_NUM_ROUNDS = 6
_NUM_ROUNDS_OF_SMALL, _MAX_SMALL = 24, 4096
# A shape is sought among this many numbers of rows: more find one that fits closer, at more cost.
_NUM_SHAPES = 256

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))
_FOLD = np.uint64(29)
# 38 bits of a hash times a side of up to 26 bits fit 64 bits.
_HASH_SHIFT, _SIDE_SHIFT = np.uint64(26), np.uint64(38)

Words = npt.NDArray[np.uint64]


def mix(values: Words) -> Words:
    """Scramble 64 bits (SplitMix64, Steele et al., OOPSLA 2014)."""
    values = values + _GOLDEN
    values = (values ^ (values >> _SHIFTS[0])) * _FIRST
    values = (values ^ (values >> _SHIFTS[1])) * _SECOND
    return values ^ (values >> _SHIFTS[2])


class Permutation:
    """A family of permutations of `[0, size)`, one for each 64-bit key."""

    def __init__(self, size: int) -> None:
        if not 1 <= size <= MAX_SIZE:
            raise ValueError(f"a permutation needs 1 to {MAX_SIZE} values, found {size}")
        self.size = size
        self._num_rounds = _NUM_ROUNDS if size > _MAX_SMALL else _NUM_ROUNDS_OF_SMALL
        root = math.isqrt(size - 1) + 1
        shapes = range(root, min(root + _NUM_SHAPES, root + root // 8 + 1))
        rows = min(shapes, key=lambda side: -size % side)
        self._columns = np.uint64(-(-size // rows))
        self._sides = (np.uint64(rows), self._columns)
        self._size = np.uint64(size)

    def apply(self, values: Words, keys: Words) -> Words:
        """Return where each of `values` goes, [n], under `keys`, [n], or [1] for one key of all."""
        round_keys = mix(keys + np.arange(self._num_rounds, dtype=np.uint64)[:, None])
        values = self._encrypt(values, round_keys)
        outside = np.flatnonzero(values >= self._size)
        while outside.size:
            own_keys = round_keys if keys.size == 1 else round_keys[:, outside]
            again = self._encrypt(values[outside], own_keys)
            values[outside] = again
            outside = outside[again >= self._size]
        return values

    def _encrypt(self, values: Words, round_keys: Words) -> Words:
        """Add to the row a hash of the column, then to the column one of the row, and so on."""
        row = values // self._columns
        halves = (row, values - row * self._columns)
        mixed, folded = np.empty_like(values), np.empty_like(values)
        for number, key in enumerate(round_keys):
            half, other, side = halves[number % 2], halves[1 - number % 2], self._sides[number % 2]
            np.add(other, key, out=mixed)
            np.multiply(mixed, _FIRST, out=mixed)
            np.right_shift(mixed, _FOLD, out=folded)
            np.bitwise_xor(mixed, folded, out=mixed)
            np.multiply(mixed, _SECOND, out=mixed)
            np.right_shift(mixed, _HASH_SHIFT, out=mixed)
            np.multiply(mixed, side, out=mixed)
            np.right_shift(mixed, _SIDE_SHIFT, out=mixed)
            np.add(half, mixed, out=half)
            # Below `side` the difference wraps to a huge number: the minimum is the remainder.
            np.subtract(half, side, out=mixed)
            np.minimum(half, mixed, out=half)
        return halves[0] * self._columns + halves[1]
