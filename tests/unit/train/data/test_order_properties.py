"""What holds of the order, the ledger and units for all sizes, seeds and cursors."""

from __future__ import annotations

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from train.data.ledger import SkipLedger
from train.data.order import SampleOrder
from train.data.units import rescale_cursor, rescale_ledger
from train.state import BatchRange

PROPERTY = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.too_slow],
)
SPACE = 400

seeds = st.integers(-(2**70), 2**70)
sizes = st.one_of(st.integers(1, 12), st.integers(1, 1500))
ranges = st.lists(
    st.tuples(st.integers(0, SPACE), st.integers(0, 30)).map(lambda r: (r[0], r[0] + r[1])),
    max_size=12,
)


def union(skips: list[tuple[int, int]]) -> set[int]:
    return {position for start, stop in skips for position in range(start, stop)}


@PROPERTY
@given(size=sizes, seed=seeds, epoch=st.integers(0, 2**40), key=st.text(max_size=5))
def test_each_epoch_is_a_permutation(size: int, seed: int, epoch: int, key: str) -> None:
    order = SampleOrder(num_samples=size, seed=seed, key=key)
    samples = order.samples(np.arange(epoch * size, (epoch + 1) * size, dtype=np.int64))
    assert np.array_equal(np.sort(samples), np.arange(size))


@PROPERTY
@given(
    size=sizes,
    seed=seeds,
    epoch=st.integers(0, 2**40),
    block_samples=st.one_of(st.integers(1, 8), st.integers(1, 4000)),
    window_blocks=st.one_of(st.integers(1, 4), st.integers(1, 200)),
)
def test_local_order_is_a_permutation_that_reads_a_window_at_a_time(
    size: int, seed: int, epoch: int, block_samples: int, window_blocks: int
) -> None:
    order = SampleOrder(
        num_samples=size, seed=seed, block_samples=block_samples, window_blocks=window_blocks
    )
    start = epoch * size
    samples = order.samples(np.arange(start, start + size, dtype=np.int64))
    assert np.array_equal(np.sort(samples), np.arange(size))
    assert order.window_samples == min(size, block_samples * window_blocks)
    firsts = range(0, size, order.window_samples)
    for first in {*firsts[:3], *firsts[-3:]}:
        window = samples[first : first + order.window_samples]
        stretches = order.blocks_ahead(start + first, len(window))
        # One more where the cut goes over the end of the corpus.
        assert len(stretches) <= window_blocks + 1
        read = np.concatenate([np.arange(at, at + count) for at, count in stretches.tolist()])
        assert np.array_equal(np.sort(window), np.sort(read))
        assert np.array_equal(order.blocks_ahead(start + first + len(window) - 1, 1), stretches)


@PROPERTY
@given(
    size=st.integers(1, 50),
    seed=seeds,
    cursor=st.integers(0, 500),
    count=st.integers(1, 200),
    block_samples=st.one_of(st.none(), st.integers(1, 9)),
)
def test_any_slicing_gives_the_samples_of_single_indices(
    size: int, seed: int, cursor: int, count: int, block_samples: int | None
) -> None:
    order = SampleOrder(num_samples=size, seed=seed, block_samples=block_samples, window_blocks=2)
    indices = np.arange(cursor, cursor + count, dtype=np.int64)
    assert np.array_equal(order.samples(indices[::-1])[::-1], order.samples(indices))


