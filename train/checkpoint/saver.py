"""The saves of one run as its loop asks for them: to memory, to disk beside training, or at once.

Owns when a save waits for the one before, what is told of it, and how many failures in a row are
borne. All ranks call its methods in the same order; they are collectives where they say so.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

from train.actions import Save, Stop
from train.checkpoint.info import Health
from train.checkpoint.remote import RemoteCopies
from train.checkpoint.snapshots import snapshot_name
from train.checkpoint.tiers import Tiers
from train.checkpoint.writing import Outcome
from train.engines.base import Engine
from train.errors import CheckpointError
from train.events import Events
from train.state import TrainState

logger = logging.getLogger(__name__)

SAVES_FAILED = "saves_failed"
_REMOTE_SECONDS = 600.0


class Saver:
    """One save in flight, never two; `max_failures` in a row end the run."""

    def __init__(
        self,
        engine: Engine,
        tiers: Tiers,
        events: Events,
        *,
        max_failures: int | None = None,
        remote: RemoteCopies | None = None,
    ) -> None:
        self._engine = engine
        self._tiers = tiers
        self._events = events
        self._max_failures = max_failures
        self._remote = remote
        self._num_failures = 0
        self._last_problem = ""
        self._stall_seconds = 0.0
        self._left_at = 0.0

    def save(
        self,
        state: TrainState,
        extra: Mapping[str, object],
        action: Save,
        health: Health,
        *,
        waits: bool = False,
    ) -> None:
        """Keep the present state where `action` says. A collective.

        To disk, it returns when the state is staged, or, if `waits`, when it is durable. A failure
        is a warning.
        """
        if action.to_memory:
            seconds = self._tiers.ring.take(state, extra, health=health)
            if seconds is not None:
                self._events.snapshot_taken(state, seconds)
        if not action.to_disk:
            return
        started = time.perf_counter()
        self.settle(waits=True)
        if self._has_failed_too_often:
            return
        if self._tiers.store.writes_beside and not waits:
            staged = self._tiers.ring.stage(snapshot_name(state))
            self._tiers.store.begin(self._engine, state, extra, health=health, staged=staged)
            self._left_at = time.perf_counter()
            self._stall_seconds = self._left_at - started
            return
        try:
            info = self._tiers.store.save(self._engine, state, extra, health=health)
        except CheckpointError as error:
            outcome = Outcome(state=state, problem=str(error))
        else:
            outcome = Outcome(state=state, info=info)
        self._tell(outcome, time.perf_counter() - started, 0.0)

    def has_news(self) -> bool:
        """True if a save in flight has ended on this rank. No collective, no disk."""
        return self._tiers.store.has_landed()

    def settle(self, *, waits: bool) -> None:
        """Take over a save that has ended on all ranks. A collective if one is in flight.

        `waits`: return when it has; it is then not tried again.
        """
        outcome = self._tiers.store.settle(waits=waits)
        if outcome is None:
            return
        self._tiers.ring.give_back()
        self._tell(outcome, self._stall_seconds, time.perf_counter() - self._left_at)

    def make_ready(self, name: str) -> None:
        """Settle the save of that state if it can be had from nowhere else. A collective then."""
        if self._tiers.store.in_flight == name and not self._tiers.ring.holds(name):
            self.settle(waits=True)

    def holds(self, state: TrainState) -> bool:
        """True if this very state is in a checkpoint. A collective if a save is in flight."""
        self.settle(waits=True)
        return any(info.clock == state.clock for info in self._tiers.store.entries())

    def wish(self, state: TrainState, *, incident: int) -> Stop | None:
        """Return the wish to end the run if too many saves have failed. No collective."""
        if not self._has_failed_too_often:
            return None
        return Stop(
            reason=f"the last {self._num_failures} saves have failed ({self._last_problem}), and "
            f"checkpoint.max_failures={self._max_failures}: see to the disk of "
            f"{self._tiers.store.folder}, and run the same command again",
            needs_save=False,
            is_failure=True,
            code=SAVES_FAILED,
            rule="checkpoint",
            incident=incident,
            onset_step=state.step,
            detected_step=state.step,
        )

    @property
    def _has_failed_too_often(self) -> bool:
        return self._max_failures is not None and self._num_failures >= self._max_failures

    def copy_away(self) -> None:
        """Begin to bring the remote copies up to the catalogue. No collective, no wait."""
        if self._remote is not None:
            store = self._tiers.store
            self._remote.update([i for i in store.entries() if i.name != store.in_flight])

    def finish(self) -> None:
        """Wait for the remote copies, at the good end of a run. No collective."""
        if self._remote is not None and not self._remote.finish(_REMOTE_SECONDS):
            logger.warning("the last checkpoint may lack a copy at checkpoint.remote")

    def close(self) -> None:
        """Leave what is under way to itself, at the end of a process. No collective."""
        self._tiers.store.close()
        if self._remote is not None:
            self._remote.close()

    def _tell(self, outcome: Outcome, seconds: float, background_seconds: float) -> None:
        info = outcome.info
        if info is None:
            self._num_failures += 1
            self._last_problem = outcome.problem
            logger.warning(
                "the checkpoint of step %d could not be written (%s); older checkpoints are "
                "untouched",
                *(outcome.state.step, outcome.problem),
            )
            self._events.checkpoint_failed(outcome.state.step, outcome.problem, seconds)
            return
        self._num_failures = 0
        if info.health is Health.QUARANTINED:
            logger.warning("the checkpoint of step %d has numbers that are not finite", info.step)
            self._tiers.ring.forget(info.name)
        self._events.checkpoint_saved(info, seconds, background_seconds)
        self.copy_away()
