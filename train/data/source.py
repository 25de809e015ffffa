"""The global order as tokens: sources of a mixture, each in its own order, behind one index.

Owns the way from an index of the order to tokens. Knows neither ledger nor cursor: those are the
stream's. Pure, but for what storage was told of: two threads may read at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from train.data.layout import DocumentLayout
from train.data.order import SampleOrder
from train.data.origins import SampleOrigin
from train.data.samples import Samples

if TYPE_CHECKING:
    from train.data.mixture import Mixture

Indices = npt.NDArray[np.int64]


class SampleSource(Protocol):
    """Tokens by global index of the order; a sample has `sample_tokens`, T + 1."""

    sample_tokens: int
    dtype: np.dtype[np.integer]
    num_indices: int | None
    """Where the order ends; None if it never does."""
    num_samples: int
    """Of one epoch of all sources together."""

    def read(self, indices: Indices, out: npt.NDArray[np.integer]) -> None:
        """Fill `out`, [n, T + 1], with the tokens at `indices`, [n]."""

    def announce(self, indices: Indices) -> None:
        """Tell the storage what will be read soon; returns at once."""

    def look_ahead(self, index: int) -> None:
        """Tell the storage of the windows that come behind `index`, where the order is local."""

    def layout(self, indices: Indices) -> DocumentLayout | None:
        """Return where documents begin and text ends; None if that is not asked for."""

    def num_predictions(self, indices: Indices) -> int:
        """Return how many tokens of the samples are predicted: T each, but for padding."""

    def given_before(self, index: int) -> dict[str, int]:
        """Return how many samples each source of a mixture gives before `index`; one alone: {}."""

    def bad(self, indices: Indices) -> npt.NDArray[np.bool_]:
        """Return which samples touch files that are missing or damaged, [n]."""

    def origins(self, index: int) -> tuple[SampleOrigin, ...]:
        """Return where the text of the sample at `index` comes from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourcePart:
    """One source of a mixture: its samples, and the order in which they are read."""

    name: str
    samples: Samples
    order: SampleOrder


class MixedSource:
    """One source, or several in the proportions of a mixture; all of one sample length."""

    def __init__(self, parts: Sequence[SourcePart], mixture: Mixture | None = None) -> None:
        self.parts = tuple(parts)
        self._mixture = mixture
        self.num_indices = None if mixture is None else mixture.num_indices
        self.num_samples = sum(part.order.num_samples for part in parts)
        self._told: dict[str, int] = {}
        self._is_padded = any(part.samples.is_padded for part in parts)
        self._has_layout = any(part.samples.has_layout for part in parts)
        self.sample_tokens = parts[0].samples.sample_tokens
        self.dtype: np.dtype[np.integer] = np.result_type(*(part.samples.dtype for part in parts))
        assert mixture is not None or len(parts) == 1, "several sources need a mixture"

    def locate(self, indices: Indices) -> list[tuple[SourcePart, Indices, Indices]]:
        """Return, for each source that is met, its rows of `indices` and its samples there."""
        if self._mixture is None:
            (part,) = self.parts
            places = np.arange(len(indices), dtype=np.int64)
            return [(part, places, part.order.samples(indices))]
        numbers, own_indices = self._mixture.locate(indices)
        found = []
        for number, part in enumerate(self.parts):
            (places,) = np.nonzero(numbers == number)
            if len(places):
                found.append((part, places, part.order.samples(own_indices[places])))
        return found

    def read(self, indices: Indices, out: npt.NDArray[np.integer]) -> None:
        """Fill `out` with the tokens at global `indices`."""
        if self._mixture is None:
            self.parts[0].samples.read(self.parts[0].order.samples(indices), out)
            return
        for part, places, samples in self.locate(indices):
            part.samples.read(samples, out, places.tolist())

    def announce(self, indices: Indices) -> None:
        """Tell the storage what will be read soon."""
        for part, _, samples in self.locate(indices):
            part.samples.announce(samples)

    def look_ahead(self, index: int) -> None:
        """Tell the storage of the next window of each source, once. Called in one thread alone."""
        if all(part.order.window_samples is None for part in self.parts):
            return
        for part, own in self._own_indices(index):
            size = part.order.window_samples
            told = max(self._told.get(part.name, own), own)
            if size is None or told > own + size // 2:
                continue
            stretches = part.order.blocks_ahead(told, size)
            self._told[part.name] = told + size
            samples = [np.arange(first, first + count) for first, count in stretches.tolist()]
            part.samples.announce(np.concatenate(samples))

    def _own_indices(self, index: int) -> list[tuple[SourcePart, int]]:
        """Return where each source stands in its own order at `index` of the global one."""
        if self._mixture is None:
            return [(self.parts[0], index)]
        return list(zip(self.parts, self._mixture.given_before(index), strict=True))

    def layout(self, indices: Indices) -> DocumentLayout | None:
        """Return the documents of the samples at `indices`."""
        if not self._has_layout:
            return None
        found = [
            (places, part.samples.layout(samples)) for part, places, samples in self.locate(indices)
        ]
        layouts = [(places, layout) for places, layout in found if layout is not None]
        if len(layouts) == 1 and len(layouts[0][0]) == len(indices):
            return layouts[0][1]
        return DocumentLayout(
            starts=self._merged_starts(len(indices), layouts),
            lengths=self._merged_lengths(len(indices), layouts),
        )

    def _merged_starts(
        self, num_rows: int, layouts: Sequence[tuple[Indices, DocumentLayout]]
    ) -> npt.NDArray[np.int32] | None:
        widths = [layout.starts.shape[1] for _, layout in layouts if layout.starts is not None]
        if not widths:
            return None
        merged = np.full((num_rows, max(widths)), self.sample_tokens, dtype=np.int32)
        merged[:, 0] = 0
        for places, layout in layouts:
            if layout.starts is not None:
                merged[places, : layout.starts.shape[1]] = layout.starts
        return merged

    def _merged_lengths(
        self, num_rows: int, layouts: Sequence[tuple[Indices, DocumentLayout]]
    ) -> npt.NDArray[np.int32] | None:
        if all(layout.lengths is None for _, layout in layouts):
            return None
        merged = np.full(num_rows, self.sample_tokens, dtype=np.int32)
        for places, layout in layouts:
            if layout.lengths is not None:
                merged[places] = layout.lengths
        return merged

    def num_predictions(self, indices: Indices) -> int:
        """Return how many tokens of the samples are predicted."""
        if not self._is_padded:
            return len(indices) * (self.sample_tokens - 1)
        return sum(
            part.samples.num_predictions(samples) for part, _, samples in self.locate(indices)
        )

    def given_before(self, index: int) -> dict[str, int]:
        """Return how many samples each source of a mixture gives before `index`."""
        if self._mixture is None:
            return {}
        counts = self._mixture.given_before(index)
        return {part.name: count for part, count in zip(self.parts, counts, strict=True)}

    def bad(self, indices: Indices) -> npt.NDArray[np.bool_]:
        """Return which samples touch files that are missing or damaged."""
        is_bad = np.zeros(len(indices), dtype=np.bool_)
        for part, places, samples in self.locate(indices):
            is_bad[places] = part.samples.bad(samples)
        return is_bad

    def origins(self, index: int) -> tuple[SampleOrigin, ...]:
        """Return where the text of the sample at global `index` comes from."""
        ((part, _, samples),) = self.locate(np.array([index], dtype=np.int64))
        return part.samples.origins(int(samples[0]))
