"""The global order as a pure function."""

from __future__ import annotations

import numpy as np
import pytest

from train.data.blocks import BLOCK_INDICES
from train.data.order import ORDER_VERSION, SampleOrder
from train.data.permutation import MAX_SIZE

SIZES = [1, 2, 3, 5, 16, 17, 100, 1000, 4096, 30665]
# Another order would break the resumption of every run that is under way: raise ORDER_VERSION.
FROZEN_VERSION = 2
FROZEN = [847, 532, 388, 826, 432, 728, 962, 807]
FROZEN_LARGE = [616874162, 809276262, 448356453, 216953860, 103994902, 208668079]
FROZEN_LOCAL = [874, 793, 214, 861, 870, 862, 872, 867]


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
    indices = np.arange(8, dtype=np.int64)
    local = SampleOrder(
        num_samples=1000, seed=1234, key="web:ab", block_samples=10, window_blocks=4
    )
    large = SampleOrder(num_samples=10**9, seed=1234, key="web:ab")
    assert ORDER_VERSION == FROZEN_VERSION
    assert SampleOrder(num_samples=1000, seed=1234).samples(indices).tolist() == FROZEN
    assert large.samples(indices[:6]).tolist() == FROZEN_LARGE
    assert local.samples(indices).tolist() == FROZEN_LOCAL


def test_sources_of_one_size_have_orders_of_their_own() -> None:
    orders = [
        epoch(SampleOrder(num_samples=1000, seed=7, key=key), 0)
        for key in ("", "web:ab", "web:ac", "code:ab")
    ]
    for number, first in enumerate(orders):
        for second in orders[number + 1 :]:
            assert (first == second).mean() < 0.02


@pytest.mark.parametrize("size", [3, 1000, 10**9 + 7, MAX_SIZE])
@pytest.mark.parametrize("start", [0, 2**32 - 5, 2**62 - 2 * BLOCK_INDICES])
@pytest.mark.parametrize("block_samples", [None, 64])
def test_kept_blocks_hold_what_a_single_index_gives(
    size: int, start: int, block_samples: int | None
) -> None:
    order = SampleOrder(num_samples=size, seed=7, block_samples=block_samples)
    indices = np.arange(start, start + BLOCK_INDICES + 10, 97, dtype=np.int64)
    scattered = order.samples(indices)
    again = SampleOrder(num_samples=size, seed=7, block_samples=block_samples)
    for index, sample in zip(indices, scattered, strict=True):
        neighbours = again.samples(np.arange(index, index + 5, dtype=np.int64))
        assert neighbours[0] == sample
    assert scattered.min() >= 0
    assert scattered.max() < size
    assert np.array_equal(order.samples(indices[::-1]), scattered[::-1])


def test_orders_of_the_largest_corpus_differ_from_epoch_to_epoch() -> None:
    order = SampleOrder(num_samples=MAX_SIZE, seed=7)
    indices = np.arange(1000, dtype=np.int64)
    assert not np.isin(order.samples(indices + MAX_SIZE), order.samples(indices)).any()


def test_what_was_returned_may_be_written_to() -> None:
    order = SampleOrder(num_samples=100, seed=7)
    indices = np.arange(10, dtype=np.int64)
    expected = order.samples(indices).tolist()
    order.samples(indices)[:] = 0
    assert order.samples(indices).tolist() == expected


def test_no_index_leaves_its_input_changed() -> None:
    indices = np.arange(50, dtype=np.int64)
    SampleOrder(num_samples=20, seed=7).samples(indices)
    assert np.array_equal(indices, np.arange(50))


def test_no_indices_give_no_samples() -> None:
    assert SampleOrder(num_samples=3, seed=0).samples(np.array([], dtype=np.int64)).size == 0


def test_order_over_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one sample, found 0"):
        SampleOrder(num_samples=0, seed=0)


def test_order_over_too_much_is_refused() -> None:
    with pytest.raises(ValueError, match=f"at most {MAX_SIZE} samples, found {MAX_SIZE + 1}"):
        SampleOrder(num_samples=MAX_SIZE + 1, seed=0)


@pytest.mark.parametrize(("block_samples", "window_blocks"), [(0, 64), (4, 0)])
def test_local_order_of_nothing_is_refused(block_samples: int, window_blocks: int) -> None:
    with pytest.raises(ValueError, match=f"at least 1, found {block_samples} and {window_blocks}"):
        SampleOrder(num_samples=9, seed=0, block_samples=block_samples, window_blocks=window_blocks)


def test_local_order_moves_its_cut_each_epoch() -> None:
    order = SampleOrder(num_samples=1000, seed=7, block_samples=64, window_blocks=4)
    rests = [order.blocks_ahead(number * 1000 + 999, 1) for number in range(20)]
    assert len({rest[:, 0].max() for rest in rests}) > 10


def test_local_order_shuffles_blocks_and_what_is_in_a_window() -> None:
    order = SampleOrder(num_samples=2**16, seed=7, block_samples=64, window_blocks=16)
    samples = epoch(order, 0)
    windows = samples.reshape(-1, 1024)
    assert abs(np.corrcoef(np.arange(2**16), samples)[0, 1]) < 0.1
    assert all(abs(np.corrcoef(np.arange(1024), window)[0, 1]) < 0.15 for window in windows)
    firsts = np.sort(order.blocks_ahead(0, 2**16)[:, 0])
    assert np.array_equal(np.unique(np.diff(firsts[firsts > 0])), [64])


def test_global_order_names_no_stretches() -> None:
    order = SampleOrder(num_samples=1000, seed=7)
    assert order.window_samples is None
    assert order.blocks_ahead(0, 100).shape == (0, 2)


def test_no_indices_ahead_need_no_stretches() -> None:
    order = SampleOrder(num_samples=1000, seed=7, block_samples=10)
    assert order.blocks_ahead(5, 0).shape == (0, 2)
