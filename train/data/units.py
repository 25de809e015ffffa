"""Cursor and ledger in samples of another length, when a run goes on with longer sequences.

Both count samples; what stays the same is the number of tokens before them. Owns that arithmetic,
in whole numbers. Called when a run is resumed with another `data.sequence_length`.
"""

from __future__ import annotations

from collections.abc import Iterable


def rescale_cursor(cursor: int, old_length: int, new_length: int) -> int:
    """Return the first sample of `new_length` that begins at or after what was trained on.

    Lengths in tokens. Less than one sample of `new_length` is left out; none comes twice.
    """
    _check(old_length, new_length)
    return -(-cursor * old_length // new_length)


def rescale_range(start: int, stop: int, old_length: int, new_length: int) -> tuple[int, int]:
    """Return the samples `[start, stop)` of `new_length` that hold any token of the old ones.

    Outward, so that no token that was skipped comes back. An empty range stays empty.
    """
    _check(old_length, new_length)
    if start == stop:
        empty = rescale_cursor(start, old_length, new_length)
        return empty, empty
    return start * old_length // new_length, -(-stop * old_length // new_length)


def rescale_ledger(
    ranges: Iterable[tuple[int, int]], old_length: int, new_length: int
) -> list[tuple[int, int]]:
    """Return skipped `ranges` in samples of `new_length`, disjoint and in order."""
    merged: list[tuple[int, int]] = []
    for old_start, old_stop in sorted(ranges):
        start, stop = rescale_range(old_start, old_stop, old_length, new_length)
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        elif start < stop:
            merged.append((start, stop))
    return merged


def _check(old_length: int, new_length: int) -> None:
    if old_length < 1 or new_length < 1:
        raise ValueError(
            f"lengths of samples need to be at least 1 token, found {old_length} and {new_length}"
        )
