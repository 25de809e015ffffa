"""litdata: StreamingDataset with its TokensLoader over optimised chunks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import litdata
import numpy as np
import numpy.typing as npt
import torch

from loader_peers.contract import as_array
from loader_peers.workload import BATCH_SAMPLES, SEED, SEQUENCE_LENGTH, Workload, tokens_path

ROW_TOKENS = SEQUENCE_LENGTH + 1
# As litgpt prepares its corpora: whole rows, about 32 MiB a chunk.
_CHUNK_TOKENS = ROW_TOKENS * 8192
_PIECE_TOKENS = 1 << 16


def pieces(path: str) -> Iterator[Any]:
    """Yield the tokens in pieces, as documents would come; called by its optimiser."""
    tokens = np.memmap(path, dtype=np.uint16, mode="r")
    for first in range(0, len(tokens), _PIECE_TOKENS):
        yield torch.from_numpy(np.array(tokens[first : first + _PIECE_TOKENS]))


def prepare(folder: Path, tokens_folder: Path, workload: Workload) -> None:
    """Optimise: its own word for writing chunks."""
    litdata.optimize(
        fn=pieces,
        inputs=[str(tokens_path(tokens_folder))],
        output_dir=str(folder / "chunks"),
        chunk_size=_CHUNK_TOKENS,
        item_loader=litdata.TokensLoader(block_size=ROW_TOKENS),
        num_workers=1,
        verbose=False,
    )


class Loader:
    """Without workers."""

    def __init__(
        self, folder: Path, tokens_folder: Path, workload: Workload, *, rank: int, num_ranks: int
    ) -> None:
        os.environ.update({"WORLD_SIZE": str(num_ranks), "GLOBAL_RANK": str(rank)})
        dataset = litdata.StreamingDataset(
            input_dir=str(folder / "chunks"),
            item_loader=litdata.TokensLoader(block_size=ROW_TOKENS),
            shuffle=True,
            drop_last=True,
            seed=SEED,
        )
        self._loader = litdata.StreamingDataLoader(
            dataset, batch_size=BATCH_SAMPLES // num_ranks, num_workers=0
        )
        self._num_ranks = num_ranks

    def batches(self, state: Any = None) -> Iterator[Any]:
        """Return batches; the state is loaded first."""
        if state is not None:
            self._loader.load_state_dict(state)
        return iter(self._loader)

    def state(self) -> Any:
        """Return its state."""
        return self._loader.state_dict()

    def skipping(self, num_batches: int) -> Iterator[Any]:
        """Return batches from a state that is further on."""
        yielded = num_batches * BATCH_SAMPLES // self._num_ranks
        state = self._loader.state_dict()
        state["num_samples_yielded"] = yielded
        state["dataset"]["num_samples_yielded"] = yielded
        state["dataset"]["sample_in_epoch"] = num_batches * BATCH_SAMPLES
        return self.batches(state)

    def rows(self, batch: Any) -> npt.NDArray[np.integer]:
        """Return the tokens."""
        return as_array(batch)
