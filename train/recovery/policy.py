"""What to do about a verdict: verdict and history in, decision out. Standard library alone; pure.

Rules, after the practice of those who published theirs:

- `ladder` (the default): climb, one attempt at a time, until the trouble is gone: refuse the
  update; replay the same data once; go back and skip; go further back and skip more; cool the
  learning rate for a while; stop and say what was tried.
- `falcon`: back to the latest good checkpoint before the onset, skip an amount of tokens.
- `palm`: back to the good checkpoint nearest to a number of steps before the onset, skip a number
  of batches.
- `skip_step`: refuse single updates and never go back, as OLMo does.
- `observe`: decide as `ladder` does, write it down, and do nothing.
- `none`: watch, never act.

Attempts at the same trouble are one incident: a verdict belongs to the last incident until
`cooldown_steps` have passed beyond the furthest step at which that was seen.

Source: Falcon-180B's rule as told in the README of this project; PaLM, arXiv 2204.02311, section
5.1: "roughly 100 steps before the spike started, and skipped roughly 200-500 data batches"; replay
first: AdaGC, arXiv 2502.11034, whose authors saw spikes that a plain replay did not bring back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from train.recovery.detector import Verdict, VerdictKind


class Rule(StrEnum):
    """Which practice to follow."""

    LADDER = "ladder"
    FALCON = "falcon"
    PALM = "palm"
    SKIP_STEP = "skip_step"
    OBSERVE = "observe"
    NONE = "none"


class Rung(StrEnum):
    """What one attempt does. `accept` is never listed: the ladder sees for itself that it is due.
    The last three are an operator's.
    """

    VETO = "veto"
    REPLAY = "replay"
    SKIP = "skip"
    SKIP_FURTHER = "skip_further"
    COOL = "cool"
    ACCEPT = "accept"
    STOP = "stop"
    REWIND = "rewind"
    SKIP_AHEAD = "skip_ahead"
    UNSKIP = "unskip"


LISTED_RUNGS = frozenset({Rung.REPLAY, Rung.SKIP, Rung.SKIP_FURTHER, Rung.COOL})
LADDER_RUNGS = LISTED_RUNGS | {Rung.ACCEPT}
# The onset of what comes at once is found that many steps after the target, at most.
_AT_ONCE_STEPS = 4
_SKIPPING = frozenset({Rung.SKIP, Rung.SKIP_FURTHER})
_RULES_THAT_REFUSE = frozenset({Rule.LADDER, Rule.SKIP_STEP})
# A drift is in the state by the time that it is seen, so the same data would only repeat it.
_POINTLESS = {VerdictKind.DIVERGENCE: frozenset({Rung.REPLAY})}


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A good state, in memory or on disk, that a rewind may go to."""

    name: str
    step: int
    cursor: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Past:
    """One thing that recovery did before, as the journal has it."""

    incident: int
    rung: Rung
    onset_step: int
    detected_step: int
    target_step: int
    is_observed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """What has been done so far, oldest first (read off the journal, so it survives rewinds and
    restarts), and whether the device refused the update that the verdict is about.
    """

    past: Sequence[Past] = ()
    num_rewinds: int = 0
    num_vetoes: int = 0
    is_vetoed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Limits of a rule.

    Of a run: `max_rewinds`, `max_vetoes`. Of an incident: the attempts of `ladder`, in order;
    `max_vetoes_in_a_row`, refused updates that are borne (they did no harm). `steps_before_onset`:
    how far before the onset a target lies. `growth`: by how much each further attempt goes back
    and skips more. `cool_factor`: what the learning rate is multiplied by.
    """

    max_rewinds: int
    max_vetoes: int
    max_vetoes_in_a_row: int
    steps_before_onset: int
    cooldown_steps: int
    ladder: Sequence[Rung]
    growth: float
    cool_factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GoBack:
    """Decision: restore `target`, skip `skip_factor` times the rule's amount from its cursor on,
    and multiply the learning rate by `lr_scale` for a while.
    """

    target: Target
    incident: int
    attempt: int
    rung: Rung
    reason: str
    skip_factor: float = 1.0
    lr_scale: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Bear:
    """Decision: the refused update did no harm; write it down, for the budget, and go on."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GiveUp:
    """Decision: stop, and say why."""

    incident: int
    code: str
    reason: str


Decision = GoBack | Bear | GiveUp


