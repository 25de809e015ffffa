"""Batches on their way to the device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from train.data.layout import DocumentLayout
from train.engines.staging import host_buffer, num_predictions, stage, to_device

CPU = torch.device("cpu")
ROWS = np.arange(5 * 9, dtype=np.uint16).reshape(5, 9)
STARTS = np.array([[0, 9], [0, 3], [0, 9], [0, 8], [0, 1]], dtype=np.int32)
LENGTHS = np.array([9, 4, 1, 0, 2], dtype=np.int32)


def test_token_ids_are_widened_on_the_device_alone() -> None:
    large = np.array([[65535, 1]], dtype=np.uint16)
    assert to_device(large, CPU).dtype is torch.uint16
    assert stage(large, None, CPU).tokens.tolist() == [[65535, 1]]


def test_rows_without_a_layout_have_none_on_the_device() -> None:
    staged = stage(ROWS, None, CPU)
    assert staged.starts is None and staged.lengths is None
    assert staged.num_predictions == 8
    assert stage(ROWS, DocumentLayout(), CPU)[1:] == (None, None)


@pytest.mark.parametrize("size", [None, 1, 2, 5, 7])
def test_micro_batches_take_their_layout_along(size: int | None) -> None:
    layout = DocumentLayout(starts=STARTS, lengths=LENGTHS)
    chunks = list(stage(ROWS, layout, CPU).split(size))
    assert [len(chunk.tokens) for chunk in chunks[:-1]] == [size] * (len(chunks) - 1)
    for part, whole in enumerate((ROWS, STARTS, LENGTHS)):
        assert torch.cat([chunk[part] for chunk in chunks]).tolist() == whole.tolist()
    bare = list(stage(ROWS, None, CPU).split(size))
    assert [len(chunk.tokens) for chunk in bare] == [len(chunk.tokens) for chunk in chunks]


def test_each_sample_has_as_many_predictions_as_text_behind_its_first_token() -> None:
    layout = DocumentLayout(lengths=LENGTHS)
    staged = stage(ROWS, layout, CPU).num_predictions
    assert isinstance(staged, torch.Tensor) and staged.tolist() == [8, 3, 0, 0, 1]
    assert num_predictions(ROWS, layout) == 12
    assert num_predictions(ROWS, DocumentLayout(starts=STARTS)) == 5 * 8
    assert num_predictions(ROWS, None) == 5 * 8


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int32])
def test_buffer_is_plain_memory_where_the_device_is_the_host(dtype: type[np.integer]) -> None:
    buffer = host_buffer((3, 5), dtype, CPU)
    assert buffer.shape == (3, 5) and buffer.dtype == dtype and buffer.flags.writeable
    buffer[:] = 7
    assert stage(buffer[:2], None, CPU).tokens.tolist() == [[7] * 5] * 2
