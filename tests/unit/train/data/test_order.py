"""The global order as a pure function."""

from __future__ import annotations

import numpy as np
import pytest

from train.data.order import SampleOrder

SIZES = [1, 2, 3, 5, 16, 17, 100, 1000, 4096, 30665]
# Another order would break the resumption of every run that is under way.
FROZEN = [126, 508, 91, 947, 904, 955, 326, 133]


def epoch(order: SampleOrder, number: int) -> np.ndarray:
    size = order.num_samples
    return order.samples(np.arange(number * size, (number + 1) * size, dtype=np.int64))


@pytest.mark.parametrize("size", SIZES)
def test_each_epoch_holds_each_sample_once(size: int) -> None:
    order = SampleOrder(num_samples=size, seed=7)
    for number in (0, 1, 5, 1000):
        assert np.array_equal(np.sort(epoch(order, number)), np.arange(size))


def test_epochs_differ() -> None:
    order = SampleOrder(num_samples=1000, seed=7)
    first, second = epoch(order, 0), epoch(order, 1)
    assert (first == second).mean() < 0.02


def test_seeds_differ() -> None:
    orders = [epoch(SampleOrder(num_samples=1000, seed=seed), 0) for seed in (0, 1, -1, 2**63)]
    for number, first in enumerate(orders):
        for second in orders[number + 1 :]:
            assert (first == second).mean() < 0.02


def test_order_is_shuffled_and_not_a_shift() -> None:
    samples = epoch(SampleOrder(num_samples=4096, seed=7), 0)
    steps = np.diff(samples)
    assert abs(np.corrcoef(np.arange(4096), samples)[0, 1]) < 0.1
    assert np.unique(steps).size > 1000


def test_small_corpora_are_reordered_each_epoch_too() -> None:
    order = SampleOrder(num_samples=3, seed=7)
    assert len({tuple(epoch(order, number).tolist()) for number in range(200)}) == 6


def test_any_slicing_of_the_indices_gives_the_same_samples() -> None:
    order = SampleOrder(num_samples=100, seed=7)
    indices = np.arange(0, 350, dtype=np.int64)
    whole = order.samples(indices)
    for size in (1, 7, 100, 349):
        parts = [order.samples(indices[at : at + size]) for at in range(0, 350, size)]
        assert np.array_equal(np.concatenate(parts), whole)
    scrambled = np.random.default_rng(0).permutation(indices)
    assert np.array_equal(order.samples(scrambled), whole[scrambled])


def test_two_orders_of_one_seed_agree() -> None:
    indices = np.array([0, 5, 99, 10**9, 10**15], dtype=np.int64)
    first = SampleOrder(num_samples=100, seed=7).samples(indices)
    assert np.array_equal(SampleOrder(num_samples=100, seed=7).samples(indices), first)


def test_order_of_a_release_never_changes() -> None:
    samples = SampleOrder(num_samples=1000, seed=1234).samples(np.arange(8, dtype=np.int64))
    assert samples.tolist() == FROZEN


def test_no_index_leaves_its_input_changed() -> None:
    indices = np.arange(50, dtype=np.int64)
    SampleOrder(num_samples=20, seed=7).samples(indices)
    assert np.array_equal(indices, np.arange(50))


def test_no_indices_give_no_samples() -> None:
    assert SampleOrder(num_samples=3, seed=0).samples(np.array([], dtype=np.int64)).size == 0


def test_order_over_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one sample, found 0"):
        SampleOrder(num_samples=0, seed=0)
