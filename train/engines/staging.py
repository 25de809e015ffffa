"""The way of a batch from host memory to the device, and buffers that make it short.

Called by engines, and by whoever reads batches ahead of them; no collective, no host sync.

Shapes: B samples of T + 1 tokens, K documents at most in one of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from train.data.layout import DocumentLayout


class StagedRows(NamedTuple):
    """Samples on the device, in the order of `Decoder.forward`'s arguments.

    `tokens`: int64 [B, T + 1]. `starts`: int32 [B, K]. `lengths`: int32 [B].
    """

    tokens: Tensor
    starts: Tensor | None
    lengths: Tensor | None

    def split(self, num_samples: int | None) -> Iterator[StagedRows]:
        """Yield micro-batches of `num_samples` each, the last one may be smaller; None: all."""
        size = num_samples or len(self.tokens)
        for first in range(0, len(self.tokens), size):
            own = slice(first, first + size)
            yield StagedRows(
                self.tokens[own],
                None if self.starts is None else self.starts[own],
                None if self.lengths is None else self.lengths[own],
            )

    @property
    def num_predictions(self) -> int | Tensor:
        """How many predictions each sample has: T, or int32 [B] where rows are padded."""
        if self.lengths is None:
            return self.tokens.shape[1] - 1
        return (self.lengths - 1).clamp(min=0)


def host_buffer(
    shape: tuple[int, ...], dtype: npt.DTypeLike, device: torch.device
) -> npt.NDArray[np.integer]:
    """Return memory for rows, from which a CUDA `device` copies without another copy before.

    Its content is arbitrary. The device reads it some time after `Engine.step` has returned:
    whoever writes into it again, or drops it, first waits until a number of that step, or of a
    later one, has reached the host. Elsewhere it is plain memory, and free when `step` returns.
    """
    kind = np.dtype(dtype)
    num_bytes = math.prod(shape) * kind.itemsize
    memory = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    buffer: npt.NDArray[np.integer] = memory.numpy().view(kind).reshape(shape)
    return buffer


def to_device(rows: npt.NDArray[np.integer], device: torch.device) -> Tensor:
    """Return `rows` on `device`, as narrow as they are. Memory of `host_buffer` goes as it is."""
    tensor = torch.from_numpy(rows)
    if device.type == "cuda":
        if not tensor.is_pinned():
            tensor = tensor.pin_memory()
        tensor = tensor.to(device, non_blocking=True)
    return tensor


def stage(
    rows: npt.NDArray[np.integer], layout: DocumentLayout | None, device: torch.device
) -> StagedRows:
    """Return samples and their layout on `device`; token ids travel narrow, and are int64 there."""
    layout = layout or DocumentLayout()
    return StagedRows(
        to_device(rows, device).to(torch.int64),
        None if layout.starts is None else to_device(layout.starts, device),
        None if layout.lengths is None else to_device(layout.lengths, device),
    )


def num_predictions(rows: npt.NDArray[np.integer], layout: DocumentLayout | None) -> int:
    """Return how many predictions all of `rows` have together."""
    if layout is None or layout.lengths is None:
        return rows[:, 1:].size
    return int(np.maximum(layout.lengths.astype(np.int64) - 1, 0).sum())
