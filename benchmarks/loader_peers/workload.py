"""What all loaders read: one corpus of pseudo-text, the same each time.

Tokens follow Zipf's law, as words do; after 500 on average stands a separator. Written once to a
folder, and read by the adapters from there, as it is or to make their own format of it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

VOCAB_SIZE = 50_000
SEPARATOR = 0
MEAN_DOCUMENT_TOKENS = 500
SEQUENCE_LENGTH = 2048
BATCH_SAMPLES = 64
NUM_SAMPLES = 73_565
SEED = 1
# Enough of a row to tell it from all others.
_IDENTITY_TOKENS = 32
_BLOCK_TOKENS = 1 << 23

Tokens = npt.NDArray[np.uint16]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """How much is read. Samples have `SEQUENCE_LENGTH` tokens, and one more where rows overlap."""

    num_samples: int = NUM_SAMPLES

    @property
    def num_tokens(self) -> int:
        """Tokens of the corpus."""
        return self.num_samples * SEQUENCE_LENGTH + 1

    @property
    def num_batches(self) -> int:
        """Whole batches of one epoch."""
        return self.num_samples // BATCH_SAMPLES


def tokens_path(folder: Path) -> Path:
    """Return where the tokens lie: raw uint16, no header."""
    return folder / "tokens.bin"


def documents_path(folder: Path) -> Path:
    """Return where the first token of each document is written: int64."""
    return folder / "documents.npy"


def write_tokens(folder: Path, workload: Workload) -> None:
    """Write the corpus, unless it is there already."""
    path = tokens_path(folder)
    if documents_path(folder).exists() and path.stat().st_size == 2 * workload.num_tokens:
        return
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(SEED)
    num_lengths = 2 * workload.num_tokens // MEAN_DOCUMENT_TOKENS + 10
    lengths = 2 + random.geometric(1 / (MEAN_DOCUMENT_TOKENS - 2), num_lengths)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    starts = starts[starts < workload.num_tokens].astype(np.int64)
    with path.open("wb") as file:
        for first in range(0, workload.num_tokens, _BLOCK_TOKENS):
            count = min(_BLOCK_TOKENS, workload.num_tokens - first)
            # Log-uniform numbers: how often token k comes goes with 1/k.
            draws = random.random(count, dtype=np.float32)
            block = np.exp(draws * np.float32(np.log(VOCAB_SIZE - 1))).astype(np.uint16)
            ends = starts[(starts > first) & (starts <= first + count)] - 1
            block[ends - first] = SEPARATOR
            if first + count == workload.num_tokens:
                block[-1] = SEPARATOR
            block.tofile(file)
    np.save(documents_path(folder), starts)


def identities(rows: npt.NDArray[np.integer]) -> list[str]:
    """Return a short name of each row, made of its first tokens, [n, at least 32]."""
    heads = np.ascontiguousarray(rows[:, :_IDENTITY_TOKENS], dtype="<u2")
    return [hashlib.sha256(head.tobytes()).hexdigest()[:12] for head in heads]
