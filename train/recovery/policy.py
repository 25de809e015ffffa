"""What to do about a verdict: verdict and history in, decision out. Standard library alone; pure.

Rules, after the practice of those who published theirs:

- `falcon`: back to the latest good checkpoint before the onset, skip an amount of tokens.
- `palm`: back to the good checkpoint nearest to a number of steps before the onset, skip a number
  of batches.
- `none`: watch and record, never act.

Source: Falcon-180B's rule as told in the README of this project; PaLM, arXiv 2204.02311, section
5.1: "roughly 100 steps before the spike started, and skipped roughly 200-500 data batches".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from train.recovery.detector import Verdict


class Rule(StrEnum):
    """Which practice to follow."""

    FALCON = "falcon"
    PALM = "palm"
    NONE = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A good checkpoint that a rewind may go to."""

    name: str
    step: int
    cursor: int


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """What has been done so far: rewinds of the whole run (read off the journal, so they survive
    rewinds and restarts), and whether the device refused the update that the verdict is about.
    """

    num_rewinds: int
    is_vetoed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Limits of a rule: rewinds for the whole run, how far before the onset a target lies, and
    how many refused updates in a row are borne (they did no harm).
    """

    max_rewinds: int
    steps_before_onset: int
    max_vetoes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GoBack:
    """Decision: restore `target` and skip from its cursor on."""

    target: Target
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GiveUp:
    """Decision: stop, and say why."""

    reason: str


def decide(
    rule: Rule, verdict: Verdict, targets: Sequence[Target], history: History, budget: Budget
) -> GoBack | GiveUp | None:
    """Return what the rule does about `verdict`, or None if nothing.

    `targets` are all good checkpoints in any order. Called on all ranks with equal arguments.
    """
    if rule is Rule.NONE or not verdict.needs_rollback:
        return None
    if history.is_vetoed and verdict.step - verdict.onset_step < budget.max_vetoes:
        return None
    what = f"{verdict.kind} at step {verdict.onset_step}, found at step {verdict.step}"
    if history.num_rewinds >= budget.max_rewinds:
        return GiveUp(
            reason=f"{what}; all {budget.max_rewinds} rewinds of the run are used up "
            "(recovery.max_rewinds): look at the incidents in the report, then raise the limit to "
            "go on, or begin another run with a lower optim.lr"
        )
    before = sorted(
        (target for target in targets if target.step < verdict.onset_step),
        key=lambda target: target.step,
    )
    if not before:
        return GiveUp(
            reason=f"{what}; there is no good checkpoint before it to go back to: save earlier "
            "(checkpoint.interval_steps, checkpoint.good_after_steps) or keep the one of step 0 "
            "(checkpoint.save_at_start=true)"
        )
    wanted_step = verdict.onset_step - budget.steps_before_onset
    early = [target for target in before if target.step <= wanted_step]
    target = early[-1] if early else before[0]
    return GoBack(target=target, reason=f"{what}, {verdict.deviation:.1f} sigma over its baseline")
