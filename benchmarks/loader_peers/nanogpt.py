"""nanoGPT's batches: crops at random offsets of one file.

Source: karpathy/nanoGPT, train.py (get_batch), which is a recipe and no package; these are our
lines of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from loader_peers.workload import BATCH_SAMPLES, SEED, SEQUENCE_LENGTH, Workload, tokens_path


def prepare(folder: Path, tokens_folder: Path, workload: Workload) -> None:
    """Nothing: its format is the tokens as they are."""


class Loader:
    """Another seed on each rank, as upstream; no position."""

    def __init__(
        self, folder: Path, tokens_folder: Path, workload: Workload, *, rank: int, num_ranks: int
    ) -> None:
        self._path = tokens_path(tokens_folder)
        self._num_rows = BATCH_SAMPLES // num_ranks
        torch.manual_seed(SEED + rank)

    def batches(self, state: Any = None) -> Iterator[Any]:
        """Return crops without end."""
        if state is not None:
            raise NotImplementedError("it has no position")
        while True:
            # Made anew for each batch against a leak of memory, as upstream does.
            data = np.memmap(self._path, dtype=np.uint16, mode="r")
            offsets = torch.randint(len(data) - SEQUENCE_LENGTH, (self._num_rows,)).tolist()
            yield tuple(
                torch.stack(
                    [
                        torch.from_numpy(data[at : at + SEQUENCE_LENGTH].astype(np.int64))
                        for at in (offset + shift for offset in offsets)
                    ]
                )
                for shift in (0, 1)
            )

    def state(self) -> Any:
        """Return nothing."""
        return None

    def skipping(self, num_batches: int) -> Iterator[Any]:
        """Refuse: random crops are not in an order."""
        raise NotImplementedError("it has no position")

    def rows(self, batch: Any) -> npt.NDArray[np.integer]:
        """Return the inputs; the targets are the same, shifted."""
        inputs: npt.NDArray[np.integer] = batch[0].numpy()
        return inputs
