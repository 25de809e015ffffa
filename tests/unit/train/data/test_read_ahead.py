"""Reading ahead changes when batches are read, never what is delivered."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import pytest

from train.data.ledger import SkipLedger
from train.data.read_ahead import ReadAhead
from train.data.sequence import Returns
from train.data.stream import Batch, SampleStream
from train.errors import DataEndError, DataError
from train.state import BatchRange

LENGTH = 4


class CountingSource:
    """Each sample is its own index, over and over; notes in which thread it was read."""

    sample_tokens = LENGTH + 1
    num_indices: int | None = None
    num_samples = 10**6
    dtype = np.dtype(np.uint32)

    def __init__(self, *, fails_at: int | None = None, bad: frozenset[int] = frozenset()) -> None:
        self.fails_at = fails_at
        self.bad_indices = bad
        self.threads: set[int] = set()
        self.announced: list[int] = []

    def read(self, indices: npt.NDArray[np.int64], out: npt.NDArray[np.integer]) -> None:
        self.threads.add(threading.get_ident())
        if self.fails_at is not None and self.fails_at in indices:
            raise DataError(f"sample {self.fails_at} cannot be read")
        out[:] = indices[:, None]

    def announce(self, indices: npt.NDArray[np.int64]) -> None:
        self.announced += indices.tolist()

    def look_ahead(self, index: int) -> None:
        pass

    def layout(self, indices: npt.NDArray[np.int64]) -> None:
        return None

    def num_predictions(self, indices: npt.NDArray[np.int64]) -> int:
        return len(indices) * LENGTH

    def given_before(self, index: int) -> dict[str, int]:
        return {}

    def bad(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        return np.isin(indices, list(self.bad_indices))

    def origins(self, index: int) -> tuple[()]:
        return ()


def stream_of(source: CountingSource, *, rank: int = 0, num_ranks: int = 1) -> SampleStream:
    return SampleStream(
        source,
        SkipLedger(),
        rank=rank,
        num_ranks=num_ranks,
        returns=Returns(),
        skips_damaged=bool(source.bad_indices),
    )


@contextmanager
def reading_ahead(stream: SampleStream, num_batches: int = 8) -> Iterator[ReadAhead]:
    ahead = ReadAhead(stream, num_batches=num_batches)
    try:
        yield ahead
    finally:
        ahead.close()


def content(batch: Batch) -> tuple[list[int], list[int], int, int]:
    return (batch.indices.tolist(), batch.rows[:, 0].tolist(), batch.next_cursor, batch.num_tokens)


@pytest.mark.parametrize("num_batches", [1, 2, 5, 8, 64])
@pytest.mark.parametrize(("rank", "num_ranks"), [(0, 1), (1, 2)])
def test_delivers_what_the_stream_would(num_batches: int, rank: int, num_ranks: int) -> None:
    plain = stream_of(CountingSource(), rank=rank, num_ranks=num_ranks)
    cursor = 0
    with reading_ahead(
        stream_of(CountingSource(), rank=rank, num_ranks=num_ranks), num_batches
    ) as ahead:
        for _ in range(50):
            batch = ahead.at(cursor, 6)
            assert content(batch) == content(plain.at(cursor, 6))
            cursor = batch.next_cursor


def test_batches_that_grow_jump_and_are_skipped_are_as_the_stream_has_them() -> None:
    generator = np.random.default_rng(3)
    plain, source = stream_of(CountingSource()), CountingSource()
    with reading_ahead(stream_of(source)) as ahead:
        cursor = 0
        for _ in range(300):
            what = generator.integers(12)
            size = int(generator.choice([2, 4, 10]))
            if what == 0:  # a rewind
                cursor = max(0, cursor - int(generator.integers(100)))
            if what == 1:
                start = cursor + int(generator.integers(40))
                for ledger in (ahead.ledger, plain.ledger):
                    ledger.add(BatchRange(start=start, stop=start + 5))
            if what == 2:
                skipped = int(generator.integers(10**6, 10**7))
                position = max(cursor, plain.returns.end) + 20 + skipped
                for returns in (ahead.returns, plain.returns):
                    returns.insert(position, skipped, skipped + 3)
            batch = ahead.at(cursor, size)
            assert content(batch) == content(plain.at(cursor, size))
            cursor = batch.next_cursor


def test_another_thread_reads() -> None:
    source = CountingSource()
    with reading_ahead(stream_of(source)) as ahead:
        ahead.at(0, 2)
    assert threading.get_ident() not in source.threads


def test_rows_stay_until_two_more_batches_were_asked_for() -> None:
    with reading_ahead(stream_of(CountingSource()), 2) as ahead:
        cursor, held = 0, []
        for number in range(60):
            if number % 7 == 3:
                cursor += 5  # not foreseen: what was read ahead is dropped
            batch = ahead.at(cursor, 3 + number % 2)
            held.append((batch, batch.indices.tolist()))
            for earlier, indices in held[-3:]:
                assert earlier.rows[:, 0].tolist() == indices
            cursor = batch.next_cursor


def test_what_cannot_be_read_is_raised_where_it_is_asked_for_and_not_before() -> None:
    with reading_ahead(stream_of(CountingSource(fails_at=9))) as ahead:
        assert ahead.at(0, 4).next_cursor == 4
        assert ahead.at(4, 4).next_cursor == 8
        with pytest.raises(DataError, match="sample 9 cannot be read"):
            ahead.at(8, 4)
        assert content(ahead.at(12, 4))[0] == [12, 13, 14, 15]


def test_samples_of_damaged_files_are_passed_over_and_skipped_for_good() -> None:
    source = CountingSource(bad=frozenset({1, 2, 6, 40}))
    with reading_ahead(stream_of(source)) as ahead:
        first = ahead.at(0, 4)
        assert first.indices.tolist() == [0, 3, 4, 5]
        # What is read ahead is not skipped before it is delivered.
        assert ahead.skipped() == [(1, 3)]
        assert ahead.at(first.next_cursor, 4).indices.tolist() == [7, 8, 9, 10]
        assert ahead.skipped() == [(1, 3), (6, 7)]


def test_cold_reads_are_announced() -> None:
    source = CountingSource()
    with reading_ahead(stream_of(source)) as ahead:
        for cursor in (0, 2, 4):
            ahead.at(cursor, 2)
    assert source.announced[:6] == [0, 1, 2, 3, 4, 5]


def test_closing_ends_the_thread() -> None:
    before = threading.active_count()
    ahead = ReadAhead(stream_of(CountingSource()), num_batches=8)
    ahead.at(0, 2)
    ahead.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("num_batches", [2, 16])
def test_the_end_of_the_data_is_met_where_it_is_and_not_before(num_batches: int) -> None:
    source = CountingSource()
    source.num_indices = 30
    with reading_ahead(stream_of(source), num_batches) as ahead:
        cursor = 0
        for _ in range(7):
            cursor = ahead.at(cursor, 4).next_cursor
        with pytest.raises(DataEndError, match="all of their 30 samples"):
            ahead.at(cursor, 4)
        assert ahead.at(cursor, 2).indices.tolist() == [28, 29]