def decide(
    rule: Rule, verdict: Verdict, targets: Sequence[Target], history: History, budget: Budget
) -> Decision | None:
    """Return what the rule does about `verdict`, or None if nothing.

    `targets` are all good states in any order. Called on all ranks with equal arguments. What
    `observe` returns is to be written down alone.
    """
    if rule is Rule.NONE:
        return None
    if rule is Rule.OBSERVE:
        return _observe(verdict, targets, history, budget)
    if history.is_vetoed and rule in _RULES_THAT_REFUSE and not verdict.is_calm:
        is_short = verdict.step - verdict.onset_step < budget.max_vetoes_in_a_row
        if is_short and history.num_vetoes < budget.max_vetoes:
            return Bear(reason=f"{describe(verdict)}; its update was refused")
    elif history.is_vetoed and verdict.step - verdict.onset_step < budget.max_vetoes_in_a_row:
        return None
    if rule is Rule.SKIP_STEP:
        return _skip_step(verdict, history, budget)
    if not verdict.needs_rollback:
        return None
    if rule is Rule.LADDER:
        return _climb(verdict, targets, history, budget)
    return _same_each_time(rule, verdict, targets, history, budget)


def describe(verdict: Verdict) -> str:
    """Return the verdict in words, for reasons."""
    words = f"{verdict.kind} at step {verdict.onset_step}, found at step {verdict.step}"
    if math.isfinite(verdict.deviation) and verdict.deviation > 0:
        words += f", {verdict.deviation:.1f} sigma over its baseline"
    if verdict.led_by != "loss" and verdict.lead_steps > 0:
        words += f", {verdict.led_by} led by {verdict.lead_steps}"
    return words


def _incident(
    verdict: Verdict, past: Sequence[Past], budget: Budget, *, is_observing: bool = False
) -> tuple[int, list[Past]]:
    """Return the number of the incident that a verdict belongs to, and its attempts so far.

    What was merely observed is an attempt for whoever observes, and for no one else.
    """
    last = max((entry.incident for entry in past), default=0)
    own = [
        entry
        for entry in past
        if entry.incident == last
        and entry.is_observed == is_observing
        and entry.rung in {*LADDER_RUNGS, Rung.STOP}
    ]
    furthest = max((entry.detected_step for entry in own), default=0)
    if own and verdict.onset_step <= furthest + budget.cooldown_steps:
        # A stop belongs to its incident; for whoever observes it is a decision like any other.
        return last, [entry for entry in own if is_observing or entry.rung is not Rung.STOP]
    return last + 1, []


def _climb(
    verdict: Verdict, targets: Sequence[Target], history: History, budget: Budget
) -> Decision:
    incident, rewinds = _incident(verdict, history.past, budget)
    rungs = [
        rung for rung in budget.ladder if rung not in _POINTLESS.get(verdict.kind, frozenset())
    ]
    if verdict.kind is VerdictKind.RESUME_DISCONTINUITY:
        # First of all an older state, whatever the ladder lists; no data are to blame for it.
        rungs = [Rung.REPLAY, *(rung for rung in budget.ladder if rung is not Rung.REPLAY)]
    done = [entry.rung for entry in rewinds if entry.rung in rungs]
    left = rungs[len(done) :]
    if _is_new_level(verdict, rewinds) and not _SKIPPING & set(left):
        left = [Rung.ACCEPT, *left]
    if not left:
        tried = ", ".join(entry.rung for entry in rewinds) or "nothing that could help"
        return GiveUp(
            incident=incident,
            code="ladder_exhausted",
            reason=f"{describe(verdict)}; tried for incident {incident}: {tried}; the ladder ends "
            "here (recovery.ladder): look at its capsule and at `trimtab replay`, then lower "
            "optim.lr, or clean the data, or add an attempt to the ladder and start again; if a "
            f"new level was meant to begin there, recovery.announced=[{verdict.onset_step}]",
        )
    rung = left[0]
    onset = min([verdict.onset_step, *(entry.onset_step for entry in rewinds)])
    num_skips = sum(entry.rung in _SKIPPING for entry in rewinds)
    steps_back = 0
    if rung is Rung.SKIP_FURTHER:
        num_further = sum(entry.rung is Rung.SKIP_FURTHER for entry in rewinds)
        steps_back = round(budget.steps_before_onset * budget.growth**num_further)
    num_cools = sum(entry.rung is Rung.COOL for entry in rewinds)
    return _go_back(
        verdict,
        targets,
        history,
        budget,
        incident=incident,
        attempt=len(rewinds) + 1,
        rung=rung,
        wanted_step=onset - 1 - steps_back,
        # Going further means further than before, whatever the distance in steps.
        below=min((entry.target_step for entry in rewinds), default=onset)
        if rung is Rung.SKIP_FURTHER
        else onset,
        # Once it comes to cooling, other data have not helped: none are skipped for it.
        skip_factor=budget.growth**num_skips if rung in _SKIPPING else 0.0,
        lr_scale=budget.cool_factor ** (num_cools + 1) if rung is Rung.COOL else 1.0,
    )


