"""mosaicml-streaming: StreamingDataset over local MDS shards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch.distributed as dist
from streaming import MDSWriter, StreamingDataLoader, StreamingDataset
from streaming.base.util import clean_stale_shared_memory
from torch.testing._internal.distributed.fake_pg import FakeStore

from loader_peers.contract import as_array
from loader_peers.workload import BATCH_SAMPLES, SEED, SEQUENCE_LENGTH, Workload, tokens_path

ROW_TOKENS = SEQUENCE_LENGTH + 1
_NUM_CANONICAL_NODES = 64


def prepare(folder: Path, tokens_folder: Path, workload: Workload) -> None:
    """Write MDS shards of 64 MiB, one row of 2,049 tokens a sample."""
    tokens = np.memmap(tokens_path(tokens_folder), dtype=np.uint16, mode="r")
    columns = {"tokens": f"ndarray:uint16:{ROW_TOKENS}"}
    with MDSWriter(out=str(folder / "shards"), columns=columns) as writer:
        for row in range(workload.num_samples):
            first = row * SEQUENCE_LENGTH
            writer.write({"tokens": np.array(tokens[first : first + ROW_TOKENS])})


def _pretend(rank: int, num_ranks: int) -> None:
    """Let it see `num_ranks` nodes of one rank each: on one node it waits for all of them."""
    if dist.is_initialized():
        dist.destroy_process_group()
    names = {"RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    os.environ.update({name: str(value) for name, value in names.items()})
    if num_ranks > 1:
        dist.init_process_group("fake", rank=rank, world_size=num_ranks, store=FakeStore())


class Loader:
    """Without workers, as fast as it is on one core."""

    def __init__(
        self, folder: Path, tokens_folder: Path, workload: Workload, *, rank: int, num_ranks: int
    ) -> None:
        _pretend(rank, num_ranks)
        clean_stale_shared_memory()
        dataset = StreamingDataset(
            local=str(folder / "shards"),
            shuffle=True,
            shuffle_seed=SEED,
            batch_size=BATCH_SAMPLES // num_ranks,
            num_canonical_nodes=_NUM_CANONICAL_NODES,
        )
        self._loader = StreamingDataLoader(
            dataset, batch_size=BATCH_SAMPLES // num_ranks, num_workers=0, drop_last=True
        )

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
        state = self._loader.state_dict() | {"sample_in_epoch": num_batches * BATCH_SAMPLES}
        return self.batches(state)

    def rows(self, batch: Any) -> npt.NDArray[np.integer]:
        """Return the tokens."""
        return as_array(batch["tokens"])
