"""Sources of samples that are made up, and how tests read any source."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from train.data.layout import DocumentLayout
from train.data.order import SampleOrder
from train.data.origins import SampleOrigin
from train.data.samples import Samples
from train.data.source import MixedSource, SourcePart


class RowSource:
    """A source whose tokens `rows` makes up; nothing is wrong with it."""

    sample_tokens = 65
    num_indices: int | None = None
    num_samples = 10**6
    dtype: np.dtype[Any] = np.dtype(np.int64)

    def rows(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.integer]:
        raise NotImplementedError

    def read(self, indices: npt.NDArray[np.int64], out: npt.NDArray[np.integer]) -> None:
        out[:] = self.rows(indices)

    def announce(self, indices: npt.NDArray[np.int64]) -> None:
        pass

    def look_ahead(self, index: int) -> None:
        pass

    def layout(self, indices: npt.NDArray[np.int64]) -> DocumentLayout | None:
        return None

    def num_predictions(self, indices: npt.NDArray[np.int64]) -> int:
        return len(indices) * (self.sample_tokens - 1)

    def given_before(self, index: int) -> dict[str, int]:
        return {}

    def bad(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        return np.zeros(len(indices), dtype=np.bool_)

    def origins(self, index: int) -> tuple[SampleOrigin, ...]:
        return ()


def rows_of(source: Any, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.integer]:
    """Return the tokens of a source at `indices`."""
    rows = np.empty((len(indices), source.sample_tokens), dtype=source.dtype)
    source.read(indices, rows)
    return rows


def ordered(samples: Samples, *, seed: int) -> MixedSource:
    """Return one source alone, in its order."""
    order = SampleOrder(num_samples=samples.num_samples, seed=seed)
    return MixedSource([SourcePart(name="text", samples=samples, order=order)])