def _is_new_level(verdict: Verdict, rewinds: Sequence[Past]) -> bool:
    """True if other data, further on each time, met a sound state with the same trouble at once.

    Then it is not in the state, which was sound before, nor in a stretch of the data: from there
    on, all of them are different. What is keyed to the step, such as a learning rate that is too
    high, begins where it began before, however far back the run goes.
    """
    further = [entry for entry in rewinds if entry.rung in _SKIPPING][-2:]
    if len(further) < 2 or any(entry.rung is Rung.ACCEPT for entry in rewinds):
        return False
    onsets = [further[1].onset_step, verdict.onset_step]
    first_onset = rewinds[0].onset_step
    return (
        rewinds[-1] is further[1]
        and verdict.kind in (VerdictKind.SPIKE, VerdictKind.DIVERGENCE)
        and all(
            onset <= entry.target_step + _AT_ONCE_STEPS
            for onset, entry in zip(onsets, further, strict=True)
        )
        and verdict.onset_step < first_onset - 1
    )


def _same_each_time(
    rule: Rule,
    verdict: Verdict,
    targets: Sequence[Target],
    history: History,
    budget: Budget,
) -> Decision:
    incident, attempts = _incident(verdict, history.past, budget)
    steps_back = budget.steps_before_onset
    is_replaced = verdict.kind is VerdictKind.RESUME_DISCONTINUITY
    return _go_back(
        verdict,
        targets,
        history,
        budget,
        incident=incident,
        attempt=len(attempts) + 1,
        rung=Rung.REPLAY if is_replaced else Rung.SKIP,
        wanted_step=verdict.onset_step - max(1, steps_back),
        below=verdict.onset_step,
        skip_factor=0.0 if is_replaced else 1.0,
        lr_scale=1.0,
    )


def _go_back(
    verdict: Verdict,
    targets: Sequence[Target],
    history: History,
    budget: Budget,
    *,
    incident: int,
    attempt: int,
    rung: Rung,
    wanted_step: int,
    below: int,
    skip_factor: float,
    lr_scale: float,
) -> Decision:
    """Return the rewind to the youngest target at or before `wanted_step` and before `below`."""
    if history.num_rewinds >= budget.max_rewinds:
        return GiveUp(
            incident=incident,
            code="rewinds_used_up",
            reason=f"{describe(verdict)}; all {budget.max_rewinds} rewinds of the run are used up "
            "(recovery.max_rewinds): look at the incidents in the report, then raise the limit to "
            "go on, or begin another run with a lower optim.lr",
        )
    # A resume that went wrong goes on from the step before its onset: that state is the bad one.
    is_replaced = verdict.kind is VerdictKind.RESUME_DISCONTINUITY
    newest = verdict.onset_step - (1 if is_replaced else 0)
    before = sorted(
        (target for target in targets if target.step < newest), key=lambda target: target.step
    )
    if not before and not is_replaced:
        # The onset is an estimate, and a late one of what came slowly: the oldest is the best.
        oldest = sorted(targets, key=lambda target: target.step)[:1]
        before = [target for target in oldest if target.step < verdict.step]
    if not before:
        return GiveUp(
            incident=incident,
            code="no_good_checkpoint",
            reason=f"{describe(verdict)}; there is no good checkpoint before it to go back to: "
            "save earlier (checkpoint.interval_steps, checkpoint.good_after_steps), keep more "
            "(checkpoint.keep_good), or keep the one of step 0 (checkpoint.save_at_start=true)",
        )
    wanted = [target for target in before if target.step <= wanted_step and target.step < below]
    return GoBack(
        target=wanted[-1] if wanted else before[0],
        incident=incident,
        attempt=attempt,
        rung=rung,
        reason=describe(verdict),
        skip_factor=skip_factor,
        lr_scale=lr_scale,
    )


def _skip_step(verdict: Verdict, history: History, budget: Budget) -> Decision | None:
    """Give up only where refusing can no longer help: it would freeze the run without an end."""
    incident, _ = _incident(verdict, history.past, budget)
    if history.is_vetoed and history.num_vetoes >= budget.max_vetoes:
        return GiveUp(
            incident=incident,
            code="vetoes_used_up",
            reason=f"{describe(verdict)}; all {budget.max_vetoes} refused updates of the run are "
            "used up (recovery.max_vetoes); use recovery=ladder, which can go back, or raise it",
        )
    if history.is_vetoed and verdict.kind is VerdictKind.NONFINITE:
        return GiveUp(
            incident=incident,
            code="nonfinite_in_a_row",
            reason=f"{describe(verdict)}; {budget.max_vetoes_in_a_row} updates in a row were not "
            "finite, and recovery=skip_step never goes back; use recovery=ladder",
        )
    return None


def _observe(
    verdict: Verdict, targets: Sequence[Target], history: History, budget: Budget
) -> Decision | None:
    """Return what `ladder` would begin with; one decision an incident, since nothing changes."""
    if not verdict.needs_rollback:
        return None
    _, attempts = _incident(verdict, history.past, budget, is_observing=True)
    if attempts:
        return None
    return _climb(verdict, targets, history, budget)
