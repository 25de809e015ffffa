"""How a store of tokens is cut into samples.

Owns the way from the number of a sample to offsets. Refuses to tell documents apart where the
corpus does not say where they begin. Called by the stream on all ranks; no collective.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from train.data.layout import DocumentLayout
from train.data.origins import SampleOrigin
from train.data.store import TokenStore
from train.errors import DataError


class Samples(Protocol):
    """Rows of `sample_tokens` (data.sequence_length + 1) tokens, by number."""

    @property
    def num_samples(self) -> int:
        """How many samples there are."""

    @property
    def sample_tokens(self) -> int:
        """How many tokens a sample has."""

    @property
    def dtype(self) -> np.dtype[np.integer]:
        """What the tokens are kept as."""

    @property
    def is_padded(self) -> bool:
        """Whether samples can hold less text than tokens."""

    @property
    def has_layout(self) -> bool:
        """Whether `layout` returns one."""

    def read(
        self,
        samples: npt.NDArray[np.int64],
        out: npt.NDArray[np.integer],
        places: Sequence[int] | npt.NDArray[np.int64] | None = None,
    ) -> None:
        """Fill row `places[i]` of `out` (row i without) with sample `samples[i]`."""

    def announce(self, samples: npt.NDArray[np.int64]) -> None:
        """Say which samples will be read soon; does not wait for them."""

    def layout(self, samples: npt.NDArray[np.int64]) -> DocumentLayout | None:
        """Return where the documents of `samples` begin, None if that makes no difference."""

    def num_predictions(self, samples: npt.NDArray[np.int64]) -> int:
        """Return how many tokens are predicted in `samples` together."""

    def origins(self, sample: int) -> tuple[SampleOrigin, ...]:
        """Return where the text of a sample comes from, in order."""

    def bad(self, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Return which of `samples` touch a shard that cannot be read: bool [n]."""


class CutSamples:
    """Documents one after the other, cut every `sequence_length` tokens.

    Neighbouring samples share one token, so each token but the first is predicted once. `first`,
    `num_samples`: which of all samples these are; all from `first` on without the latter.
    """

    def __init__(
        self,
        store: TokenStore,
        *,
        sequence_length: int,
        first: int = 0,
        num_samples: int | None = None,
        isolates_documents: bool = False,
    ) -> None:
        total = max(0, store.num_tokens - 1) // sequence_length
        self.num_samples = max(0, total - first) if num_samples is None else num_samples
        self.sample_tokens = sequence_length + 1
        self.dtype = store.dtype
        self.is_padded = False
        self.has_layout = isolates_documents
        self._store = store
        self._sequence_length = sequence_length
        self._first = first
        if first + self.num_samples > max(first, total):
            raise DataError(
                f"samples {first} to {first + self.num_samples} were asked for, and "
                f"{store.num_tokens:,} tokens make {total} of data.sequence_length="
                f"{sequence_length}; give more text, or lower data.sequence_length"
            )
        if isolates_documents and store.num_tokens and not store.has_documents:
            raise DataError(
                "data.isolates_documents=true, but the files of the corpus do not say where "
                "documents begin; set it to false, or prepare the corpus from its text"
            )

    def read(
        self,
        samples: npt.NDArray[np.int64],
        out: npt.NDArray[np.integer],
        places: Sequence[int] | npt.NDArray[np.int64] | None = None,
    ) -> None:
        """Fill row `places[i]` of `out` (row i without) with sample `samples[i]`.

        `out`: [m, sequence_length + 1]. Raises: DataError if a shard cannot be read.
        """
        assert out.shape[1] == self.sample_tokens, "a row holds one sample"
        self._store.read(self._offsets(samples), out, places)

    def announce(self, samples: npt.NDArray[np.int64]) -> None:
        """Say which samples will be read soon; does not wait for them."""
        self._store.announce(self._offsets(samples), self.sample_tokens)

    def layout(self, samples: npt.NDArray[np.int64]) -> DocumentLayout | None:
        """Return where documents begin in each of `samples`, if they are told apart."""
        if not self.has_layout:
            return None
        offsets = self._offsets(samples)
        return DocumentLayout(starts=self._store.document_starts(offsets, self.sample_tokens))

    def num_predictions(self, samples: npt.NDArray[np.int64]) -> int:
        """Return how many tokens are predicted in `samples`: all but the first of each."""
        return len(samples) * self._sequence_length

    def origins(self, sample: int) -> tuple[SampleOrigin, ...]:
        """Return which stretches of which documents make up one sample, in order.

        Their tokens add up to sequence_length + 1. Raises: DataError if an index cannot be read.
        """
        start = (self._first + sample) * self._sequence_length
        return self._store.documents_within(start, start + self.sample_tokens)

    def bad(self, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Return which of `samples` touch a shard that cannot be read: bool [n]."""
        return self._store.bad(self._offsets(samples), self.sample_tokens)

    def _offsets(self, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        if self._first:
            samples = samples + self._first
        return samples * self._sequence_length
