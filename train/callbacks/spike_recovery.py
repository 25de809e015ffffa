"""Turn a verdict into an action, by the configured rule.

Keeps nothing of its own: what was done comes from the journal, the targets from the catalogue, so
nothing is lost at a restart and nothing is reset by a rewind.
"""

from __future__ import annotations

from train.actions import Action, Note, Rewind, Stop
from train.amounts import Amount
from train.checkpoint.tiers import Tiers
from train.events import Callback, CallbackPhase
from train.recovery.detector import Verdict
from train.recovery.history import RecoveryHistory
from train.recovery.policy import (
    Bear,
    Budget,
    Decision,
    GiveUp,
    GoBack,
    History,
    Rule,
    Rung,
    Target,
    decide,
)
from train.schedule import Schedule
from train.settings import RecoverySettings
from train.signals import StepReport, Update


class SpikeRecovery(Callback):
    """The policy's place in the run."""

    phase = CallbackPhase.DECIDE

    def __init__(
        self,
        settings: RecoverySettings,
        tiers: Tiers,
        schedule: Schedule,
        history: RecoveryHistory,
        sequence_length: int,
    ) -> None:
        self._settings = settings
        self._tiers = tiers
        self._schedule = schedule
        self._history = history
        self._sequence_length = sequence_length
        self._budget = Budget(
            max_rewinds=settings.max_rewinds,
            max_vetoes=settings.max_vetoes,
            max_vetoes_in_a_row=settings.max_vetoes_in_a_row,
            steps_before_onset=settings.scaled_steps(settings.rewind_steps),
            cooldown_steps=settings.scaled_steps(settings.cooldown_steps),
            ladder=settings.ladder,
            growth=settings.growth,
            cool_factor=settings.cool_factor,
        )

    def after_update(self, report: StepReport) -> Action | None:
        """Return what the rule asks for about this step."""
        verdict = report.verdict
        if verdict is None or verdict.is_calm:
            return None
        targets = [
            Target(name=info.name, step=info.step, cursor=info.cursor)
            for info in self._tiers.good()
        ]
        history = History(
            past=self._history.past(),
            num_rewinds=self._history.policy_rewinds(),
            num_vetoes=self._history.num_vetoes,
            is_vetoed=report.update is Update.VETOED,
        )
        decision = decide(self._settings.rule, verdict, targets, history, self._budget)
        if decision is None:
            return None
        if self._settings.rule is Rule.OBSERVE or isinstance(decision, Bear):
            return self._note(decision, verdict, report)
        if isinstance(decision, GiveUp):
            return Stop(
                reason=decision.reason,
                needs_save=False,
                is_failure=True,
                code=decision.code,
                rule=str(self._settings.rule),
                incident=decision.incident,
                attempt=1 + self._history.num_attempts(decision.incident),
                verdict=str(verdict.kind),
                onset_step=verdict.onset_step,
                detected_step=verdict.step,
            )
        return self._rewind(decision, verdict)

    def _rewind(self, decision: GoBack, verdict: Verdict) -> Rewind:
        target = decision.target
        cool_until = verdict.step + self._settings.scaled_steps(self._settings.cool_steps)
        amount = self._settings.scaled(self._settings.skip)
        return Rewind(
            target=target.name,
            target_step=target.step,
            skip_from=target.cursor,
            skip_amount=0
            if decision.skip_factor == 0
            else max(1, round(self._samples(amount, target.step) * decision.skip_factor)),
            margin=self._samples(self._settings.scaled(self._settings.margin), verdict.step),
            rule=str(self._settings.rule),
            rung=decision.rung,
            incident=decision.incident,
            attempt=decision.attempt,
            verdict=str(verdict.kind),
            onset_step=verdict.onset_step,
            detected_step=verdict.step,
            reason=decision.reason,
            lr_scale=decision.lr_scale,
            lr_until_step=cool_until,
            lr_return_step=2 * cool_until - verdict.step,
        )

    def _note(self, decision: Decision, verdict: Verdict, report: StepReport) -> Note:
        is_veto = isinstance(decision, Bear)
        reason = decision.reason
        if isinstance(decision, GoBack):
            reason = f"{reason}; would {decision.rung} from step {decision.target.step}"
        return Note(
            rule=str(self._settings.rule),
            rung=Rung.VETO
            if is_veto
            else decision.rung
            if isinstance(decision, GoBack)
            else Rung.STOP,
            incident=0 if isinstance(decision, Bear) else decision.incident,
            attempt=decision.attempt if isinstance(decision, GoBack) else 1,
            is_observed=not is_veto,
            verdict=str(verdict.kind),
            onset_step=verdict.onset_step,
            detected_step=verdict.step,
            clock=report.state.clock,
            reason=reason,
            code=decision.code if isinstance(decision, GiveUp) else "",
            target=decision.target.name if isinstance(decision, GoBack) else "",
            target_step=decision.target.step if isinstance(decision, GoBack) else 0,
        )

    def _samples(self, amount: Amount, from_step: int) -> int:
        if amount.value == 0:
            return 0
        return self._schedule.amount_in_samples(
            amount, from_step=from_step, sequence_length=self._sequence_length
        )
