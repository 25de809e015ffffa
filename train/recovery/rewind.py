"""The act of going back, on all ranks, and taking a run up again: the same code does both.

Order of a rewind, each part durable before the next: the intent in the journal; verify and load
the target; the ledger; quarantine of younger checkpoints; done in the journal. A restart finishes
an intent that has no done, so a kill at any point ends in the same decision.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

from train.actions import Rewind
from train.checkpoint.info import CheckpointInfo, Health
from train.checkpoint.store import CheckpointStore
from train.data.ledger import SkipLedger
from train.distributed import World
from train.engines.base import Engine
from train.errors import CorruptCheckpointError, JournalError
from train.events import Events
from train.recovery.journal import Incident, Journal, Phase, finished, now_utc, pending
from train.state import BatchRange, TrainState

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """Where a run goes on; `finished_incident` is the rewind that a crash had left unfinished."""

    state: TrainState
    checkpoint: CheckpointInfo
    finished_incident: Incident | None


class Rewinder:
    """Rewinds and resumes one run. All methods are collectives."""

    def __init__(
        self,
        *,
        store: CheckpointStore,
        journal: Journal,
        ledger: SkipLedger,
        engine: Engine,
        events: Events,
        world: World,
    ) -> None:
        self._store = store
        self._journal = journal
        self._ledger = ledger
        self._engine = engine
        self._events = events
        self._world = world

    def rewind(self, action: Rewind, present: TrainState) -> tuple[TrainState, Incident]:
        """Go back as `action` says and return the state to go on from, and the journal's entry."""
        target = next(info for info in self._store.entries() if info.name == action.target)
        # The amount counts from the first sample that no earlier rewind skips: another rewind to
        # the same target would skip nothing new.
        fresh, _ = self._ledger.take(action.skip_from, 1)
        already_skipped = int(fresh[0]) - action.skip_from
        amount = already_skipped + action.skip_amount
        skip = replace(action, skip_amount=amount).skip_range(present.cursor)
        intent = Incident(
            incident=present.rewinds + 1,
            phase=Phase.INTENT,
            time=self._world.broadcast(now_utc()),
            rule=action.rule,
            reason=action.reason,
            verdict=action.verdict,
            onset_step=action.onset_step,
            detected_step=action.detected_step,
            clock=present.clock,
            target_checkpoint=target.name,
            target_step=target.step,
            skip=(skip.start, skip.stop),
            quarantine=tuple(
                info.name for info in self._store.entries() if info.clock > target.clock
            ),
        )
        self._write(intent)
        return self._finish(intent)

    def resume(self) -> Resumed | None:
        """Take the run up where it was, or return None if it has no checkpoint yet.

        Finishes an unfinished rewind first. Otherwise the youngest checkpoint that is neither
        quarantined nor corrupt is loaded; a corrupt one is quarantined, and said so.
        Raises: CorruptCheckpointError if there are checkpoints, but none that can be read.
        """
        incidents = self._world.broadcast(self._journal.read() if self._world.is_main else None)
        for incident in incidents:
            self._ledger.add(incident.skip_range)
        open_intent = pending(incidents)
        if open_intent is not None:
            logger.warning("finishing incident %d, cut short before", open_intent.incident)
            state, done = self._finish(open_intent)
            target = next(i for i in self._store.entries() if i.name == done.target_checkpoint)
            return Resumed(state=state, checkpoint=target, finished_incident=done)
        usable = [info for info in self._store.entries() if info.health is not Health.QUARANTINED]
        if not usable:
            if self._store.entries() or self._store.unreadable:
                names = [info.name for info in self._store.entries()] + [*self._store.unreadable]
                raise CorruptCheckpointError(
                    f"none of the checkpoints in {self._store.folder} can be used "
                    f"({', '.join(names)}): they are quarantined, or their manifest or health file "
                    "cannot be read; bring one back, or start over with run.overwrite=true"
                )
            return None
        info, extra = self._load_first(usable[::-1])
        state = self._restore(extra)
        done_before = finished(incidents)
        if done_before:
            state = state.rewound(clock=done_before[-1].clock, rewinds=len(done_before))
        return Resumed(state=state, checkpoint=info, finished_incident=None)

    def _finish(self, intent: Incident) -> tuple[TrainState, Incident]:
        """Do what an intent says, from the load on; doing it twice does it once."""
        by_name = {info.name: info for info in self._store.entries()}
        if intent.target_checkpoint not in by_name:
            raise JournalError(
                f"incident {intent.incident} wants to go back to {intent.target_checkpoint}, which "
                f"is not in {self._store.folder}; put it back, or start over with "
                "run.overwrite=true"
            )
        target = by_name[intent.target_checkpoint]
        older = [
            info
            for info in self._store.trusted(Health.GOOD)
            if info.clock < target.clock and info.name not in intent.quarantine
        ]
        loaded, extra = self._load_first([target, *older[::-1]])
        self._ledger.add(intent.skip_range)
        state = self._restore(extra).rewound(clock=intent.clock, rewinds=intent.incident)
        for name in intent.quarantine:
            self._store.quarantine(name, f"made after the target of incident {intent.incident}")
        done = replace(
            intent, phase=Phase.DONE, target_checkpoint=loaded.name, target_step=loaded.step
        )
        self._write(done)
        return state, done

    def _load_first(self, candidates: list[CheckpointInfo]) -> tuple[CheckpointInfo, Any]:
        """Load the first checkpoint that is whole; quarantine those that are not, and say so."""
        for info in candidates:
            try:
                return info, self._store.load(self._engine, info)
            except CorruptCheckpointError as error:
                logger.warning(
                    "checkpoint %s is corrupt (%s); falling back to the one before",
                    info.name,
                    error,
                )
                self._store.quarantine(info.name, f"corrupt: {error}")
        raise CorruptCheckpointError(
            f"none of {len(candidates)} checkpoints in {self._store.folder} can be read; bring one "
            "back from a copy, or start over with run.overwrite=true"
        )

    def _restore(self, extra: dict[str, Any]) -> TrainState:
        for start, stop in extra["ledger"]:
            self._ledger.add(BatchRange(start=start, stop=stop))
        self._events.load_state_dict(extra["callbacks"])
        return TrainState(**extra["train_state"])

    def _write(self, incident: Incident) -> None:
        if self._world.is_main:
            self._journal.append(incident)
        self._world.barrier()
