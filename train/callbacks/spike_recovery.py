"""Turn a verdict into a rewind, by the configured rule.

Keeps nothing of its own: the number of rewinds comes with the state, the targets from the
catalogue, so nothing is lost at a restart and nothing is reset by a rewind.
"""

from __future__ import annotations

from train.actions import Action, Rewind, Stop
from train.checkpoint.info import Health
from train.checkpoint.store import CheckpointStore
from train.events import Callback, CallbackPhase
from train.recovery.policy import Budget, GiveUp, History, Target, decide
from train.schedule import Schedule
from train.settings import RecoverySettings
from train.signals import StepReport, Update


class SpikeRecovery(Callback):
    """The policy's place in the run."""

    phase = CallbackPhase.DECIDE

    def __init__(
        self,
        settings: RecoverySettings,
        store: CheckpointStore,
        schedule: Schedule,
        sequence_length: int,
    ) -> None:
        self._settings = settings
        self._store = store
        self._schedule = schedule
        self._sequence_length = sequence_length
        self._budget = Budget(
            max_rewinds=settings.max_rewinds,
            steps_before_onset=settings.scaled_rewind_steps(),
            max_vetoes=settings.persistence_steps,
        )

    def after_update(self, report: StepReport) -> Action | None:
        """Return a rewind or a stop if the rule asks for one."""
        verdict = report.verdict
        if verdict is None:
            return None
        targets = [
            Target(name=info.name, step=info.step, cursor=info.cursor)
            for info in self._store.trusted(Health.GOOD)
        ]
        history = History(
            num_rewinds=report.state.rewinds, is_vetoed=report.update is Update.VETOED
        )
        decision = decide(self._settings.rule, verdict, targets, history, self._budget)
        if decision is None:
            return None
        if isinstance(decision, GiveUp):
            return Stop(reason=decision.reason, needs_save=False, is_failure=True)
        amount = self._schedule.amount_in_samples(
            self._settings.scaled_skip(),
            from_step=decision.target.step,
            sequence_length=self._sequence_length,
        )
        return Rewind(
            target=decision.target.name,
            target_step=decision.target.step,
            skip_from=decision.target.cursor,
            skip_amount=amount,
            rule=str(self._settings.rule),
            verdict=str(verdict.kind),
            onset_step=verdict.onset_step,
            detected_step=verdict.step,
            reason=decision.reason,
        )
