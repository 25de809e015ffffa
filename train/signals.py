"""What a step tells the host: `StepSignals`, `StepReport`, and the `Gate` that the device obeys.

The engine fills one small vector on the device, in the layout below, after its one fused reduce.
The loop copies it without waiting and turns it into a report one step later.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from train.recovery.detector import Verdict
from train.state import TrainState

# Layout of the device vector; the norms of the parameter groups follow.
LOSS, GRAD_NORM, IS_VETOED = range(3)
NUM_FIXED_SIGNALS = 3


class Update(StrEnum):
    """What became of an update."""

    APPLIED = "applied"
    VETOED = "vetoed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """Limits that the device compares with before it updates; infinity lets all finite values in.

    A non-finite loss or gradient norm never passes, whatever the limits.
    """

    max_loss_nats: float = math.inf
    max_grad_norm: float = math.inf

    def tighter(self, other: Gate) -> Gate:
        """Return the gate that lets in only what both let in."""
        return Gate(
            max_loss_nats=min(self.max_loss_nats, other.max_loss_nats),
            max_grad_norm=min(self.max_grad_norm, other.max_grad_norm),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSignals:
    """Global values of one step, equal on all ranks: mean loss in nats a token, gradient norms."""

    loss_nats: float
    grad_norm: float
    is_vetoed: bool
    group_norms: tuple[float, ...] = ()

    @property
    def is_finite(self) -> bool:
        """True if both the loss and the gradient norm are finite."""
        return math.isfinite(self.loss_nats) and math.isfinite(self.grad_norm)

    @classmethod
    def from_vector(cls, values: Sequence[float]) -> StepSignals:
        """Read the layout at the top of this module."""
        return cls(
            loss_nats=values[LOSS],
            grad_norm=values[GRAD_NORM],
            is_vetoed=values[IS_VETOED] != 0.0,
            group_norms=tuple(values[NUM_FIXED_SIGNALS:]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One finished step as callbacks see it: frozen facts.

    `state` is the state after the step. `data_seconds` is what the step waited for data.
    `finished_unix_seconds` is when it ended, not when it was reported. `verdict` is None until the
    OBSERVE phase has run.
    """

    state: TrainState
    signals: StepSignals
    lr: float
    num_samples: int
    num_tokens: int
    step_seconds: float
    data_seconds: float
    finished_unix_seconds: float
    verdict: Verdict | None = None

    @property
    def update(self) -> Update:
        """Whether the optimizer took the update."""
        return Update.VETOED if self.signals.is_vetoed else Update.APPLIED
