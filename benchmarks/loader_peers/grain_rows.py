"""grain: a MapDataset with its index shuffle, over a source of rows that is ours."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np
import numpy.typing as npt

from loader_peers.workload import BATCH_SAMPLES, SEED, SEQUENCE_LENGTH, Workload, tokens_path


def prepare(folder: Path, tokens_folder: Path, workload: Workload) -> None:
    """Nothing: the source reads the tokens as they are."""


class Rows:
    """Random access to rows; all that grain asks of a source."""

    def __init__(self, path: Path) -> None:
        self._tokens = np.memmap(path, dtype=np.uint16, mode="r")

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // SEQUENCE_LENGTH

    def __getitem__(self, sample: int) -> npt.NDArray[np.integer]:
        first = int(sample) * SEQUENCE_LENGTH
        return np.asarray(self._tokens[first : first + SEQUENCE_LENGTH + 1])


class Loader:
    """In-process: its threads, 16 by default, cost more CPU time than they read."""

    def __init__(
        self, folder: Path, tokens_folder: Path, workload: Workload, *, rank: int, num_ranks: int
    ) -> None:
        samples = grain.MapDataset.source(Rows(tokens_path(tokens_folder))).shuffle(seed=SEED)
        mine = samples[rank::num_ranks]
        batches = mine.batch(BATCH_SAMPLES // num_ranks, drop_remainder=True)
        options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        self._dataset = batches.to_iter_dataset(options)
        self._iterator = iter(self._dataset)

    def batches(self, state: Any = None) -> Iterator[Any]:
        """Return batches; the state is loaded first."""
        self._iterator = iter(self._dataset)
        if state is not None:
            self._iterator.set_state(state)
        return self._iterator

    def state(self) -> Any:
        """Return its state."""
        return self._iterator.get_state()

    def skipping(self, num_batches: int) -> Iterator[Any]:
        """Return batches from a state that is further on."""
        return self.batches(self._iterator.get_state() | {"next_index": num_batches})

    def rows(self, batch: Any) -> npt.NDArray[np.integer]:
        """Return the batch."""
        return np.asarray(batch)
