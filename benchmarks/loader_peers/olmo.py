"""OLMo-core: NumpyFSLDataset and its data loader."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from olmo_core.data import NumpyFSLDataset
from olmo_core.data.collator import DataCollator
from olmo_core.data.data_loader import NumpyDataLoaderBase

from loader_peers.workload import (
    BATCH_SAMPLES,
    SEED,
    SEPARATOR,
    SEQUENCE_LENGTH,
    VOCAB_SIZE,
    Workload,
    tokens_path,
)


def prepare(folder: Path, tokens_folder: Path, workload: Workload) -> None:
    """Build the file of shuffled indices; its tokens are raw ones, as they are."""
    Loader(folder, tokens_folder, workload, rank=0, num_ranks=1)


class Loader:
    """Four threads, which is what it chooses itself without workers."""

    def __init__(
        self, folder: Path, tokens_folder: Path, workload: Workload, *, rank: int, num_ranks: int
    ) -> None:
        dataset = NumpyFSLDataset(
            str(tokens_path(tokens_folder)),
            sequence_length=SEQUENCE_LENGTH,
            pad_token_id=SEPARATOR,
            eos_token_id=SEPARATOR,
            vocab_size=VOCAB_SIZE,
            dtype=np.uint16,
        )
        dataset.work_dir = folder / "work"
        dataset.prepare()
        self._loader = NumpyDataLoaderBase.wrap_numpy_dataset(
            dataset,
            global_batch_size=BATCH_SAMPLES * SEQUENCE_LENGTH,
            collator=DataCollator(pad_token_id=SEPARATOR, vocab_size=VOCAB_SIZE),
            work_dir=folder / "work",
            seed=SEED,
            dp_world_size=num_ranks,
            dp_rank=rank,
            fs_local_rank=0,
        )

    def batches(self, state: Any = None) -> Iterator[Any]:
        """Return batches; the state is loaded first, as its trainer does."""
        self._loader.reset()
        if state is not None:
            self._loader.load_state_dict(state)
        self._loader.reshuffle(epoch=1)
        return iter(self._loader)

    def state(self) -> Any:
        """Return its state."""
        return self._loader.state_dict()

    def skipping(self, num_batches: int) -> Iterator[Any]:
        """Return batches from a state with more tokens processed on."""
        num_tokens = num_batches * BATCH_SAMPLES * SEQUENCE_LENGTH
        state = {**self._loader.state_dict(), "tokens_processed": num_tokens, "epoch": 1}
        return self.batches(state)

    def rows(self, batch: Any) -> npt.NDArray[np.integer]:
        """Return the inputs."""
        tokens: npt.NDArray[np.integer] = batch["input_ids"].numpy()
        return tokens
