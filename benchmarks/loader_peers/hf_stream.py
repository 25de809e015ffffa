"""Hugging Face datasets, streamed from Parquet, behind torchdata's StatefulDataLoader."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.distributed import split_dataset_by_node
from torchdata.stateful_dataloader import StatefulDataLoader

from loader_peers.workload import BATCH_SAMPLES, SEED, SEQUENCE_LENGTH, Workload, tokens_path

ROW_TOKENS = SEQUENCE_LENGTH + 1
_NUM_FILES = 64
_BUFFER_SAMPLES = 1000

# It sleeps 5 s whenever it ends the threads that read ahead: the benchmark's time, nobody's work.
datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0


def prepare(folder: Path, tokens_folder: Path, workload: Workload) -> None:
    """Write Parquet files with one list of 2,049 tokens a row."""
    tokens = np.memmap(tokens_path(tokens_folder), dtype=np.uint16, mode="r")
    for number, samples in enumerate(np.array_split(np.arange(workload.num_samples), _NUM_FILES)):
        first = int(samples[0]) * SEQUENCE_LENGTH
        windows = np.lib.stride_tricks.sliding_window_view(
            tokens[first : first + len(samples) * SEQUENCE_LENGTH + 1], ROW_TOKENS
        )[::SEQUENCE_LENGTH]
        values = pa.array(np.ascontiguousarray(windows).ravel())
        rows = pa.FixedSizeListArray.from_arrays(values, ROW_TOKENS)
        table = pa.table({"input_ids": rows})
        pq.write_table(table, folder / f"train-{number:03d}.parquet", row_group_size=256)


class Loader:
    """64 files divide among 8 ranks, as its guide asks for."""

    def __init__(
        self, folder: Path, tokens_folder: Path, workload: Workload, *, rank: int, num_ranks: int
    ) -> None:
        dataset = datasets.load_dataset(
            "parquet", data_files=str(folder / "train-*.parquet"), split="train", streaming=True
        )
        dataset = dataset.with_format("numpy").shuffle(seed=SEED, buffer_size=_BUFFER_SAMPLES)
        self._dataset = split_dataset_by_node(dataset, rank=rank, world_size=num_ranks)
        self._num_rows = BATCH_SAMPLES // num_ranks
        self._open(self._dataset)

    def _open(self, dataset: Any) -> None:
        self._loader = StatefulDataLoader(dataset, batch_size=self._num_rows, num_workers=0)

    def batches(self, state: Any = None) -> Iterator[Any]:
        """Return batches; the state is loaded first."""
        if state is not None:
            self._loader.load_state_dict(state)
        return iter(self._loader)

    def state(self) -> Any:
        """Return its state, in which the shuffle buffer is not."""
        return self._loader.state_dict()

    def skipping(self, num_batches: int) -> Iterator[Any]:
        """Return batches of the dataset without its first samples."""
        self._open(self._dataset.skip(num_batches * self._num_rows))
        return iter(self._loader)

    def rows(self, batch: Any) -> npt.NDArray[np.integer]:
        """Return the tokens."""
        return np.asarray(batch["input_ids"])
