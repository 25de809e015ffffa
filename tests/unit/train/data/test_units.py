"""Cursor and ledger in samples of another length."""

from __future__ import annotations

import pytest

from train.data.units import rescale_cursor, rescale_ledger, rescale_range


def test_cursor_is_rounded_up_to_a_whole_sample() -> None:
    assert rescale_cursor(10, 2048, 8192) == 3
    assert rescale_cursor(8, 2048, 8192) == 2
    assert rescale_cursor(3, 8192, 2048) == 12
    assert rescale_cursor(0, 2048, 8192) == 0


def test_skipped_range_grows_to_whole_samples() -> None:
    assert rescale_range(3, 5, 2048, 8192) == (0, 2)
    assert rescale_range(4, 8, 2048, 8192) == (1, 2)
    assert rescale_range(1, 2, 8192, 2048) == (4, 8)


def test_one_length_changes_nothing() -> None:
    assert rescale_cursor(10**15 + 1, 2048, 2048) == 10**15 + 1
    assert rescale_range(3, 9, 2048, 2048) == (3, 9)
    assert rescale_ledger([(3, 9), (20, 21)], 2048, 2048) == [(3, 9), (20, 21)]


def test_empty_range_stays_empty() -> None:
    assert rescale_range(3, 3, 2048, 8192) == (1, 1)
    assert rescale_ledger([(3, 3)], 2048, 8192) == []


def test_ranges_that_meet_in_a_longer_sample_become_one() -> None:
    assert rescale_ledger([(9, 10), (0, 1), (2, 3)], 1, 4) == [(0, 1), (2, 3)]
    assert rescale_ledger([(0, 3), (5, 9)], 1, 4) == [(0, 3)]


@pytest.mark.parametrize(("old", "new"), [(0, 4), (4, 0), (-1, 4)])
def test_length_of_nothing_is_refused(old: int, new: int) -> None:
    with pytest.raises(ValueError, match=f"at least 1 token, found {old} and {new}"):
        rescale_cursor(1, old, new)
    with pytest.raises(ValueError, match=f"at least 1 token, found {old} and {new}"):
        rescale_range(1, 2, old, new)
