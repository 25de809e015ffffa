"""Permutations of any size: each value once, and nothing that counting can find in them.

Keys are fixed, so a count is the same on each run: these are no tests that fail by chance.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from train.data.permutation import MAX_SIZE, Permutation, mix

FAR_OFF = 4.0  # standard deviations


def keys_of(count: int) -> np.ndarray:
    return mix(np.arange(count, dtype=np.uint64))


def values_at(size: int, place: int, keys: np.ndarray) -> np.ndarray:
    places = np.full(len(keys), place, dtype=np.uint64)
    return Permutation(size).apply(places, keys).astype(np.int64)


def unevenness(counts: np.ndarray) -> float:
    """Return by how many standard deviations chi-square is off what even counts would have."""
    expected = counts.sum() / counts.size
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = counts.size - 1
    return float((chi_square - freedom) / math.sqrt(2 * freedom))


@pytest.mark.parametrize("size", range(1, 301))
def test_each_value_comes_once(size: int) -> None:
    for key in keys_of(3):
        values = Permutation(size).apply(np.arange(size, dtype=np.uint64), np.array([key]))
        assert np.array_equal(np.sort(values), np.arange(size))


@pytest.mark.parametrize("size", [4096, 4097, 65_536, 65_537, 99_991])
def test_each_value_of_a_larger_size_comes_once(size: int) -> None:
    values = Permutation(size).apply(np.arange(size, dtype=np.uint64), keys_of(1))
    assert np.array_equal(np.sort(values), np.arange(size))


def test_keys_of_one_and_keys_of_each_agree() -> None:
    shuffle = Permutation(1000)
    values = np.arange(1000, dtype=np.uint64)
    for key in keys_of(5):
        of_one = shuffle.apply(values, np.array([key]))
        assert np.array_equal(of_one, shuffle.apply(values, np.full(1000, key)))


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6])
def test_all_orders_of_a_few_values_are_equally_frequent(size: int) -> None:
    keys = keys_of(40_000)
    code = np.zeros(len(keys), dtype=np.int64)
    for place in range(size):
        code = code * size + values_at(size, place, keys)
    _, counts = np.unique(code, return_counts=True)
    assert counts.size == math.factorial(size)
    assert abs(unevenness(counts)) < FAR_OFF


@pytest.mark.parametrize("size", [7, 9, 13, 16, 30, 49, 64])
@pytest.mark.parametrize("distance", [1, 3])
def test_pairs_of_places_hold_all_pairs_of_values_equally_often(size: int, distance: int) -> None:
    keys = keys_of(60_000)
    first, second = values_at(size, 1, keys), values_at(size, 1 + distance, keys)
    counts = np.bincount(first * size + second, minlength=size * size).reshape(size, size)
    assert abs(unevenness(counts[~np.eye(size, dtype=bool)])) < FAR_OFF


@pytest.mark.parametrize("size", [4097, 5000, 30_665, 2**20 + 7, 10**9, MAX_SIZE])
def test_a_place_holds_all_parts_of_a_large_size_equally_often(size: int) -> None:
    keys = keys_of(40_000)
    for place in (0, size // 2, size - 1):
        counts = np.bincount(values_at(size, place, keys) * 16 // size, minlength=16)
        assert abs(unevenness(counts)) < FAR_OFF


@pytest.mark.parametrize("size", [5000, 65_536, 99_991, 10**9 + 7, MAX_SIZE - 1])
@pytest.mark.parametrize("distance", [1, 2, 64, 311])
def test_neighbours_of_one_key_share_nothing(size: int, distance: int) -> None:
    places = np.arange(min(size, 100_000), dtype=np.uint64)
    values = Permutation(size).apply(places, keys_of(1)).astype(np.int64)
    here, there = values[:-distance], values[distance:]
    parts = (here * 16 // size) * 16 + there * 16 // size
    assert abs(unevenness(np.bincount(parts, minlength=256))) < FAR_OFF
    steps = (there - here) % size * 64 // size
    assert abs(unevenness(np.bincount(steps, minlength=64))) < FAR_OFF


@pytest.mark.parametrize("size", [5000, 65_536, 10**9 + 7])
def test_neighbouring_keys_share_nothing(size: int) -> None:
    places = np.arange(min(size, 100_000), dtype=np.uint64)
    first, second = (
        Permutation(size).apply(places, np.array([key], dtype=np.uint64)).astype(np.int64)
        for key in (7, 8)
    )
    steps = (second - first) % size * 64 // size
    assert abs(unevenness(np.bincount(steps, minlength=64))) < FAR_OFF


@pytest.mark.parametrize("side", [100, 256])
def test_what_begins_in_one_row_or_column_does_not_move_together(side: int) -> None:
    """With four rounds twice as many pairs keep their distance as should."""
    kept, num_pairs = 0, 0
    for key in keys_of(400 // side):
        places = np.arange(side * side, dtype=np.uint64)
        values = Permutation(side * side).apply(places, np.array([key])).astype(np.int64)
        for moved in (values.reshape(side, side) // side, values.reshape(side, side).T % side):
            for distance in range(1, side):
                kept += int(((moved[distance:] - moved[:-distance]) % side == distance).sum())
                num_pairs += moved[distance:].size
    expected = num_pairs / side
    assert abs(kept - expected) < FAR_OFF * math.sqrt(expected)


@pytest.mark.parametrize("size", [0, -1, MAX_SIZE + 1])
def test_size_out_of_range_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"needs 1 to {MAX_SIZE} values, found {size}"):
        Permutation(size)
