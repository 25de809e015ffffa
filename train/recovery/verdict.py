"""What the detector says of a step.

Owns the kinds of verdict and which of them are calm or need a rollback. Refuses everything else.
Imported from `train.recovery.detector` by those who act on verdicts.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class VerdictKind(StrEnum):
    """What a step is."""

    WARMUP = "warmup"
    OK = "ok"
    OUTLIER = "outlier"
    SPIKE = "spike"
    DIVERGENCE = "divergence"
    LEVEL_SHIFT = "level_shift"
    NONFINITE = "nonfinite"
    SUSPICIOUSLY_LOW = "suspiciously_low"
    RESUME_DISCONTINUITY = "resume_discontinuity"


CALM_KINDS = frozenset({VerdictKind.OK, VerdictKind.WARMUP, VerdictKind.LEVEL_SHIFT})
ROLLBACK_KINDS = frozenset(
    {
        VerdictKind.SPIKE,
        VerdictKind.DIVERGENCE,
        VerdictKind.NONFINITE,
        VerdictKind.RESUME_DISCONTINUITY,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The judgement of one step.

    `onset_step` is the first step of the stretch that this step belongs to. `deviation` is in
    robust standard deviations of the log loss above `baseline_nats`; `sigma` is that standard
    deviation. `led_by` names the signal that left its band first ("loss", "grad_norm",
    "update_norm", or "grad_norm/3" for a layer group), `lead_steps` by how many steps.
    """

    kind: VerdictKind
    step: int
    onset_step: int
    deviation: float = 0.0
    baseline_nats: float | None = None
    sigma: float = 0.0
    led_by: str = "loss"
    lead_steps: int = 0

    @property
    def is_calm(self) -> bool:
        """True if nothing is wrong with the step."""
        return self.kind in CALM_KINDS

    @property
    def needs_rollback(self) -> bool:
        """True if a veto of one update is not enough."""
        return self.kind in ROLLBACK_KINDS
