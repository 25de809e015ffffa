"""Trimtab's own data layer, put together as `train.assembly` does, in this process.

`ReadAhead` over `SampleStream`, sixteen batches ahead, tokens held against the vocabulary.
Nothing of torch is imported, as the data layer needs none.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from loader_peers.workload import (
    BATCH_SAMPLES,
    SEED,
    SEPARATOR,
    SEQUENCE_LENGTH,
    VOCAB_SIZE,
    Workload,
    documents_path,
    tokens_path,
)
from train.data.formats import open_corpus
from train.data.ledger import SkipLedger
from train.data.order import SampleOrder
from train.data.read_ahead import ReadAhead
from train.data.samples import CutSamples
from train.data.source import MixedSource, SourcePart
from train.data.store import TokenStore
from train.data.stream import SampleStream

_READ_AHEAD_BATCHES = 16


def prepare(folder: Path, tokens_folder: Path, workload: Workload) -> None:
    """Write a prepared folder around the tokens: its manifest and where documents begin."""
    tokens, starts = folder / "train-00000.bin", np.load(documents_path(tokens_folder))
    os.link(tokens_path(tokens_folder), tokens)
    documents = folder / "train-00000.documents.npy"
    np.save(documents, np.stack([starts, np.zeros_like(starts), np.arange(1, len(starts) + 1)]))
    shard = {
        "file": tokens.name,
        "num_tokens": workload.num_tokens,
        "num_documents": len(starts),
        "num_bytes": tokens.stat().st_size,
        "sha256": _digest(tokens),
        "documents_file": documents.name,
        "documents_num_bytes": documents.stat().st_size,
        "documents_sha256": _digest(documents),
    }
    counts = {name: shard[name] for name in ("num_tokens", "num_documents")}
    manifest = {
        "format": "trimtab-corpus",
        "version": 1,
        "digest": _digest(tokens),
        "dtype": "uint16",
        "vocab_size": VOCAB_SIZE,
        "tokenizer": {
            "kind": "bytes",
            "fingerprint": hashlib.sha256(b"bytes").hexdigest(),
            "separator": "<|endoftext|>",
            "separator_id": SEPARATOR,
        },
        "splits": {
            "train": {**counts, "shards": [shard]},
            "validation": {"num_tokens": 0, "num_documents": 0, "shards": []},
        },
        "files": ["pseudo-text"],
        "counts": {},
        "settings": {},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Loader:
    """The state is what a checkpoint keeps of the data: a cursor, and what belongs to it."""

    isolates_documents = False
    reads_ahead = True
    corpus_name = ""

    def __init__(
        self, folder: Path, tokens_folder: Path, workload: Workload, *, rank: int, num_ranks: int
    ) -> None:
        corpus = open_corpus(str(folder / self.corpus_name), dtype=None, cache=None)
        samples = CutSamples(
            TokenStore(corpus, corpus.train),
            sequence_length=SEQUENCE_LENGTH,
            isolates_documents=self.isolates_documents,
        )
        key = f"text:{corpus.digest}"
        self.order = SampleOrder(num_samples=samples.num_samples, seed=SEED, key=key)
        source = MixedSource([SourcePart(name="text", samples=samples, order=self.order)])
        self._stream = SampleStream(
            source,
            SkipLedger(),
            rank=rank,
            num_ranks=num_ranks,
            vocab_size=VOCAB_SIZE if self.reads_ahead else None,
        )
        self._cursor = 0
        self._data: Any = self._stream
        if self.reads_ahead:
            self._data = ReadAhead(self._stream, num_batches=_READ_AHEAD_BATCHES)

    def batches(self, state: Any = None) -> Iterator[Any]:
        """Return batches from a cursor on, without end."""
        self._cursor = 0 if state is None else state["cursor"]
        if state is not None:
            self._stream.ledger.extend(tuple(skip) for skip in state["skipped"])
        while True:
            batch = self._data.at(self._cursor, BATCH_SAMPLES)
            self._cursor = batch.next_cursor
            yield batch

    def state(self) -> Any:
        """Return the cursor, the ledger, and the proof of what was read last."""
        skipped = self._stream.ledger.ranges()
        proof = self._stream.proof(self._cursor)
        return {"cursor": self._cursor, "skipped": skipped, "returned": [], "data_proof": proof}

    def skipping(self, num_batches: int) -> Iterator[Any]:
        """Skip as a recovery does: the samples go into the ledger, and none of them is read."""
        self._stream.ledger.extend([(self._cursor, num_batches * BATCH_SAMPLES)])
        return self.batches({"cursor": self._cursor, "skipped": []})

    def rows(self, batch: Any) -> npt.NDArray[np.integer]:
        """Return the tokens."""
        rows: npt.NDArray[np.integer] = batch.rows
        return rows