@PROPERTY
@given(
    size=st.integers(1, 200),
    seed=seeds,
    skips=ranges,
    late_skips=ranges,
    steps=st.lists(
        st.tuples(
            st.sampled_from([1, 2, 3, 8]),  # ranks
            st.integers(1, 3),  # micro-batches of a rank
            st.integers(1, 4),  # samples of a micro-batch
        ),
        min_size=1,
        max_size=12,
    ),
)
def test_ranks_and_batch_sizes_change_no_sample(
    size: int,
    seed: int,
    skips: list[tuple[int, int]],
    late_skips: list[tuple[int, int]],
    steps: list[tuple[int, int, int]],
) -> None:
    """Whatever the shape of each step, all ranks together walk one sequence.

    Half-way, more is skipped, of which only what lies before the cursor was seen.
    """
    order, ledger = SampleOrder(num_samples=size, seed=seed), SkipLedger(skips)
    cursor, seen, samples = 0, [], []
    expected: list[int] = []
    for number, (num_ranks, num_micro, size_of_micro) in enumerate(steps):
        if number == len(steps) // 2:
            ledger.extend(late_skips)
        skipped = union(skips) | (union(late_skips) if number >= len(steps) // 2 else set())
        share = num_micro * size_of_micro
        positions, next_cursor = ledger.take(cursor, num_ranks * share)
        for rank in range(num_ranks):
            mine = positions[rank * share : (rank + 1) * share]
            for at in range(0, share, size_of_micro):
                samples += order.samples(mine[at : at + size_of_micro]).tolist()
        seen += positions.tolist()
        expected += [p for p in range(cursor, next_cursor) if p not in skipped]
        assert ledger.advance(cursor, num_ranks * share) == next_cursor
        cursor = next_cursor
    assert seen == expected
    assert len(set(seen)) == len(seen)
    whole = SampleOrder(num_samples=size, seed=seed).samples(np.array(seen, dtype=np.int64))
    assert samples == whole.tolist()


@PROPERTY
@given(skips=ranges, more=ranges)
def test_ranges_added_at_once_are_ranges_added_one_by_one(
    skips: list[tuple[int, int]], more: list[tuple[int, int]]
) -> None:
    together, single = SkipLedger(skips), SkipLedger()
    together.extend(more)
    for start, stop in [*more, *skips]:
        before, had = single.version, single.num_samples()
        single.add(BatchRange(start=start, stop=stop))
        assert (single.version > before) == (single.num_samples() > had)
    assert together.ranges() == single.ranges()
    assert together.num_samples() == len(union(skips) | union(more))


@PROPERTY
@given(skips=ranges, cursor=st.integers(0, SPACE + 40), count=st.integers(0, 60))
def test_take_and_advance_are_those_of_a_plain_set(
    skips: list[tuple[int, int]], cursor: int, count: int
) -> None:
    ledger, skipped = SkipLedger(skips), union(skips)
    free = [p for p in range(cursor, cursor + 2 * SPACE) if p not in skipped]
    positions, next_cursor = ledger.take(cursor, count)
    assert positions.tolist() == free[:count]
    assert next_cursor == (free[count - 1] + 1 if count else free[0])
    assert ledger.advance(cursor, count) == next_cursor


lengths = st.integers(1, 64)


@PROPERTY
@given(skips=ranges, old=lengths, new=lengths)
def test_no_skipped_token_comes_back_with_another_length(
    skips: list[tuple[int, int]], old: int, new: int
) -> None:
    mapped = rescale_ledger(skips, old, new)
    samples = union(mapped)
    assert SkipLedger(mapped).ranges() == mapped
    for position in union(skips):
        tokens = (position * old, (position + 1) * old - 1)
        assert set(range(tokens[0] // new, tokens[1] // new + 1)) <= samples
    # Nothing more than that: each sample that is skipped holds a token that was.
    for sample in samples:
        touched = range(sample * new // old, ((sample + 1) * new - 1) // old + 1)
        assert union(skips) & set(touched)


@PROPERTY
@given(cursor=st.integers(0, 2**50), old=lengths, new=lengths)
def test_cursor_lands_on_the_first_whole_sample_not_trained_on(
    cursor: int, old: int, new: int
) -> None:
    mapped = rescale_cursor(cursor, old, new)
    assert mapped * new >= cursor * old > (mapped - 1) * new or cursor == mapped == 0
    assert rescale_cursor(cursor, old, old) == cursor
