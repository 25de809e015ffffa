"""Megatron-core: GPTDataset over an indexed dataset, and the sampler of its training loop."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import typing_extensions

# It asks for Python 3.12, of which it uses this one decorator.
vars(typing).setdefault("override", typing_extensions.override)

from megatron.core.datasets import gpt_dataset  # noqa: E402
from megatron.core.datasets.blended_megatron_dataset_builder import (  # noqa: E402
    BlendedMegatronDatasetBuilder,
)
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder  # noqa: E402
from megatron.training.datasets.data_samplers import MegatronPretrainingSampler  # noqa: E402

from loader_peers.workload import (  # noqa: E402
    BATCH_SAMPLES,
    SEED,
    SEPARATOR,
    SEQUENCE_LENGTH,
    VOCAB_SIZE,
    Workload,
    documents_path,
    tokens_path,
)


def prepare(folder: Path, tokens_folder: Path, workload: Workload) -> None:
    """Write `.bin` and `.idx`, a document after the other, and build the cache of indices."""
    tokens = np.fromfile(tokens_path(tokens_folder), dtype=np.uint16)
    starts = np.load(documents_path(tokens_folder))
    builder = IndexedDatasetBuilder(str(folder / "corpus.bin"), dtype=np.uint16)
    lengths = np.diff(np.append(starts, len(tokens))).tolist()
    # All at once: item by item, it is the loop over documents alone that takes its minutes.
    builder.add_document(torch.from_numpy(tokens), lengths)
    builder.document_indices = list(range(len(lengths) + 1))
    builder.finalize(str(folder / "corpus.idx"))
    Loader(folder, tokens_folder, workload, rank=0, num_ranks=1)


class Loader:
    """The state is the number of samples that were consumed, as its checkpoints keep it."""

    def __init__(
        self, folder: Path, tokens_folder: Path, workload: Workload, *, rank: int, num_ranks: int
    ) -> None:
        tokenizer = SimpleNamespace(
            vocab_size=VOCAB_SIZE,
            eod=SEPARATOR,
            pad=-1,
            unique_identifiers={"class": "benchmark"},
        )
        config = gpt_dataset.GPTDatasetConfig(
            random_seed=SEED,
            sequence_length=SEQUENCE_LENGTH,
            blend=([str(folder / "corpus")], None),
            split="1,0,0",
            path_to_cache=str(folder / "cache"),
            tokenizer=tokenizer,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        num_samples = workload.num_batches * BATCH_SAMPLES
        builder = BlendedMegatronDatasetBuilder(
            gpt_dataset.GPTDataset, [num_samples, 0, 0], lambda: True, config
        )
        self._dataset = builder.build()[0]
        self._num_samples = num_samples
        self._rank, self._num_ranks = rank, num_ranks
        self._consumed = 0

    def batches(self, state: Any = None) -> Iterator[Any]:
        """Return batches from the number of consumed samples on."""
        self._consumed = 0 if state is None else int(state["consumed_train_samples"])
        sampler = MegatronPretrainingSampler(
            total_samples=self._num_samples,
            consumed_samples=self._consumed,
            micro_batch_size=BATCH_SAMPLES // self._num_ranks,
            data_parallel_rank=self._rank,
            data_parallel_size=self._num_ranks,
        )
        loader = torch.utils.data.DataLoader(self._dataset, batch_sampler=sampler, num_workers=0)
        for batch in loader:
            self._consumed += BATCH_SAMPLES
            yield batch

    def state(self) -> Any:
        """Return the samples consumed by all ranks."""
        return {"consumed_train_samples": self._consumed}

    def skipping(self, num_batches: int) -> Iterator[Any]:
        """Return batches from a greater number of consumed samples on."""
        return self.batches({"consumed_train_samples": num_batches * BATCH_SAMPLES})

    def rows(self, batch: Any) -> npt.NDArray[np.integer]:
        """Return the inputs."""
        tokens: npt.NDArray[np.integer] = batch["tokens"].numpy()
        return tokens
