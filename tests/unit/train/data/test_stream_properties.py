"""The stream is one sequence of rows, whoever reads it, in whatever batches, on whatever ranks."""

from __future__ import annotations

from functools import cache

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from sources import rows_of
from test_source import NumberedSamples, part

from train.data.ledger import SkipLedger
from train.data.mixture import Mixture, MixtureStage
from train.data.read_ahead import ReadAhead
from train.data.sequence import Returns
from train.data.source import MixedSource
from train.data.stream import SampleStream

FAST = settings(max_examples=40, deadline=None, derandomize=True, database=None)
RANKS = st.sampled_from([1, 2, 3, 8])
# What a launch does: ranks, samples of a batch a rank, number of batches, whether it reads ahead.
LAUNCHES = st.lists(
    st.tuples(RANKS, st.integers(1, 5), st.integers(1, 6), st.booleans()), min_size=1, max_size=5
)
SKIPS = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 40)), max_size=4)


@cache
def three_sources() -> MixedSource:
    samples = [NumberedSamples(10_000 * n, size) for n, size in enumerate([50, 31, 7], start=1)]
    parts = [part(f"s{number}", one) for number, one in enumerate(samples)]
    mixture = Mixture(
        [
            MixtureStage(start_index=0, weights=(0.7, 0.2, 0.1)),
            MixtureStage(start_index=60, weights=(0.2, 0.2, 0.6), ramp_indices=40),
        ],
        num_samples=[one.num_samples for one in samples],
        max_epochs=[None, None, 20],
    )
    return MixedSource(parts, mixture)


@FAST
@given(launches=LAUNCHES, skips=SKIPS, start=st.integers(0, 10**9))
def test_rows_are_the_same_on_any_ranks_in_any_batches_after_any_launches(
    launches: list[tuple[int, int, int, bool]], skips: list[tuple[int, int]], start: int
) -> None:
    source = three_sources()
    start %= 600  # and past the end of one source's epochs
    ranges = [(first + start, first + start + length) for first, length in skips]
    cursor, seen = start, []
    for num_ranks, share, num_batches, is_ahead in launches:
        streams = [
            SampleStream(
                source, SkipLedger(ranges), rank=rank, num_ranks=num_ranks, returns=Returns()
            )
            for rank in range(num_ranks)
        ]
        readers = [ReadAhead(one, num_batches=4) if is_ahead else one for one in streams]
        for _ in range(num_batches):
            batches = [reader.at(cursor, share * num_ranks) for reader in readers]
            seen += [row.tolist() for batch in batches for row in batch.rows]
            assert len({batch.next_cursor for batch in batches}) == 1
            assert all(np.array_equal(one.indices, batches[0].indices) for one in batches)
            cursor = batches[0].next_cursor
        for reader in readers:
            if isinstance(reader, ReadAhead):
                reader.close()
    skipped = {position for first, stop in ranges for position in range(first, stop)}
    plain = [p for p in range(start, start + 2000) if p not in skipped][: len(seen)]
    assert seen == rows_of(source, np.array(plain, dtype=np.int64)).tolist()


@FAST
@given(seed=st.integers(-(2**63), 2**63), cursor=st.integers(0, 2**60), ranks=RANKS)
def test_any_cursor_is_reached_at_once_and_depends_on_nothing_before_it(
    seed: int, cursor: int, ranks: int
) -> None:
    samples = NumberedSamples(0, 1_000_003)
    source = MixedSource([part(str(seed), samples)])
    alone = SampleStream(source, SkipLedger(), rank=0, num_ranks=1, returns=Returns())
    whole = alone.at(cursor, 24).rows.tolist()
    parts = [
        SampleStream(source, SkipLedger(), rank=rank, num_ranks=ranks, returns=Returns())
        for rank in range(ranks)
    ]
    assert [row for one in parts for row in one.at(cursor, 24).rows.tolist()] == whole
