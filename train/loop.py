"""The training loop, on one page, and the three things it does beside stepping: save, go back,
stop. Only this module acts; callbacks ask.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from train.actions import Action, Continue, Rewind, Save, Stop, worst
from train.checkpoint.info import Health
from train.checkpoint.store import CheckpointStore
from train.data.stream import SampleStream
from train.engines.base import Engine
from train.errors import CheckpointError
from train.events import Events
from train.recovery.rewind import Rewinder
from train.reports import ReportPipeline
from train.schedule import Schedule
from train.state import TrainState

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """All parts of a run, put together in `build.py`."""

    engine: Engine
    data: SampleStream
    schedule: Schedule
    events: Events
    store: CheckpointStore
    rewinder: Rewinder
    last_step: int
    saves_at_start: bool
    saves_at_end: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How a run ended; `is_saved` is False if its last checkpoint could not be written."""

    state: TrainState
    stop: Stop | None = None
    is_saved: bool = True


def train(run: Run, state: TrainState) -> Ending:
    """Train from `state` to the last step, or until a callback stops the run."""
    reports = ReportPipeline()
    if state.clock == 0 and run.saves_at_start:
        # Nothing has been learnt yet, so this one is good by construction.
        save(run, state, Health.GOOD)
    while state.step < run.last_step:
        started = time.perf_counter()
        lr = run.schedule.lr_at(state.step)
        batch = run.data.at(state.cursor, run.schedule.batch_samples_at(state.step))
        step_started = time.perf_counter()
        signals = run.engine.step(
            batch.rows, num_tokens=batch.num_tokens, lr=lr, gate=run.events.gate()
        )
        state = state.after(next_cursor=batch.next_cursor, num_tokens=batch.num_tokens)
        ready = reports.push(
            state,
            signals,
            lr=lr,
            num_samples=len(batch.indices),
            num_tokens=batch.num_tokens,
            started=step_started,
            data_seconds=step_started - started,
            is_flushed=state.step == run.last_step or run.events.needs_current(state.step),
        )
        action, _ = worst([run.events.after_update(report) for report in ready])
        if isinstance(action, Stop):
            return _stop(run, state, action)
        state = _perform(run, state, action, reports)
    is_saved = not run.saves_at_end or any(
        info.clock == state.clock for info in run.store.entries()
    )
    return Ending(state=state, is_saved=is_saved or save(run, state, Health.CANDIDATE))


def _perform(run: Run, state: TrainState, action: Action, reports: ReportPipeline) -> TrainState:
    """Do what was asked for and return the state to go on from. Called on all ranks."""
    match action:
        case Continue():
            return state
        case Save():
            save(run, state, Health.CANDIDATE)
            return state
        case Rewind():
            return _rewind(run, state, action, reports)
    raise AssertionError(f"no one performs {action}")


def save(run: Run, state: TrainState, health: Health) -> bool:
    """Save a checkpoint and return True; one that fails is a warning. A collective."""
    started = time.perf_counter()
    extra = {"ledger": run.data.ledger.ranges(), "callbacks": run.events.state_dict()}
    try:
        info = run.store.save(run.engine, state, extra, health=health)
    except CheckpointError as error:
        logger.warning(
            "the checkpoint of step %d could not be written (%s); older checkpoints are untouched",
            state.step,
            error,
        )
        run.events.checkpoint_failed(state.step, str(error))
        return False
    run.events.checkpoint_saved(info, time.perf_counter() - started)
    return True


def _rewind(run: Run, state: TrainState, action: Rewind, reports: ReportPipeline) -> TrainState:
    started = time.perf_counter()
    logger.info("%s; going back to %s", action.reason, action.target)
    reports.clear()
    state, incident = run.rewinder.rewind(action, state)
    run.events.rewound(incident, state, time.perf_counter() - started)
    return state


def _stop(run: Run, state: TrainState, action: Stop) -> Ending:
    logger.warning("stopping: %s", action.reason)
    if action.needs_save:
        save(run, state, Health.CANDIDATE)
    return Ending(state=state, stop=action)
