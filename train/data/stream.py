"""The stream of batches: a pure function of cursor, ledger and returns; each rank takes its rows.

Owns the way from the cursor to tokens: ledger, returns, source. Refuses to keep a position: the
cursor is the caller's. Called by the loop on all ranks; no collective.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from train.data.ledger import SkipLedger
from train.data.order import SampleOrder
from train.data.origins import SampleOrigin
from train.data.sequence import Returns
from train.data.store import TokenStore

# Chosen by trial: far above the noise of one batch, far below what breaks a run.
_SHIFTED_SHARE = 0.15


class SampleSource(Protocol):
    """Tokens by global index of the order."""

    def rows(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.integer]:
        """Return the tokens at `indices`, shape [n, sequence_length + 1]."""

    def origins(self, index: int) -> tuple[SampleOrigin, ...]:
        """Return where the text of the sample at `index` comes from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One global batch as one rank sees it.

    `rows`: this rank's samples, [num_samples / ranks, sequence_length + 1]. `indices`: the whole
    batch's indices of the global order. `next_cursor`: the position where the next batch begins.
    """

    rows: npt.NDArray[np.integer]
    indices: npt.NDArray[np.int64]
    next_cursor: int
    num_tokens: int


class OrderedSource:
    """The samples of a token store in the global order."""

    def __init__(self, store: TokenStore, order: SampleOrder) -> None:
        self._store = store
        self._order = order

    def rows(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.integer]:
        """Return the tokens at global `indices`."""
        return self._store.rows(self._order.samples(indices))

    def origins(self, index: int) -> tuple[SampleOrigin, ...]:
        """Return where the text of the sample at global `index` comes from."""
        (sample,) = self._order.samples(np.array([index], dtype=np.int64))
        return self._store.origins(int(sample))


class PoisonedSource:
    """A source one stretch of which is bad, as a shard tokenised with another tokenizer is.

    There, each token stands for another one, always the same, so it looks like language and is
    learnt as such. It depends on the seed and the index alone: a rewind that does not skip meets
    it again, and any number of ranks sees the same.
    """

    def __init__(
        self, source: SampleSource, *, start: int, stop: int, vocab_size: int, seed: int
    ) -> None:
        self._source = source
        self._start, self._stop = start, stop
        self._foreign_tokens = np.random.default_rng(seed % 2**64).permutation(vocab_size)

    def rows(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.integer]:
        """Return the tokens at global `indices`, poisoned ones among them."""
        rows = self._source.rows(indices)
        is_bad = (indices >= self._start) & (indices < self._stop)
        rows[is_bad] = self._foreign_tokens[rows[is_bad]]
        return rows

    def origins(self, index: int) -> tuple[SampleOrigin, ...]:
        """Return where the text of the sample comes from, poisoned or not."""
        return self._source.origins(index)


class ShiftedSource:
    """A source that changes for good at one place, as a run does that gets another data mixture.

    Nothing is wrong with it: the text is harder, no more. Of each sample, a fixed share of tokens
    gives way to others of the same sample, so words stay as frequent as they were while context
    tells less. That cannot be learnt away: the loss goes up at once and stays. At the nano size it
    went from 4.1 to 5.1 nats and was 0.87 above the unshifted run's 130 steps later. As with
    `PoisonedSource`, seed and index decide alone.
    """

    def __init__(self, source: SampleSource, *, start: int, seed: int) -> None:
        self._source = source
        self._start = start
        self._seed = seed

    def rows(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.integer]:
        """Return the tokens at global `indices`, those from the start of the shift on replaced."""
        rows = self._source.rows(indices)
        is_new = indices >= self._start
        rows[is_new] = self._replace(rows[is_new], indices[is_new])
        return rows

    def origins(self, index: int) -> tuple[SampleOrigin, ...]:
        """Return where the text of the sample comes from, replaced in part or not."""
        return self._source.origins(index)

    def _replace(
        self, rows: npt.NDArray[np.integer], indices: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.integer]:
        num_columns = rows.shape[1]
        seeds = _scramble(np.array([self._seed % 2**64], dtype=np.uint64))
        of_sample = _scramble(seeds + indices.astype(np.uint64))
        bits = _scramble(of_sample[:, None] + np.arange(num_columns, dtype=np.uint64)[None, :])
        is_replaced = (bits >> np.uint64(32)) < np.uint64(_SHIFTED_SHARE * 2**32)
        columns = (bits & np.uint64(2**32 - 1)).astype(np.int64) % num_columns
        return np.where(is_replaced, np.take_along_axis(rows, columns, axis=1), rows)


def _scramble(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Scramble 64 bits (SplitMix64, Steele et al., OOPSLA 2014): neighbours share nothing."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class SampleStream:
    """Batches at any cursor, for one rank of `num_ranks`."""

    def __init__(
        self,
        source: SampleSource,
        ledger: SkipLedger,
        *,
        rank: int,
        num_ranks: int,
        returns: Returns | None = None,
    ) -> None:
        self.ledger = ledger
        self.returns = Returns() if returns is None else returns
        self._source = source
        self._rank = rank
        self._num_ranks = num_ranks

    def at(self, cursor: int, num_samples: int) -> Batch:
        """Return the next `num_samples` samples at or after `cursor` that are not skipped.

        Each rank gets one contiguous block of rows; `num_samples` divides among the ranks.
        """
        indices, next_cursor = self.indices(cursor, num_samples)
        share = num_samples // self._num_ranks
        mine = indices[self._rank * share : (self._rank + 1) * share]
        rows = self._source.rows(mine)
        return Batch(
            rows=rows,
            indices=indices,
            next_cursor=next_cursor,
            num_tokens=num_samples * (rows.shape[1] - 1),
        )

    def indices(self, cursor: int, num_samples: int) -> tuple[npt.NDArray[np.int64], int]:
        """Return the indices of the order that `at` would take, and the cursor after them.

        Indices: int64, shape [num_samples]. No token is read.
        """
        positions, next_cursor = self.ledger.take(cursor, num_samples)
        return self.returns.resolve(positions), next_cursor

    def cursor_after(self, cursor: int, num_samples: int) -> int:
        """Return where `num_samples` samples from `cursor` on would leave the cursor."""
        return self.ledger.advance(cursor, num_samples)

    def rows_of(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.integer]:
        """Return the tokens at `indices` of the order, shape [n, sequence_length + 1]."""
        return self._source.rows(indices)

    def origins_of(self, index: int) -> tuple[SampleOrigin, ...]:
        """Return where the text of the sample at `index` of the order comes from."""
        return self._source.origins(index)
