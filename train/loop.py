"""The training loop, on one page, and what it does beside stepping: save, skip, go back, stop.
Only this module acts; callbacks ask.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from functools import partial

from train.actions import Action, Continue, Note, Rewind, Save, Skip, Stop, Unskip, worst
from train.checkpoint.info import Health
from train.checkpoint.saver import SAVES_FAILED, Saver
from train.checkpoint.tiers import Tiers
from train.data.stream import Batches
from train.data.validation import Evaluation, Validation
from train.engines.base import Engine
from train.errors import DataEndError
from train.events import Events
from train.health.guard import Guard
from train.health.integrity import Integrity
from train.health.pulse import Phase
from train.recovery.control import Inbox
from train.recovery.history import RecoveryHistory
from train.recovery.rewind import Rewinder
from train.reports import ReportPipeline
from train.schedule import Schedule
from train.state import TrainState

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """All parts of a run, put together in `build.py`."""

    engine: Engine
    data: Batches
    validation: Validation
    schedule: Schedule
    events: Events
    tiers: Tiers
    saver: Saver
    history: RecoveryHistory
    rewinder: Rewinder
    integrity: Integrity
    inbox: Inbox
    last_step: int
    saves_at_start: bool
    saves_at_end: bool
    guard: Guard = field(default_factory=Guard)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How a run ended; `is_saved` is False if its last checkpoint could not be written.

    `evaluation`: of the last state, None if the run was stopped or nothing is held out.
    """

    state: TrainState
    stop: Stop | None = None
    is_saved: bool = True
    evaluation: Evaluation | None = None


def train(run: Run, state: TrainState) -> Ending:
    """Train from `state` to the last step, or until a callback stops the run."""
    reports = ReportPipeline()
    if state.clock == 0 and run.saves_at_start:
        # Nothing has been learnt yet, so this one is good by construction.
        _save(run, state, Save(reason="start", to_memory=True), Health.GOOD, waits=True)
    state = _serve(run, state, reports)
    while state.step < run.last_step:
        run.guard.enter(Phase.DATA, state.step)
        started = time.perf_counter()
        lr = run.schedule.lr_at(state.step) * run.history.lr_factor_at(state.step)
        try:
            batch = run.data.at(state.cursor, run.schedule.batch_samples_at(state.step))
        except DataEndError as error:
            for report in reports.drain():
                run.events.after_update(report)  # whatever it asks for, the run ends here
            return _stop(run, state, _out_of_data(error, run, state))
        gate = run.events.gate()
        run.guard.enter(Phase.STEP, state.step)
        step_started = time.perf_counter()
        step = partial(
            run.engine.step,
            batch.rows,
            layout=batch.layout,
            num_tokens=batch.num_tokens,
            lr=lr,
            gate=gate,
            flag=run.inbox.is_waiting() or run.saver.has_news() or run.guard.is_waiting(),
        )
        signals = run.integrity.execute(run.engine, step, state)
        state = state.after(next_cursor=batch.next_cursor, num_tokens=batch.num_tokens)
        ready = reports.push(
            state,
            signals,
            lr=lr,
            num_samples=len(batch.indices),
            num_tokens=batch.num_tokens,
            started=step_started,
            data_seconds=step_started - started,
            gate=gate,
            is_flushed=state.step == run.last_step or run.events.needs_current(state.step),
        )
        stepped = state
        wanted = _wanted([run.events.after_update(report) for report in ready])
        for action in run.integrity.reviewed(wanted, run.engine, state):
            if isinstance(action, Stop):
                return _stop(run, state, action)
            state = _perform(run, state, action, reports)
        if any(report.signals.is_flagged for report in ready):
            run.saver.settle(waits=False)
            if (stop := run.guard.wanted_stop()) is not None:
                return _stop_for_signal(run, state, stop, reports)
            state = _serve(run, state, reports)
        if (stop := run.saver.wish(state, incident=run.history.last_incident + 1)) is not None:
            return _stop(run, state, stop)
        if state is stepped:
            run.guard.look_for_stragglers(state, run.events)
            if run.validation.is_due(state.step) and state.step < run.last_step:
                _evaluate(run, state)
    return _finish(run, state)


def _finish(run: Run, state: TrainState) -> Ending:
    """Keep and evaluate the last state. A collective."""
    is_saved = run.saver.holds(state)
    if run.saves_at_end and not is_saved:
        _save(run, state, Save(reason="end"), Health.CANDIDATE, waits=True)
        is_saved = run.saver.holds(state)
    evaluation = _evaluate(run, state) if run.validation.has_samples else None
    return Ending(state=state, is_saved=is_saved or not run.saves_at_end, evaluation=evaluation)


