"""What each rank knows alone: its samples' losses, whether its loss is a number, its flag.

Shapes: B this rank's samples. Nothing here waits for the device, except `SampleLosses.recent`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from train.distributed import World

NUM_STEPS_KEPT = 32


class SampleLosses:
    """Mean losses in nats a token of this rank's samples in the last steps, on the device."""

    def __init__(self) -> None:
        self._steps: deque[Tensor] = deque(maxlen=NUM_STEPS_KEPT)

    def add(self, sums_B: Sequence[Tensor], *, num_predictions: int | Tensor) -> Tensor:
        """Keep one step's losses, given as sums by micro-batch; return their sum, float64 [1].

        `num_predictions`: that of each sample, or int32 [B], each sample's own. The mean of a
        sample that has none is 0, as its sum is.
        """
        step_B = torch.cat(tuple(sums_B))
        if isinstance(num_predictions, Tensor):
            num_predictions = num_predictions.clamp(min=1)
        self._steps.append(step_B / num_predictions)
        return step_B.double().sum(0, keepdim=True)

    def recent(self) -> list[list[float]]:
        """Return the losses, oldest step first, samples in row order. A host sync."""
        sizes = [len(step_B) for step_B in self._steps]
        flat = torch.cat(tuple(self._steps)).tolist() if sizes else []
        losses = iter(flat)
        return [[next(losses) for _ in range(size)] for size in sizes]

    def drop_last(self) -> None:
        """Forget the last step: it was taken back."""
        self._steps.pop()

    def clear(self) -> None:
        """Forget all steps: the model is no longer the one that made them."""
        self._steps.clear()


def own_signals(loss_sum: Tensor, world: World, *, flag: bool) -> Tensor:
    """Return what the reduce sums into the loss, NUM_BAD_RANKS, BAD_RANK_SUM and IS_FLAGGED.

    `loss_sum`: this rank's own, float64 [1]. Returns float64 [4].
    """
    is_bad = (~torch.isfinite(loss_sum)).double()
    # Filled by a kernel: a copy from the host would wait for the device.
    is_flagged = torch.full_like(loss_sum, float(flag))
    return torch.cat((loss_sum, is_bad, world.rank * is_bad, is_flagged))
