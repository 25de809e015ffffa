"""Samples that are put back, against a plain list into which they are inserted."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from train.data.ledger import SkipLedger
from train.data.sequence import Returns
from train.state import BatchRange

SPACE = 400


def resolved(returns: Returns, count: int = SPACE) -> list[int]:
    return returns.resolve(np.arange(count, dtype=np.int64)).tolist()


def random_entries(seed: int) -> list[tuple[int, int, int]]:
    """Return some entries that are allowed: of samples not put back yet, in increasing places."""
    source = random.Random(seed)
    entries: list[tuple[int, int, int]] = []
    taken: set[int] = set()
    end = 0
    for _ in range(source.randrange(1, 9)):
        position = end + source.choice([0, 1, source.randrange(40)])
        start = source.randrange(position + 1)
        stop = start
        limit = start + source.randrange(1, 25)
        while stop < min(position, limit) and stop not in taken:
            stop += 1
        if start < stop:
            entries.append((position, start, stop))
            taken |= set(range(start, stop))
            end = position + stop - start
    return entries


def naive(entries: list[tuple[int, int, int]]) -> list[int]:
    sequence = list(range(SPACE))
    for position, start, stop in entries:
        sequence[position:position] = sequence[start:stop]
    return sequence[:SPACE]


@pytest.mark.parametrize("seed", range(200))
def test_returns_are_insertions_into_a_list(seed: int) -> None:
    entries = random_entries(seed)
    returns = Returns(entries)
    assert resolved(returns) == naive(entries)
    assert returns.entries() == entries
    assert returns.num_samples() == sum(stop - start for _, start, stop in entries)
    assert returns.end == (entries[-1][0] + entries[-1][2] - entries[-1][1] if entries else 0)


def test_the_random_entries_hold_returns_of_returns() -> None:
    """The property above would be weak if no entry reached into an earlier one."""
    nested = 0
    for seed in range(200):
        entries = random_entries(seed)
        for number, (_, start, stop) in enumerate(entries):
            nested += any(
                start < position + (old_stop - old_start) and position < stop
                for position, old_start, old_stop in entries[:number]
            )
    assert nested > 50


@pytest.mark.parametrize("seed", range(100))
def test_each_sample_that_is_not_lost_to_a_skip_is_seen_exactly_once(seed: int) -> None:
    """A run that skips ranges behind its cursor and puts some of them back later."""
    source = random.Random(seed)
    ledger, returns = SkipLedger(), Returns()
    cursor, can_come_back, lost = 0, [], set()
    for _ in range(12):
        _, cursor = ledger.take(cursor, source.randrange(1, 20))
        if source.random() < 0.6:
            start = source.randrange(cursor)
            skip = BatchRange(start=start, stop=min(cursor, start + source.randrange(1, 15)))
            fresh = [place for place in range(skip.start, skip.stop) if place not in ledger]
            ledger.add(skip)
            lost |= {resolved(returns)[place] for place in fresh}
            if len(fresh) == len(skip):
                can_come_back.append(skip)
        elif can_come_back:
            back = can_come_back.pop(source.randrange(len(can_come_back)))
            assert ledger.covers(back)
            lost -= set(resolved(returns)[back.start : back.stop])
            cursor = max(cursor, returns.end)
            returns.insert(cursor, back.start, back.stop)
    positions, _ = ledger.take(0, 2 * SPACE)
    seen = np.bincount(returns.resolve(positions))[:SPACE]
    assert seen.max() == 1
    assert set(np.flatnonzero(seen == 0).tolist()) == lost


@pytest.mark.parametrize("seed", range(50))
def test_any_slicing_and_order_of_positions_gives_the_same_samples(seed: int) -> None:
    returns = Returns(random_entries(seed))
    whole = resolved(returns)
    order = np.random.default_rng(seed).permutation(SPACE).astype(np.int64)
    assert returns.resolve(order).tolist() == [whole[position] for position in order]
    assert returns.resolve(np.array([], dtype=np.int64)).size == 0
    assert returns.resolve(order).dtype == np.int64


@pytest.mark.parametrize("seed", range(50))
def test_another_return_changes_nothing_before_it(seed: int) -> None:
    entries = random_entries(seed)
    for number, (position, _, _) in enumerate(entries):
        before, after = Returns(entries[:number]), Returns(entries[: number + 1])
        assert resolved(after)[:position] == resolved(before)[:position]


def test_below_the_first_return_a_position_is_its_index() -> None:
    assert resolved(Returns([(50, 10, 20)]))[:50] == list(range(50))


def test_without_returns_positions_are_handed_back_as_they_are() -> None:
    positions = np.arange(5, dtype=np.int64)
    assert Returns().resolve(positions) is positions
    assert Returns().end == 0


def test_sample_put_back_and_skipped_again_can_be_put_back_from_there() -> None:
    returns = Returns([(20, 5, 8), (30, 20, 23)])
    assert resolved(returns)[30:34] == [5, 6, 7, 27]


def test_far_positions_cost_no_memory() -> None:
    returns = Returns([(10**15, 0, 10**12)])
    far = np.array([10**15 - 1, 10**15, 10**15 + 10**12], dtype=np.int64)
    assert returns.resolve(far).tolist() == [10**15 - 1, 0, 10**15]


@pytest.mark.parametrize("seed", range(20))
def test_returns_read_twice_are_read_once(seed: int) -> None:
    """As when a restart replays a journal over what a checkpoint already knew."""
    entries = random_entries(seed)
    returns = Returns(entries)
    for entry in entries:
        returns.insert(*entry)
    assert returns.entries() == entries
    assert resolved(returns) == naive(entries)


def test_empty_return_is_none() -> None:
    returns = Returns([(10, 4, 4)])
    assert returns.entries() == []
    assert resolved(returns) == list(range(SPACE))


def test_returns_survive_json() -> None:
    returns = Returns([(10, 4, 6), (12, 0, 3)])
    again = json.loads(json.dumps(returns.entries()))
    assert resolved(Returns((p, a, b) for p, a, b in again)) == resolved(returns)


@pytest.mark.parametrize("entry", [(10, 8, 12), (10, 5, 4), (10, -1, 4)])
def test_return_of_what_has_not_come_yet_is_refused(entry: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"needs 0 <= start <= stop <= position, found \["):
        Returns([entry])


def test_return_inside_an_earlier_one_is_refused() -> None:
    returns = Returns([(20, 0, 5)])
    with pytest.raises(ValueError, match=r"overlap the one at \[20, 25\)"):
        returns.insert(24, 7, 9)
    assert returns.entries() == [(20, 0, 5)]
    returns.insert(25, 7, 9)
    assert resolved(returns)[20:28] == [0, 1, 2, 3, 4, 7, 8, 20]


def test_return_before_an_earlier_one_leaves_that_where_it_is() -> None:
    late_first = Returns([(20, 0, 5), (15, 7, 9)])
    assert resolved(late_first)[14:26] == [14, 7, 8, 15, 16, 17, 0, 1, 2, 3, 4, 18]
    assert late_first.entries() == Returns([(15, 7, 9), (20, 0, 5)]).entries()


def test_sample_that_is_back_already_is_refused_with_its_new_place() -> None:
    returns = Returns([(20, 2, 8)])
    with pytest.raises(ValueError, match=r"\[5, 8\) are back already, from position 23 on"):
        returns.insert(40, 5, 12)
    assert returns.num_samples() == 6