def _out_of_data(error: DataEndError, run: Run, state: TrainState) -> Stop:
    return Stop(
        reason=str(error),
        needs_save=True,
        is_failure=True,
        code="data_exhausted",
        rule="data",
        incident=run.history.last_incident + 1,
        onset_step=state.step,
        detected_step=state.step,
    )


def _wanted(answers: list[list[Action]]) -> list[Action]:
    """Return the notes to write and, behind them, the one action that wins."""
    actions = [action for answer in answers for action in answer]
    winner, losers = worst(action for action in actions if not isinstance(action, Note))
    for loser in losers:
        logger.info("%s wins over %s", winner, loser)
    return [*(action for action in actions if isinstance(action, Note)), winner]


def _perform(run: Run, state: TrainState, action: Action, reports: ReportPipeline) -> TrainState:
    """Do what was asked for and return the state to go on from. Called on all ranks."""
    match action:
        case Continue():
            return state
        case Note():
            run.rewinder.note(action)
            run.events.noted(action, state)
            return state
        case Save():
            # What comes at the end is written at once: it has nothing to go on beside.
            is_last = state.step >= run.last_step
            _save(run, state, action, Health.CANDIDATE, waits=is_last)
            return state
        case Skip():
            record = run.rewinder.skip(action, state)
            run.events.ledger_changed(record, state)
            return state
        case Unskip():
            end = run.data.cursor_after(
                state.cursor, run.schedule.samples_between(state.step, run.last_step)
            )
            for record in run.rewinder.unskip(action, state, end_cursor=end):
                run.events.ledger_changed(record, state)
            return state
        case Rewind():
            return _rewind(run, state, action, reports)
    raise AssertionError(f"no one performs {action}")


def _serve(run: Run, state: TrainState, reports: ReportPipeline) -> TrainState:
    """Do what an operator has asked for, in order. A collective."""
    while (request := run.inbox.next_request(state)) is not None:
        state = _perform(run, state, request.action, reports)
        done = run.history.records[-1]
        run.inbox.answer(
            request.name,
            is_accepted=True,
            message=f"incident {done.incident}: {done.reason}; the run goes on at step "
            f"{state.step}, sample {state.cursor}",
        )
    return state


def _evaluate(run: Run, state: TrainState) -> Evaluation:
    """Take the held-out losses of the present state. A collective, and a host sync."""
    run.guard.enter(Phase.EVALUATION, state.step)
    started = time.perf_counter()
    evaluation = run.validation.evaluate(run.engine)
    run.events.evaluated(evaluation, state, time.perf_counter() - started)
    return evaluation


def _save(
    run: Run, state: TrainState, action: Save, health: Health, *, waits: bool = False
) -> None:
    """Keep the state; a save to disk that fails is a warning. A collective."""
    run.guard.enter(Phase.SAVE, state.step)
    extra = {
        "ledger": run.data.skipped(),
        "callbacks": run.events.state_dict(),
        "last_samples": run.data.proof(state.cursor),
    }
    run.saver.save(state, extra, action, health, waits=waits)


def _rewind(run: Run, state: TrainState, action: Rewind, reports: ReportPipeline) -> TrainState:
    run.guard.enter(Phase.REWIND, state.step)
    started = time.perf_counter()
    logger.info("%s; going back to %s", action.reason, action.target)
    reports.clear()
    run.saver.make_ready(action.target)
    state, incident = run.rewinder.rewind(action, state)
    run.saver.copy_away()  # what is quarantined is so everywhere
    run.events.rewound(incident, state, time.perf_counter() - started)
    return state


def _stop_for_signal(run: Run, state: TrainState, stop: Stop, reports: ReportPipeline) -> Ending:
    for report in reports.drain():
        run.events.after_update(report)  # so that what is saved knows all its steps
    (reviewed,) = run.integrity.reviewed([stop], run.engine, state)
    assert isinstance(reviewed, Stop), "who is asked to stop stops, whatever is found"
    return _stop(run, state, reviewed)


def _stop(run: Run, state: TrainState, action: Stop) -> Ending:
    logger.warning("stopping: %s", action.reason)
    if action.is_failure:
        # A disk that takes no checkpoint may take no record either, and is the news itself.
        run.rewinder.stopped(action, state, is_vital=action.code != SAVES_FAILED)
    is_saved = run.saver.holds(state)
    if action.needs_save and not is_saved:
        _save(run, state, Save(reason="stop"), Health.CANDIDATE, waits=True)
    return Ending(state=state, stop=action)
