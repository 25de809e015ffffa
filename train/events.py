"""Callbacks and their dispatch. The order of calls is the story of a run:

    on_run_start
    while training:
        gate()                              before each update, the tightest one holds
        needs_current(step)                 True asks for a report now instead of one step late
        after_update(report)                OBSERVE: a verdict; DECIDE, PERSIST: an action
        on_note(note, state)                what was borne or observed, now in the journal
        on_snapshot_taken, on_checkpoint_saved, on_checkpoint_failed
        on_rewind(incident, state)          own state was restored before
        on_ledger_change(incident, state)   an operator's skip or return
        on_evaluation(evaluation, state)    held-out losses, on their schedule and at the end
        on_integrity_check(check, found)    replicas were compared, or a step executed twice
        on_alert(alert, state)              something that a person should know of
    on_run_end(summary)
    close                                   in reverse order, whatever happened

Callbacks see frozen facts and return typed actions; only the loop acts. They hold no engine and
call no collective, but for the one that agrees on an automatic interval of saves. Their order is a
phase, then a name: the same on every rank. A callback that fails in REPORT is logged; one that
fails elsewhere stops the run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import TypeVar

from train.actions import Action, Note
from train.checkpoint.info import CheckpointInfo
from train.data.validation import Evaluation
from train.health.corruption import Check, Corruption
from train.recovery.detector import Verdict
from train.recovery.journal import Incident
from train.signals import Gate, StepReport
from train.state import TrainState

logger = logging.getLogger(__name__)

T = TypeVar("T")


class CallbackPhase(IntEnum):
    """When a callback runs."""

    OBSERVE = 0
    DECIDE = 1
    PERSIST = 2
    REPORT = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStart:
    """What callbacks are told when a run starts or is taken up again.

    `is_sound`: whether the loss after the resume should continue the loss before it; False if what
    follows is known to be troubled, or if the resume itself finished a rewind. `is_changed`: taken
    up with settings that change what is learnt, so a new level of the loss is no trouble.
    """

    name: str
    state: TrainState
    last_step: int
    num_parameters: int
    is_resumed: bool
    is_sound: bool = True
    is_changed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """Something that a person should know of; `fields` go into the timeline."""

    kind: str
    text: str
    short: str
    fields: Mapping[str, object]


class Callback:
    """Base of all callbacks; override what you need."""

    phase = CallbackPhase.OBSERVE
    is_main_only = False
    """True to run on rank 0 alone; for callbacks that return nothing."""

    @property
    def name(self) -> str:
        """Name within the phase's order and in checkpoints."""
        return type(self).__name__

    def on_run_start(self, start: RunStart) -> None:
        """Run once, before the first step."""

    def gate(self) -> Gate | None:
        """Return limits for the next update, or None."""
        return None

    def needs_current(self, step: int) -> bool:
        """Return True if the report of `step` is needed before the next one starts (host sync)."""
        del step
        return False

    def after_update(self, report: StepReport) -> Action | Verdict | None:
        """Judge (OBSERVE) or ask for an action (other phases)."""

    def on_note(self, note: Note, state: TrainState) -> None:
        """Take note of what was borne or observed."""

    def on_snapshot_taken(self, state: TrainState, seconds: float) -> None:
        """Take note of a snapshot in memory, and of the seconds that the step waited for it."""

    def on_checkpoint_saved(
        self, info: CheckpointInfo, seconds: float, background_seconds: float
    ) -> None:
        """Take note of a durable checkpoint, of the seconds that training waited for it, and of
        those between that and now, in which it was written beside training.
        """

    def on_checkpoint_failed(self, step: int, reason: str, seconds: float) -> None:
        """Take note of a checkpoint that could not be written, and what the loop waited for it."""

    def on_rewind(self, incident: Incident, state: TrainState, seconds: float) -> None:
        """Take note of a finished rewind; own state was restored before."""

    def on_ledger_change(self, incident: Incident, state: TrainState) -> None:
        """Take note of samples that an operator skipped or put back."""

    def on_evaluation(self, evaluation: Evaluation, state: TrainState, seconds: float) -> None:
        """Take note of the held-out losses of a state, and of how long they took."""

    def on_integrity_check(
        self, check: Check, found: Corruption | None, state: TrainState, seconds: float
    ) -> None:
        """Take note of a search for silent corruption, and of what it found, if anything."""

    def on_alert(self, alert: Alert, state: TrainState) -> None:
        """Take note of something that a person should know of."""

    def on_run_end(self, summary: Mapping[str, object]) -> None:
        """Run once after the last step."""

    def close(self) -> None:
        """Free what is held; runs even after an error."""

    def state_dict(self) -> dict[str, object]:
        """Return what belongs in a checkpoint, as JSON values."""
        return {}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take up what `state_dict` returned."""


class Events:
    """The callbacks of a run, in order."""

    def __init__(self, callbacks: Sequence[Callback], *, is_main: bool) -> None:
        chosen = [callback for callback in callbacks if is_main or not callback.is_main_only]
        self._callbacks = sorted(chosen, key=lambda callback: (callback.phase, callback.name))

    def describe(self) -> str:
        """Return the order, for the log."""
        return ", ".join(f"{c.phase.name.lower()}:{c.name}" for c in self._callbacks)

    def gate(self) -> Gate:
        """Return the tightest gate of all."""
        tightest = Gate()
        for callback in self._callbacks:
            gate = callback.gate()
            tightest = tightest if gate is None else tightest.tighter(gate)
        return tightest

    def needs_current(self, step: int) -> bool:
        """True if any callback needs the report of `step` at once."""
        return any(callback.needs_current(step) for callback in self._callbacks)

    def after_update(self, report: StepReport) -> list[Action]:
        """Show a report to all callbacks and return what they ask for, in order."""
        actions: list[Action] = []
        for callback in self._callbacks:
            answer = self._call(callback, lambda c: c.after_update(report))  # noqa: B023 - at once
            if isinstance(answer, Verdict):
                report = replace(report, verdict=answer)
            elif isinstance(answer, Action):
                actions.append(answer)
        return actions

    def run_start(self, start: RunStart) -> None:
        """Tell all callbacks."""
        self._tell(lambda callback: callback.on_run_start(start))

    def noted(self, note: Note, state: TrainState) -> None:
        """Tell all callbacks."""
        self._tell(lambda callback: callback.on_note(note, state))

    def ledger_changed(self, incident: Incident, state: TrainState) -> None:
        """Tell all callbacks."""
        self._tell(lambda callback: callback.on_ledger_change(incident, state))

    def evaluated(self, evaluation: Evaluation, state: TrainState, seconds: float) -> None:
        """Tell all callbacks."""
        self._tell(lambda callback: callback.on_evaluation(evaluation, state, seconds))

    def integrity_checked(
        self, check: Check, found: Corruption | None, state: TrainState, seconds: float
    ) -> None:
        """Tell all callbacks."""
        self._tell(lambda callback: callback.on_integrity_check(check, found, state, seconds))

    def alerted(self, alert: Alert, state: TrainState) -> None:
        """Tell all callbacks."""
        self._tell(lambda callback: callback.on_alert(alert, state))

    def snapshot_taken(self, state: TrainState, seconds: float) -> None:
        """Tell all callbacks."""
        self._tell(lambda callback: callback.on_snapshot_taken(state, seconds))

    def checkpoint_saved(
        self, info: CheckpointInfo, seconds: float, background_seconds: float = 0.0
    ) -> None:
        """Tell all callbacks."""
        self._tell(lambda callback: callback.on_checkpoint_saved(info, seconds, background_seconds))

    def checkpoint_failed(self, step: int, reason: str, seconds: float) -> None:
        """Tell all callbacks."""
        self._tell(lambda callback: callback.on_checkpoint_failed(step, reason, seconds))

    def rewound(self, incident: Incident, state: TrainState, seconds: float) -> None:
        """Tell all callbacks."""
        self._tell(lambda callback: callback.on_rewind(incident, state, seconds))

    def run_end(self, summary: Mapping[str, object]) -> None:
        """Tell all callbacks, in reverse order."""
        for callback in reversed(self._callbacks):
            self._call(callback, lambda c: c.on_run_end(summary))

    def close(self) -> None:
        """Close all callbacks in reverse order; one that fails does not keep the others open."""
        for callback in reversed(self._callbacks):
            try:
                callback.close()
            except Exception:
                logger.exception("%s could not be closed", callback.name)

    def state_dict(self) -> dict[str, dict[str, object]]:
        """Return the state of all callbacks that have some; equal on all ranks."""
        states = {
            callback.name: callback.state_dict()
            for callback in self._callbacks
            if not callback.is_main_only
        }
        return {name: state for name, state in states.items() if state}

    def load_state_dict(self, states: Mapping[str, Mapping[str, object]]) -> None:
        """Restore the callbacks that a checkpoint knows."""
        for callback in self._callbacks:
            if callback.name in states:
                callback.load_state_dict(states[callback.name])

    def _tell(self, call: Callable[[Callback], None]) -> None:
        for callback in self._callbacks:
            self._call(callback, call)

    def _call(self, callback: Callback, call: Callable[[Callback], T]) -> T | None:
        if callback.phase is not CallbackPhase.REPORT:
            return call(callback)
        try:
            return call(callback)
        except Exception:
            logger.exception("%s failed; training goes on", callback.name)
            return None
