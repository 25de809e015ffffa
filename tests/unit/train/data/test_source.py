"""Several sources behind one index: each row lands where its index stands."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from train.data.layout import DocumentLayout
from train.data.mixture import Mixture, MixtureStage
from train.data.order import SampleOrder
from train.data.origins import SampleOrigin
from train.data.source import MixedSource, SourcePart

LENGTH = 4


class NumberedSamples:
    """Sample s of a source is s + base, over and over; as many documents as `widths` says."""

    sample_tokens = LENGTH + 1
    dtype = np.dtype(np.uint32)

    def __init__(self, base: int, num_samples: int, *, width: int = 0, length: int = 0) -> None:
        self.num_samples = num_samples
        self.is_padded = bool(length)
        self.has_layout = bool(width)
        self._base = base
        self._width = width
        self._length = length

    def read(
        self,
        samples: npt.NDArray[np.int64],
        out: npt.NDArray[np.integer],
        places: Sequence[int] | npt.NDArray[np.int64] | None = None,
    ) -> None:
        rows = range(len(samples)) if places is None else places
        for row, sample in zip(rows, samples, strict=True):
            out[row] = self._base + sample

    def announce(self, samples: npt.NDArray[np.int64]) -> None:
        pass

    def layout(self, samples: npt.NDArray[np.int64]) -> DocumentLayout | None:
        if not self._width:
            return None
        starts = np.tile(np.arange(self._width, dtype=np.int32), (len(samples), 1))
        lengths = np.full(len(samples), self._length, dtype=np.int32) if self._length else None
        return DocumentLayout(starts=starts, lengths=lengths)

    def num_predictions(self, samples: npt.NDArray[np.int64]) -> int:
        return len(samples) * ((self._length or self.sample_tokens) - 1)

    def bad(self, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        return samples == 0

    def origins(self, sample: int) -> tuple[SampleOrigin, ...]:
        return (
            SampleOrigin(
                file=f"{self._base}",
                line=sample,
                document=0,
                token_offset_in_document=0,
                num_tokens=5,
            ),
        )


def part(name: str, samples: NumberedSamples) -> SourcePart:
    order = SampleOrder(num_samples=samples.num_samples, seed=1, key=name)
    return SourcePart(name=name, samples=samples, order=order)


def mixed(*samples: NumberedSamples) -> MixedSource:
    parts = [part(f"s{number}", one) for number, one in enumerate(samples)]
    mixture = Mixture(
        [MixtureStage(start_index=0, weights=tuple(range(1, len(parts) + 1)))],
        num_samples=[one.num_samples for one in samples],
        max_epochs=[None] * len(parts),
    )
    return MixedSource(parts, mixture)


def test_rows_of_all_sources_lie_where_their_index_does() -> None:
    source = mixed(NumberedSamples(1000, 50), NumberedSamples(2000, 30), NumberedSamples(3000, 7))
    indices = np.random.default_rng(0).integers(0, 10_000, 64)
    rows = np.empty((64, LENGTH + 1), dtype=source.dtype)
    source.read(indices, rows)
    for row, index in zip(rows, indices, strict=True):
        alone = np.empty((1, LENGTH + 1), dtype=source.dtype)
        source.read(np.array([index]), alone)
        assert row.tolist() == alone[0].tolist()
        (origin,) = source.origins(int(index))
        assert int(row[0]) == int(origin.file) + int(origin.line or 0)


def test_a_source_is_read_in_its_own_order_and_completely() -> None:
    source = mixed(NumberedSamples(1000, 50), NumberedSamples(2000, 30))
    rows = np.empty((90, LENGTH + 1), dtype=source.dtype)
    source.read(np.arange(90, dtype=np.int64), rows)  # shares 1/3 and 2/3: one epoch is 30 and 60
    first = rows[:, 0]
    assert sorted(first[first >= 2000][:30] - 2000) == list(range(30))
    assert len(set(first[first < 2000].tolist())) == 30


def test_layouts_of_several_sources_are_padded_to_one_width() -> None:
    source = mixed(NumberedSamples(1000, 50, width=3, length=4), NumberedSamples(2000, 30, width=1))
    indices = np.arange(12, dtype=np.int64)
    rows = np.empty((12, LENGTH + 1), dtype=source.dtype)
    source.read(indices, rows)
    layout = source.layout(indices)
    assert layout is not None and layout.starts is not None and layout.lengths is not None
    is_first = rows[:, 0] < 2000
    assert layout.starts[is_first].tolist() == [[0, 1, 2]] * int(is_first.sum())
    assert layout.starts[~is_first].tolist() == [[0, 5, 5]] * int((~is_first).sum())
    assert layout.lengths.tolist() == [4 if first else 5 for first in is_first]
    expected = sum(3 if first else 4 for first in is_first)
    assert source.num_predictions(indices) == expected


def test_one_source_alone_needs_no_mixture() -> None:
    samples = NumberedSamples(0, 20)
    source = MixedSource([part("only", samples)])
    rows = np.empty((20, LENGTH + 1), dtype=source.dtype)
    source.read(np.arange(20, dtype=np.int64), rows)
    assert sorted(rows[:, 0].tolist()) == list(range(20))
    assert source.bad(np.arange(20, dtype=np.int64)).sum() == 1


class Listening(NumberedSamples):
    def __init__(self, num_samples: int) -> None:
        super().__init__(0, num_samples)
        self.announced: list[int] = []

    def announce(self, samples: npt.NDArray[np.int64]) -> None:
        self.announced += samples.tolist()


def test_windows_of_a_local_order_are_announced_before_they_are_read_and_hardly_twice() -> None:
    samples = Listening(4000)
    order = SampleOrder(num_samples=4000, seed=1, block_samples=10, window_blocks=5)
    source = MixedSource([SourcePart(name="far", samples=samples, order=order)])
    for index in range(0, 4000, 8):
        source.look_ahead(index)
        ahead = order.samples(np.arange(index, min(index + 24, 4000), dtype=np.int64))
        assert set(ahead.tolist()) <= set(samples.announced)
    assert len(samples.announced) < 2.2 * 4000


def test_a_global_order_announces_no_windows() -> None:
    samples = Listening(400)
    source = MixedSource([part("near", samples)])
    source.look_ahead(0)
    assert samples.announced == []
