"""Sources in which something is wrong on purpose, from the seed and the index alone.

Whoever reads them, after whatever rewind and on any number of ranks, meets the same. Built by
`train.chaos`, by no one else.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from train.data.layout import DocumentLayout
from train.data.origins import SampleOrigin
from train.data.source import SampleSource

# Chosen by trial: far above the noise of one batch, far below what breaks a run.
_SHIFTED_SHARE = 0.15


class SpoiledSource:
    """A source that gives what another one does; what spoils it replaces `read`."""

    def __init__(self, source: SampleSource) -> None:
        self._source = source
        self.sample_tokens = source.sample_tokens
        self.dtype = source.dtype
        self.num_indices = source.num_indices
        self.num_samples = source.num_samples

    def read(self, indices: npt.NDArray[np.int64], out: npt.NDArray[np.integer]) -> None:
        """Fill `out` with the tokens at global `indices`."""
        self._source.read(indices, out)

    def announce(self, indices: npt.NDArray[np.int64]) -> None:
        """Tell the storage what will be read soon."""
        self._source.announce(indices)

    def look_ahead(self, index: int) -> None:
        """Tell the storage of the windows that come."""
        self._source.look_ahead(index)

    def layout(self, indices: npt.NDArray[np.int64]) -> DocumentLayout | None:
        """Return the documents of the samples, spoiled or not."""
        return self._source.layout(indices)

    def num_predictions(self, indices: npt.NDArray[np.int64]) -> int:
        """Return how many tokens of the samples are predicted."""
        return self._source.num_predictions(indices)

    def given_before(self, index: int) -> dict[str, int]:
        """Return how many samples each source of a mixture gives before `index`."""
        return self._source.given_before(index)

    def bad(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Return which samples touch damaged files."""
        return self._source.bad(indices)

    def origins(self, index: int) -> tuple[SampleOrigin, ...]:
        """Return where the text of the sample comes from, spoiled or not."""
        return self._source.origins(index)


class PoisonedSource(SpoiledSource):
    """A source one stretch of which is bad, as a shard tokenised with another tokenizer is.

    There, each token stands for another one, always the same, so it looks like language and is
    learnt as such.
    """

    def __init__(
        self, source: SampleSource, *, start: int, stop: int, vocab_size: int, seed: int
    ) -> None:
        super().__init__(source)
        self._start, self._stop = start, stop
        self._foreign_tokens = np.random.default_rng(seed % 2**64).permutation(vocab_size)

    def read(self, indices: npt.NDArray[np.int64], out: npt.NDArray[np.integer]) -> None:
        """Fill `out` with the tokens at global `indices`, poisoned ones among them."""
        self._source.read(indices, out)
        is_bad = (indices >= self._start) & (indices < self._stop)
        out[is_bad] = self._foreign_tokens[out[is_bad]]


class ShiftedSource(SpoiledSource):
    """A source that changes for good at one place, as a run does that gets another data mixture.

    Nothing is wrong with it: the text is harder, no more. Of each sample, a fixed share of tokens
    gives way to others of the same sample, so words stay as frequent as they were while context
    tells less. That cannot be learnt away: the loss goes up at once and stays. At the nano size it
    went from 4.1 to 5.1 nats and was 0.87 above the unshifted run's 130 steps later.
    """

    def __init__(self, source: SampleSource, *, start: int, seed: int) -> None:
        super().__init__(source)
        self._start = start
        self._seed = seed

    def read(self, indices: npt.NDArray[np.int64], out: npt.NDArray[np.integer]) -> None:
        """Fill `out` with the tokens at `indices`, from the start of the shift on replaced."""
        self._source.read(indices, out)
        is_new = indices >= self._start
        out[is_new] = self._replace(out[is_new], indices[is_new])

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
