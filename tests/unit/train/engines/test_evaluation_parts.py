"""How held-out rows are shared among ranks."""

from __future__ import annotations

import pytest
import torch

from train.distributed import World
from train.engines.torch_engine import evaluation_parts


@pytest.mark.parametrize("num_rows", [1, 2, 3, 16, 17, 64])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("micro_batch", [None, 1, 4])
def test_each_row_counts_once_and_all_ranks_run_as_many_forwards(
    num_rows: int, num_ranks: int, micro_batch: int | None
) -> None:
    counted: list[int] = []
    num_parts = set()
    for rank in range(num_ranks):
        world = World(rank=rank, size=num_ranks, device=torch.device("cpu"))
        parts = list(evaluation_parts(num_rows, world, micro_batch))
        num_parts.add(len(parts))
        assert all(0 <= start < stop <= num_rows for start, stop, _ in parts)
        counted += [row for start, stop, weight in parts if weight for row in range(start, stop)]
    assert sorted(counted) == list(range(num_rows))
    assert len(num_parts) == 1
