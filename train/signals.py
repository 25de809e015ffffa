"""What a step tells the host: `StepSignals`, `StepReport`, and the `Gate` that the device obeys.

The engine fills one small vector on the device, in the layout below, after its one fused reduce.
The loop copies it without waiting and turns it into a report one step later. A slot that an engine
cannot fill is NaN, and reads as None.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from train.recovery.detector import Verdict
from train.state import TrainState

# Layout of the device vector; the norms of the parameter groups follow.
(
    LOSS,
    GRAD_NORM,
    UPDATE_NORM,
    NONFINITE_SHARE,
    NUM_BAD_RANKS,
    BAD_RANK_SUM,
    IS_FLAGGED,
    IS_VETOED,
) = range(8)
NUM_FIXED_SIGNALS = 8


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
    """Global values of one step, equal on all ranks.

    `loss_nats`: mean loss a token. `grad_norm`: before clipping; `group_norms` by parameter group.
    `update_norm`: of the last update that was applied *before* this step, weight decay left out
    (it rides in this step's reduce), at the learning rate that was set last; infinite if the
    optimizer's state holds a NaN. `nonfinite_share`: share of the gradient values that lie in
    tensors with a non-finite norm. `num_bad_ranks`: ranks whose own loss was not finite;
    `bad_rank` names it if it was one alone. `is_flagged`: a rank asked for the attention of all.
    """

    loss_nats: float
    grad_norm: float
    is_vetoed: bool
    update_norm: float | None = None
    nonfinite_share: float | None = None
    num_bad_ranks: int = 0
    bad_rank: int | None = None
    is_flagged: bool = False
    group_norms: tuple[float, ...] = ()

    @property
    def is_finite(self) -> bool:
        """True if both the loss and the gradient norm are finite."""
        return math.isfinite(self.loss_nats) and math.isfinite(self.grad_norm)

    @classmethod
    def from_vector(cls, values: Sequence[float]) -> StepSignals:
        """Read the layout at the top of this module."""
        num_bad_ranks = int(values[NUM_BAD_RANKS])
        return cls(
            loss_nats=values[LOSS],
            grad_norm=values[GRAD_NORM],
            is_vetoed=values[IS_VETOED] != 0.0,
            update_norm=_known(values[UPDATE_NORM]),
            nonfinite_share=_known(values[NONFINITE_SHARE]),
            num_bad_ranks=num_bad_ranks,
            bad_rank=int(values[BAD_RANK_SUM]) if num_bad_ranks == 1 else None,
            is_flagged=values[IS_FLAGGED] != 0.0,
            group_norms=tuple(values[NUM_FIXED_SIGNALS:]),
        )


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One finished step as callbacks see it: frozen facts.

    `state` is the state after the step. `data_seconds` is what the step waited for data.
    `finished_unix_seconds` is when it ended, not when it was reported; `finished_uptime_seconds`
    the same in seconds since the host booted, which nobody can set. `compile_seconds` is what of
    `step_seconds` torch.compile took. `gate` is what let the update through or refused it.
    `verdict` is None until the OBSERVE phase has run.
    """

    state: TrainState
    signals: StepSignals
    lr: float
    num_samples: int
    num_tokens: int
    step_seconds: float
    data_seconds: float
    finished_unix_seconds: float
    finished_uptime_seconds: float | None = None
    compile_seconds: float = 0.0
    verdict: Verdict | None = None
    gate: Gate = Gate()

    @property
    def update(self) -> Update:
        """Whether the optimizer took the update."""
        return Update.VETOED if self.signals.is_vetoed else Update.APPLIED
