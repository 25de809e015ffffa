"""The limit: random rows, gathered from the page cache into one int64 buffer. No loader."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from loader_peers.workload import BATCH_SAMPLES, SEED, SEQUENCE_LENGTH, Workload, tokens_path


def prepare(folder: Path, tokens_folder: Path, workload: Workload) -> None:
    """Nothing: it reads the tokens as they are."""


class Loader:
    """Rows drawn beforehand, so that only the copy is left."""

    dtype: np.dtype[np.integer] = np.dtype(np.int64)

    def __init__(
        self, folder: Path, tokens_folder: Path, workload: Workload, *, rank: int, num_ranks: int
    ) -> None:
        self._tokens = np.memmap(tokens_path(tokens_folder), dtype=np.uint16, mode="r")
        num_rows = BATCH_SAMPLES // num_ranks
        self._offsets = np.random.default_rng(SEED).integers(
            0, workload.num_tokens - SEQUENCE_LENGTH - 1, (1024, num_rows)
        )
        self._buffer = np.empty((num_rows, SEQUENCE_LENGTH + 1), dtype=self.dtype)

    def batches(self, state: Any = None) -> Iterator[Any]:
        """Return rows without end."""
        buffer = self._buffer
        # One gather a batch; twice as fast as a loop over its rows.
        windows = np.lib.stride_tricks.sliding_window_view(
            np.asarray(self._tokens), SEQUENCE_LENGTH + 1
        )
        while True:
            for offsets in self._offsets:
                buffer[...] = windows[offsets]
                yield buffer

    def state(self) -> Any:
        """Return nothing: random rows have no position."""
        return None

    def skipping(self, num_batches: int) -> Iterator[Any]:
        """Return rows without end."""
        return self.batches()

    def rows(self, batch: Any) -> npt.NDArray[np.integer]:
        """Return the batch."""
        return batch
