"""The token store: one file of tokens, cut into samples of `sequence_length + 1`.

Neighbouring samples share one token, so each token is predicted once. The file is memory-mapped;
nothing is read before it is asked for, where documents lie least of all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from train.data.origins import DocumentIndex, SampleOrigin
from train.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusInfo:
    """What preparation made: where the tokens are, how many, of which vocabulary.

    `digest` is that of the text and the tokenizer together; a run folder remembers it. `files`:
    where the text lies now, which need not be where it lay when it was prepared.
    """

    folder: Path
    digest: str
    num_tokens: int
    num_documents: int
    vocab_size: int
    dtype: str
    files: tuple[Path, ...] = field(default=(), compare=False, repr=False)

    @property
    def tokens_path(self) -> Path:
        """The file of tokens."""
        return self.folder / "tokens.bin"

    @property
    def tokenizer_path(self) -> Path | None:
        """The tokenizer.json, None for plain bytes."""
        path = self.folder / "tokenizer.json"
        return path if path.exists() else None


class TokenStore:
    """Samples of a prepared corpus, by number.

    The last `validation_samples` samples are held out: training never sees them.
    """

    def __init__(self, info: CorpusInfo, *, sequence_length: int, validation_samples: int) -> None:
        dtype = np.dtype(info.dtype)
        num_bytes = info.tokens_path.stat().st_size if info.tokens_path.exists() else 0
        if num_bytes != info.num_tokens * dtype.itemsize:
            raise DataError(
                f"{info.tokens_path} has {num_bytes} bytes, its manifest says "
                f"{info.num_tokens * dtype.itemsize}; delete {info.folder} and it is made anew"
            )
        self._tokens = np.memmap(info.tokens_path, dtype=dtype, mode="r")
        self._documents = DocumentIndex(info.folder, info.files)
        self.vocab_size = info.vocab_size
        self._sequence_length = sequence_length
        total = (info.num_tokens - 1) // sequence_length
        self.num_samples = total - validation_samples
        self._num_validation = validation_samples
        if self.num_samples < 1:
            raise DataError(
                f"the corpus has {info.num_tokens:,} tokens, which make {total} samples of "
                f"data.sequence_length={sequence_length}, and data.validation_samples="
                f"{validation_samples} are held out: nothing is left to train on; give more text "
                "or lower one of the two"
            )

    def rows(self, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.integer]:
        """Return the tokens of `samples`: shape [n, sequence_length + 1], the store's dtype."""
        offsets = samples[:, None] * self._sequence_length
        columns = np.arange(self._sequence_length + 1, dtype=np.int64)[None, :]
        rows: npt.NDArray[np.integer] = self._tokens[offsets + columns]
        return rows

    def origins(self, sample: int) -> tuple[SampleOrigin, ...]:
        """Return which stretches of which documents make up one sample, in order.

        Their tokens add up to sequence_length + 1. Raises: DataError if the cache is damaged.
        """
        start = sample * self._sequence_length
        return self._documents.within(start, start + self._sequence_length + 1)

    def validation_rows(self) -> npt.NDArray[np.integer]:
        """Return the held-out samples: shape [validation_samples, sequence_length + 1]."""
        first = self.num_samples
        return self.rows(np.arange(first, first + self._num_validation, dtype=np.int64))
