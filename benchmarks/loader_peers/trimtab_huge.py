"""Trimtab over 10**12 tokens: a file of 2 TB that is a hole but for one sample.

That sample lies beyond token 2**32 and comes first, so an offset that overflows anywhere is seen.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from loader_peers import trimtab
from loader_peers.workload import SEQUENCE_LENGTH, Workload

_NUM_BYTES = 2 * 10**12
_MARK = np.arange(1, SEQUENCE_LENGTH + 1, dtype=np.uint16)


def prepare(folder: Path, tokens_folder: Path, workload: Workload) -> None:
    """Make the hole, which takes no room, and write the one sample."""
    path = folder / "tokens.bin"
    with path.open("wb") as file:
        os.truncate(file.fileno(), _NUM_BYTES)
    loader = Loader(folder, tokens_folder, workload, rank=0, num_ranks=1)
    (sample,) = loader.order.samples(np.zeros(1, dtype=np.int64)).tolist()
    assert sample * SEQUENCE_LENGTH > 2**32, "another seed, please"
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), _MARK.tobytes(), 2 * sample * SEQUENCE_LENGTH)


class Loader(trimtab.Loader):
    """All else as in a run; raw tokens without a header."""

    corpus_name = "tokens.bin"

    def batches(self, state: Any = None) -> Iterator[Any]:
        """Return batches without end, the first of which must begin with the sample."""
        batches = super().batches(state)
        first = next(batches)
        assert np.array_equal(first.rows[0, :SEQUENCE_LENGTH], _MARK), "read from a wrong place"
        yield first
        yield from batches
