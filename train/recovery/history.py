"""What recovery has done in a run: the journal in memory, equal on all ranks.

Everything that must survive a rewind and a restart is read off it: budgets, skips, returned
samples, cooled learning rates. It changes only when a record has become durable.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from train.recovery.journal import Incident, Phase
from train.recovery.policy import LADDER_RUNGS, Past, Rung
from train.state import BatchRange


@dataclass(frozen=True, slots=True, kw_only=True)
class Cooling:
    """The learning rate times `scale` for steps in `[from_step, until_step)`, then back to the
    whole of it, linearly, at `return_step`.
    """

    scale: float
    from_step: int
    until_step: int
    return_step: int

    def factor_at(self, step: int) -> float:
        """Return what the learning rate of `step` is multiplied by."""
        if step < self.from_step or step >= self.return_step:
            return 1.0
        if step < self.until_step:
            return self.scale
        progress = (step - self.until_step) / (self.return_step - self.until_step)
        return self.scale + (1.0 - self.scale) * progress


class RecoveryHistory:
    """The records of a run in the order in which they became durable."""

    def __init__(self, records: Iterable[Incident] = ()) -> None:
        self.replace(records)

    def add(self, record: Incident) -> None:
        """Take up a record that has become durable."""
        self.replace([*self._records, record])

    def replace(self, records: Iterable[Incident]) -> None:
        """Take up the whole journal, as at a start."""
        self._records = list(records)
        self.num_vetoes = sum(record.rung is Rung.VETO for record in self.done)
        """Refused updates that were written down; read before every step."""
        self.accepted_steps = {r.lr_from_step for r in self.done if r.rung is Rung.ACCEPT}
        """From here on, a new level is no trouble."""
        self.coolings = [
            Cooling(
                scale=record.lr_scale,
                from_step=record.lr_from_step,
                until_step=record.lr_until_step,
                return_step=record.lr_return_step,
            )
            for record in self.done
            if record.lr_scale != 1.0
        ]

    @property
    def records(self) -> tuple[Incident, ...]:
        """All records, oldest first."""
        return tuple(self._records)

    @property
    def done(self) -> list[Incident]:
        """What was really done, without intents and without what was merely observed."""
        return [record for record in self._records if record.phase is Phase.DONE]

    @property
    def num_rewinds(self) -> int:
        """Rewinds of the whole run, an operator's among them."""
        return sum(record.is_rewind for record in self.done)

    @property
    def last_incident(self) -> int:
        """The highest number of an incident so far, 0 if there was none."""
        return max((record.incident for record in self._records), default=0)

    @property
    def clock(self) -> int:
        """Where the clock stood when the last rewind began; a run never goes below it."""
        return max((record.clock for record in self.done if record.is_rewind), default=0)

    def past(self) -> list[Past]:
        """Return the attempts as the policy sees them; what was observed counts as tried."""
        return [
            Past(
                incident=record.incident,
                rung=record.rung,
                onset_step=record.onset_step,
                detected_step=record.detected_step,
                target_step=record.target_step,
                is_observed=record.phase is Phase.OBSERVED,
            )
            for record in self._records
            if record.phase is not Phase.INTENT and record.rung is not Rung.VETO
        ]

    def num_attempts(self, incident: int) -> int:
        """Return how many rewinds an incident has had."""
        return sum(record.is_rewind and record.incident == incident for record in self.done)

    def policy_rewinds(self) -> int:
        """Rewinds that count against the budget: not those that a person asked for."""
        return sum(record.is_rewind and record.rung in LADDER_RUNGS for record in self.done)

    def skips(self) -> list[BatchRange]:
        """Return all ranges to skip, those of a rewind that is not finished among them."""
        return [record.skip_range for record in self._records if record.phase is not Phase.OBSERVED]

    def returns(self) -> list[tuple[int, int, int]]:
        """Return what was put back: `(position, start, stop)` each, in order."""
        return [record.returned for record in self.done if record.returned is not None]

    def lr_factor_at(self, step: int) -> float:
        """Return what the learning rate of `step` is multiplied by: the lowest that holds."""
        return min((cooling.factor_at(step) for cooling in self.coolings), default=1.0)

    def is_veto_known(self, clock: int, step: int) -> bool:
        """True if the refused update was written down before a crash."""
        return any(
            r.rung is Rung.VETO and (r.clock, r.detected_step) == (clock, step)
            for r in self._records
        )

    def is_observed(self, incident: int) -> bool:
        """True if it is written down what would have been done about an incident."""
        return any(r.phase is Phase.OBSERVED and r.incident == incident for r in self._records)

    def is_request_known(self, request: str) -> bool:
        """True if an operator's request was fulfilled before a crash."""
        return any(record.request == request for record in self.done)

    def kept_checkpoints(self, num_incidents: int) -> frozenset[str]:
        """Return the checkpoints that attribution of the last incidents will need."""
        numbers = sorted({r.incident for r in self._records if r.kept})[-num_incidents:]
        if num_incidents <= 0:
            return frozenset()
        return frozenset(
            name for record in self._records if record.incident in numbers for name in record.kept
        )
