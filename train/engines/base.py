"""The engine protocol: what the loop needs of a model that is spread over processes.

An engine owns parameters, moments and their device; it knows nothing of schedules, data order,
checkpoint folders or recovery. All methods are collectives unless they say otherwise: call them on
all ranks in the same order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from train.signals import Gate


class Engine(Protocol):
    """One model, its optimizer, and a way to step them."""

    name: str
    can_veto: bool
    """Whether a bad update can be refused on the device."""
    checkpoint_format: str
    """Engines of the same format read each other's checkpoints."""
    num_parameters: int
    group_names: tuple[str, ...]
    """Names of the parameter groups whose gradient norms `step` reports."""

    def step(
        self, rows: npt.NDArray[np.integer], *, num_tokens: int, lr: float, gate: Gate
    ) -> Tensor:
        """Forward, backward, one fused reduce, gated update; no host sync.

        `rows`: this rank's samples, [n, T + 1]. `num_tokens`: predictions of the global batch.
        Returns the signal vector (see `signals.py`), float64, on the device.
        """

    def evaluate(self, rows: npt.NDArray[np.integer]) -> float:
        """Return the mean loss in nats a token of `rows`, which are equal on all ranks.

        A host sync.
        """

    def save(self, folder: Path) -> None:
        """Write parameters and optimizer state into `folder`, which exists."""

    def load(self, folder: Path) -> None:
        """Take up what `save` wrote, from any number of ranks if the format allows."""
