"""The skip ledger against a plain set of integers."""

from __future__ import annotations

import itertools
import json
import random

import numpy as np
import pytest

from train.data.ledger import SkipLedger
from train.state import BatchRange

SPACE = 120


def random_ranges(seed: int) -> list[tuple[int, int]]:
    source = random.Random(seed)
    starts = [source.randrange(SPACE) for _ in range(source.randrange(1, 12))]
    return [(start, start + source.randrange(0, 20)) for start in starts]


def naive(ranges: list[tuple[int, int]]) -> set[int]:
    return {index for start, stop in ranges for index in range(start, stop)}


@pytest.mark.parametrize("seed", range(40))
def test_ledger_is_the_union_of_what_was_added(seed: int) -> None:
    ranges = random_ranges(seed)
    ledger, expected = SkipLedger(ranges), naive(ranges)
    assert [index for index in range(SPACE + 30) if index in ledger] == sorted(expected)
    assert ledger.num_samples() == len(expected)


@pytest.mark.parametrize("seed", range(40))
def test_ranges_are_disjoint_sorted_and_do_not_touch(seed: int) -> None:
    ranges = SkipLedger(random_ranges(seed)).ranges()
    assert all(start < stop for start, stop in ranges)
    assert all(before[1] < after[0] for before, after in itertools.pairwise(ranges))


@pytest.mark.parametrize("seed", range(40))
def test_order_of_adding_does_not_matter_and_adding_twice_is_adding_once(seed: int) -> None:
    ranges = random_ranges(seed)
    ledger = SkipLedger(ranges)
    assert SkipLedger([*ranges[::-1], *ranges]).ranges() == ledger.ranges()


@pytest.mark.parametrize("seed", range(40))
def test_take_returns_the_next_samples_that_are_not_skipped(seed: int) -> None:
    ranges = random_ranges(seed)
    ledger, skipped = SkipLedger(ranges), naive(ranges)
    source = random.Random(-seed - 1)
    for _ in range(20):
        cursor, count = source.randrange(SPACE + 10), source.randrange(1, 40)
        indices, next_cursor = ledger.take(cursor, count)
        expected = [i for i in range(cursor, cursor + SPACE + 100) if i not in skipped][:count]
        assert indices.tolist() == expected
        assert next_cursor == expected[-1] + 1
        assert indices.dtype == np.int64


@pytest.mark.parametrize("seed", range(50))
def test_any_split_into_batches_takes_the_same_samples(seed: int) -> None:
    ledger = SkipLedger(random_ranges(seed))
    whole, end = ledger.take(0, 60)
    source, cursor, pieces, left = random.Random(seed), 0, [], 60
    while left:
        count = min(left, source.randrange(1, 9))
        piece, cursor = ledger.take(cursor, count)
        pieces.append(piece)
        left -= count
    assert np.concatenate(pieces).tolist() == whole.tolist()
    assert cursor == end


def test_empty_ledger_skips_nothing() -> None:
    ledger = SkipLedger()
    indices, cursor = ledger.take(5, 3)
    assert indices.tolist() == [5, 6, 7]
    assert cursor == 8
    assert 5 not in ledger
    assert ledger.num_samples() == 0


def test_empty_range_adds_nothing() -> None:
    assert SkipLedger([(4, 4)]).ranges() == []


def test_ranges_that_touch_are_merged() -> None:
    assert SkipLedger([(0, 4), (8, 10), (4, 8)]).ranges() == [(0, 10)]


def test_skip_of_a_trillion_samples_is_crossed_at_once() -> None:
    ledger = SkipLedger([(10, 10 + 10**12)])
    indices, cursor = ledger.take(8, 4)
    assert indices.tolist() == [8, 9, 10 + 10**12, 11 + 10**12]
    assert cursor == 12 + 10**12
    assert ledger.num_samples() == 10**12


def test_added_range_holds_for_the_next_take() -> None:
    ledger = SkipLedger()
    _, cursor = ledger.take(0, 8)
    ledger.add(BatchRange(start=4, stop=20))
    assert ledger.take(cursor, 2)[0].tolist() == [20, 21]


def test_ranges_survive_json() -> None:
    ledger = SkipLedger([(3, 9), (20, 21)])
    again = json.loads(json.dumps(ledger.ranges()))
    assert SkipLedger((start, stop) for start, stop in again).ranges() == ledger.ranges()


@pytest.mark.parametrize("seed", range(40))
def test_range_is_covered_if_all_of_it_is_skipped(seed: int) -> None:
    ranges = random_ranges(seed)
    ledger, skipped = SkipLedger(ranges), naive(ranges)
    for start, stop in itertools.combinations_with_replacement(range(0, SPACE + 30, 3), 2):
        expected = skipped.issuperset(range(start, stop))
        assert ledger.covers(BatchRange(start=start, stop=stop)) == expected


def test_end_is_behind_the_last_skipped_position() -> None:
    assert SkipLedger().end == 0
    assert SkipLedger([(30, 40), (2, 5)]).end == 40


@pytest.mark.parametrize("seed", range(40))
def test_advance_ends_where_take_ends(seed: int) -> None:
    ledger = SkipLedger(random_ranges(seed))
    for cursor in range(0, SPACE + 30, 3):
        for count in (1, 2, 5, 40):
            assert ledger.advance(cursor, count) == ledger.take(cursor, count)[1]


def test_version_is_raised_by_each_change_and_by_nothing_else() -> None:
    ledger = SkipLedger()
    assert ledger.version == 0
    ledger.add(BatchRange(start=4, stop=9))
    first = ledger.version
    assert first > 0
    for start, stop in ((4, 9), (5, 6), (7, 7)):
        ledger.add(BatchRange(start=start, stop=stop))
    ledger.extend([(4, 9), (30, 30)])
    assert ledger.version == first
    ledger.extend([(9, 10)])
    assert ledger.version > first


def test_a_hundred_thousand_ranges_are_crossed() -> None:
    ranges = [(number * 10**7 + 5, number * 10**7 + 1005) for number in range(100_000)]
    ledger = SkipLedger(ranges)
    assert ledger.num_samples() == 10**8
    assert ledger.advance(0, 10**12 - 10**8) == 10**12
    assert ledger.take(10**7, 8)[0].tolist() == [
        *range(10**7, 10**7 + 5),
        *range(10**7 + 1005, 10**7 + 1008),
    ]
    assert ledger.ranges() == ranges


def test_nothing_is_taken_where_the_next_sample_would_be() -> None:
    ledger = SkipLedger([(3, 9)])
    for cursor, next_cursor in ((0, 0), (3, 9), (5, 9), (9, 9)):
        positions, after = ledger.take(cursor, 0)
        assert positions.size == 0
        assert after == next_cursor == ledger.advance(cursor, 0)


def test_of_ranges_with_a_bad_one_none_is_added() -> None:
    ledger = SkipLedger([(3, 9)])
    with pytest.raises(ValueError, match=r"0 <= start <= stop, found \[5, 4\)"):
        ledger.extend([(20, 30), (5, 4)])
    assert ledger.ranges() == [(3, 9)]
