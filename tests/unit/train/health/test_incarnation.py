"""Ranks that meet in a store that was used before."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from torch._C._distributed_c10d import HashStore

from train.health.incarnation import agree_on_name


def test_each_start_agrees_on_a_name_of_its_own_whoever_comes_first() -> None:
    store, names = HashStore(), []
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
        with ThreadPoolExecutor(3) as ranks:
            found = ranks.map(lambda rank: agree_on_name(store, rank, 3, timeout_seconds=20), order)
            (name,) = set(found)
        names.append(name)
    assert len(set(names)) == 3


@pytest.mark.parametrize(("rank", "missing"), [(0, r"ranks \[1\]"), (1, "rank 0")])
def test_a_rank_that_does_not_come_is_named(rank: int, missing: str) -> None:
    with pytest.raises(TimeoutError, match=f"{missing} did not come"):
        agree_on_name(HashStore(), rank, 2, timeout_seconds=0.05)
