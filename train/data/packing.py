"""Samples of whole documents: each is in one row, if it fits, and the rest of a row is padding.

Owns the way from a row of the packing plan to tokens. Refuses corpora that do not say where their
documents begin. Called by the stream on all ranks; no collective.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from train.data.layout import DocumentLayout
from train.data.origins import SampleOrigin
from train.data.packing_plan import describe, load_plan
from train.data.store import TokenStore
from train.errors import DataError

logger = logging.getLogger(__name__)


class _Pieces(NamedTuple):
    """The pieces of some samples, one sample after the other: int64 [num_pieces] each."""

    rows: npt.NDArray[np.int64]
    """Which of the samples, from 0."""
    ranks: npt.NDArray[np.int64]
    """Which piece of its sample, from 0."""
    columns: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]


class PackedSamples:
    """The rows of a best-fit packing of a store's documents, `sequence_length + 1` tokens each.

    Each token is in one row, and so is predicted once at most. `identity`: what the tokens are, the
    digest of the corpus and the split; the plan in `cache_folder` is of these. `padding_id`: the
    token that fills what is left of a row; no loss is taken of it.
    """

    def __init__(
        self,
        store: TokenStore,
        *,
        sequence_length: int,
        identity: str,
        cache_folder: Path,
        isolates_documents: bool = False,
        padding_id: int = 0,
    ) -> None:
        if store.num_tokens and not store.has_documents:
            raise DataError(
                "data.packing=best_fit, but the files of the corpus do not say where documents "
                "begin; set it to concatenate, or prepare the corpus from its text"
            )
        self.sample_tokens = sequence_length + 1
        self.dtype = store.dtype
        self.is_padded = self.has_layout = True
        self._store = store
        self._isolates_documents = isolates_documents
        self._padding_id = padding_id
        self._plan = load_plan(
            store, identity=identity, capacity=self.sample_tokens, cache_folder=cache_folder
        )
        self.num_samples = self._plan.num_rows
        logger.info("data.packing=best_fit: %s", describe(self._plan, self.sample_tokens))

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
        targets = np.arange(len(samples)) if places is None else np.asarray(places, dtype=np.int64)
        pieces = self._pieces(samples)
        # Two reads a piece, of the largest power of two that it holds: from its begin, and up to
        # its end. So a batch takes as many calls as there are powers, not as there are pieces.
        powers = np.frexp(pieces.lengths)[1] - 1
        for power in np.unique(powers).tolist():
            length = 1 << power
            (chosen,) = np.nonzero(powers == power)
            shifts = np.concatenate((np.zeros_like(chosen), pieces.lengths[chosen] - length))
            chosen = np.concatenate((chosen, chosen))
            tokens = np.empty((len(chosen), length), dtype=self.dtype)
            self._store.read(pieces.offsets[chosen] + shifts, tokens)
            windows = np.lib.stride_tricks.sliding_window_view(out, length, 1, writeable=True)
            windows[targets[pieces.rows[chosen]], pieces.columns[chosen] + shifts] = tokens
        for target, length in zip(targets, self._plan.row_lengths[samples], strict=True):
            out[target, length:] = self._padding_id

    def announce(self, samples: npt.NDArray[np.int64]) -> None:
        """Say which samples will be read soon; does not wait for them."""
        pieces = self._pieces(samples)
        for offset, length in zip(pieces.offsets[:, None], pieces.lengths.tolist(), strict=True):
            self._store.announce(offset, length)

    def layout(self, samples: npt.NDArray[np.int64]) -> DocumentLayout:
        """Return how much of each row is text and, if documents are told apart, where they begin.

        A piece of a document that was cut is told apart as a document is.
        """
        lengths = self._plan.row_lengths[samples]
        if not self._isolates_documents:
            return DocumentLayout(lengths=lengths)
        pieces = self._pieces(samples)
        shape = (len(samples), int(pieces.ranks.max(initial=0)) + 1)
        starts = np.full(shape, self.sample_tokens, dtype=np.int32)
        starts[pieces.rows, pieces.ranks] = pieces.columns
        return DocumentLayout(starts=starts, lengths=lengths)

    def num_predictions(self, samples: npt.NDArray[np.int64]) -> int:
        """Return how many tokens are predicted in `samples`: all of their text but the firsts."""
        return int((self._plan.row_lengths[samples].astype(np.int64) - 1).sum())

    def origins(self, sample: int) -> tuple[SampleOrigin, ...]:
        """Return which stretches of which documents make up one sample, in order.

        Padding has no origin. Raises: DataError if an index cannot be read.
        """
        pieces = self._pieces(np.array([sample], dtype=np.int64))
        stretches = zip(pieces.offsets.tolist(), pieces.lengths.tolist(), strict=True)
        return tuple(
            origin
            for offset, length in stretches
            for origin in self._store.documents_within(offset, offset + length)
        )

    def bad(self, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Return which of `samples` touch a shard that cannot be read: bool [n]."""
        pieces = self._pieces(samples)
        # A document lies in one shard, so the first token of a piece tells.
        num_bad = np.bincount(
            pieces.rows, weights=self._store.bad(pieces.offsets, 1), minlength=len(samples)
        )
        return num_bad > 0

    def _pieces(self, samples: npt.NDArray[np.int64]) -> _Pieces:
        firsts = self._plan.firsts[samples]
        counts = self._plan.firsts[samples + 1] - firsts
        rows = np.repeat(np.arange(len(samples)), counts)
        begins = np.cumsum(counts) - counts  # of each sample, among the pieces of all
        ranks = np.arange(len(rows)) - begins[rows]
        numbers = firsts[rows] + ranks
        lengths = self._plan.lengths[numbers].astype(np.int64)
        columns = np.cumsum(lengths) - lengths
        columns -= columns[begins[rows]]
        return _Pieces(rows, ranks, columns, self._plan.offsets[numbers], lengths)
