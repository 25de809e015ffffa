"""torchtitan: its text data loader, which tokenises while it trains.

The text is made of the same tokens, each as one word; its tokenizer is one of whole words.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, models, pre_tokenizers
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS, HuggingFaceTextDataLoader

from loader_peers.workload import (
    BATCH_SAMPLES,
    SEQUENCE_LENGTH,
    VOCAB_SIZE,
    Workload,
    documents_path,
    tokens_path,
)

_NAME = "benchmark"


def prepare(folder: Path, tokens_folder: Path, workload: Workload) -> None:
    """Write one Parquet file with a text a document, and the tokenizer."""
    tokens = np.fromfile(tokens_path(tokens_folder), dtype=np.uint16, count=workload.num_tokens)
    starts = np.load(documents_path(tokens_folder))
    starts = starts[starts < workload.num_tokens]
    texts = [
        " ".join(f"w{token}" for token in document[:-1].tolist())
        for document in np.split(tokens, starts[1:])
    ]
    pq.write_table(pa.table({"text": texts}), folder / "text.parquet")
    vocabulary = {"<|endoftext|>": 0, "<|begin|>": VOCAB_SIZE}
    vocabulary |= {f"w{token}": token for token in range(1, VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<|begin|>", "<|endoftext|>"])
    (folder / "tokenizer").mkdir()
    tokenizer.save(str(folder / "tokenizer/tokenizer.json"))
    names = {"bos_token": "<|begin|>", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer/tokenizer_config.json").write_text(json.dumps(names))


class Loader:
    """A map-style dataset, in the order of the file: it shuffles later epochs only."""

    def __init__(
        self, folder: Path, tokens_folder: Path, workload: Workload, *, rank: int, num_ranks: int
    ) -> None:
        DATASETS[_NAME] = DatasetConfig(
            path=str(folder / "text.parquet"),
            loader=lambda path: datasets.load_dataset(
                "parquet", data_files=path, split="train", cache_dir=str(folder / "cache")
            ),
            sample_processor=lambda sample: sample["text"],
        )
        tokenizer = HuggingFaceTokenizer(tokenizer_path=str(folder / "tokenizer"))
        self._loader = HuggingFaceTextDataLoader(
            HuggingFaceTextDataLoader.Config(dataset=_NAME, infinite=False),
            dp_world_size=num_ranks,
            dp_rank=rank,
            tokenizer=tokenizer,
            seq_len=SEQUENCE_LENGTH,
            local_batch_size=BATCH_SAMPLES // num_ranks,
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
        """Return batches after others that were made and dropped: it has no other way."""
        batches = self.batches()
        for _ in range(num_batches):
            next(batches)
        return batches

    def rows(self, batch: Any) -> npt.NDArray[np.integer]:
        """Return the inputs."""
        tokens: npt.NDArray[np.integer] = batch[0]["input"].numpy()
        return tokens
