"""The acts of recovery, on all ranks, and taking a run up again: the same code does both.

Order of a rewind, each part durable before the next: the intent in the journal; the fastest tier
that holds the target whole; the ledger; quarantine of younger checkpoints; done in the journal. A
restart finishes an intent that has no done, so a kill at any point ends in the same decision. A
target that was in memory alone is lost with its process: the restart goes to an older checkpoint
on disk, trains the same samples up to the target's cursor, and jumps the same range.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from train.actions import Note, Rewind, Skip, Stop, Unskip
from train.checkpoint.info import CheckpointInfo, Health
from train.checkpoint.tiers import Tiers
from train.data.stream import Batches
from train.distributed import World
from train.engines.base import Engine
from train.errors import CorruptCheckpointError, DataError, JournalError
from train.events import Events
from train.recovery.history import RecoveryHistory
from train.recovery.journal import Incident, Journal, Phase, now_utc, pending
from train.recovery.policy import Rung
from train.state import TrainState

logger = logging.getLogger(__name__)


class IncidentRecorder(Protocol):
    """Whoever keeps the evidence of an incident before the state that shows it is replaced."""

    def capture(self, intent: Incident, state: TrainState) -> None:
        """Keep what is known now. A collective."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """Where a run goes on; `finished_incident` is the rewind that a crash had left unfinished."""

    state: TrainState
    checkpoint: CheckpointInfo
    finished_incident: Incident | None


class Rewinder:
    """Rewinds, skips and resumes one run. All methods are collectives."""

    def __init__(
        self,
        *,
        tiers: Tiers,
        journal: Journal,
        history: RecoveryHistory,
        data: Batches,
        engine: Engine,
        events: Events,
        world: World,
        recorder: IncidentRecorder,
    ) -> None:
        self._tiers = tiers
        self._journal = journal
        self._history = history
        self._data = data
        self._ledger = data.ledger
        self._returns = data.returns
        self._engine = engine
        self._events = events
        self._world = world
        self._recorder = recorder

    def rewind(self, action: Rewind, present: TrainState) -> tuple[TrainState, Incident]:
        """Go back as `action` says and return the state to go on from, and the journal's entry."""
        self._data.skipped()  # positions ahead are counted from a ledger that is whole
        target_clock = _clock_of(action.target)
        if action.skip_amount:
            # What an earlier rewind skips is not counted again: the amount is of fresh samples.
            amount = self._ledger.advance(action.skip_from, action.skip_amount) - action.skip_from
            action = replace(action, skip_amount=amount)
        skip = action.skip_range(present.cursor)
        intent = Incident(
            incident=action.incident,
            attempt=action.attempt,
            rewinds=self._history.num_rewinds + 1,
            phase=Phase.INTENT,
            time=self._world.broadcast(now_utc()),
            rule=action.rule,
            rung=action.rung,
            reason=action.reason,
            verdict=action.verdict,
            onset_step=action.onset_step,
            detected_step=action.detected_step,
            clock=present.clock,
            target_checkpoint=action.target,
            target_step=action.target_step,
            skip=(skip.start, skip.stop),
            # Those of earlier rewinds are in their records, whether they are still there or not.
            quarantine=tuple(
                info.name
                for info in self._tiers.store.entries()
                if info.clock > target_clock and info.health is not Health.QUARANTINED
            ),
            kept=self._needed_for_attribution(target_clock),
            lr_scale=action.lr_scale,
            lr_from_step=action.target_step,
            lr_until_step=action.lr_until_step,
            lr_return_step=action.lr_return_step,
            request=action.request,
            suspects=action.suspects,
        )
        self._recorder.capture(intent, present)
        self._write(intent)
        return self._finish(intent)

    def note(self, action: Note) -> None:
        """Write down what was borne or observed, once."""
        here = action.detected_step
        is_veto = action.rung is Rung.VETO
        if action.rung is Rung.VETO and self._history.is_veto_known(action.clock, here):
            return  # a crash has brought the same step again
        if action.is_observed and self._history.is_observed(action.incident):
            return  # two reports came at once
        self._write(
            Incident(
                incident=action.incident,
                attempt=action.attempt,
                phase=Phase.OBSERVED if action.is_observed else Phase.DONE,
                time=self._world.broadcast(now_utc()),
                rule=action.rule,
                rung=action.rung,
                reason=action.reason,
                code=action.code,
                verdict=action.verdict,
                onset_step=action.onset_step,
                detected_step=here,
                clock=action.clock,
                target_checkpoint=action.target,
                target_step=action.target_step if action.target else here,
                skip=(0, 0),
                quarantine=(),
            ),
            is_vital=not is_veto,
        )

    def stopped(self, action: Stop, present: TrainState, *, is_vital: bool = True) -> None:
        """Write down why recovery gave up."""
        record = self._single(Rung.STOP, present, action.reason)
        self._write(
            replace(
                record,
                code=action.code,
                suspects=action.suspects,
                rule=action.rule,
                incident=action.incident,
                attempt=action.attempt,
                verdict=action.verdict,
                onset_step=action.onset_step,
                detected_step=action.detected_step,
            ),
            is_vital=is_vital,
        )

    def skip(self, action: Skip, present: TrainState) -> Incident:
        """Skip the next samples from here on."""
        self._data.skipped()  # positions ahead are counted from a ledger that is whole
        fresh, _ = self._ledger.take(present.cursor, 1)
        start = int(fresh[0])
        stop = self._ledger.advance(start, action.amount)
        record = self._single(Rung.SKIP_AHEAD, present, action.reason, request=action.request)
        record = replace(record, skip=(start, stop))
        self._write(record)
        self._ledger.add(record.skip_range)
        return record

    def unskip(self, action: Unskip, present: TrainState, *, end_cursor: int) -> list[Incident]:
        """Put skipped samples back as late in the data as the run still reads them.

        `end_cursor`: where the run's last step would leave the cursor. Ranges keep their order.
        """
        self._data.skipped()  # positions ahead are counted from a ledger that is whole
        # Ranges that are skipped further on must not move, so it comes behind them.
        start = max(present.cursor, self._ledger.end)
        records = []
        for skipped in reversed(action.skipped):
            position = latest_gap(
                len(skipped), start, max(start, end_cursor), self._returns.places()
            )
            reason = action.reason
            if position >= end_cursor:
                reason += "; no room is left before the end: read if run.steps is raised"
            # The request is fulfilled with its last range; a restart in between does the others.
            is_last = skipped is action.skipped[0]
            record = replace(
                self._single(Rung.UNSKIP, present, reason, request=action.request),
                request=action.request if is_last else "",
                returned=(position, skipped.start, skipped.stop),
            )
            self._returns.insert(position, skipped.start, skipped.stop)  # refuses what is no return
            self._write(record)
            records.append(record)
        return records

    def resume(self) -> Resumed | None:
        """Take the run up where it was, or return None if it has no checkpoint yet.

        Finishes an unfinished rewind first. Otherwise the youngest checkpoint that is neither
        quarantined nor corrupt is loaded; a corrupt one is quarantined, and said so.
        Raises: CorruptCheckpointError if there are checkpoints, but none that can be read.
        """
        records = self._world.broadcast(self._journal.read() if self._world.is_main else None)
        self._history.replace(records)
        for skipped in self._history.skips():
            self._ledger.add(skipped)
        for returned in self._history.returns():
            self._returns.insert(*returned)
        for record in self._history.done:
            for name in record.quarantine:  # a full disk may have kept it from being written
                self._tiers.store.quarantine(name, f"incident {record.incident}")
        open_intent = pending(records)
        if open_intent is not None:
            logger.warning("finishing incident %d, cut short before", open_intent.incident)
            state, done = self._finish(open_intent)
            target = self._tiers.find(done.target_checkpoint)
            assert target is not None
            return Resumed(state=state, checkpoint=target, finished_incident=done)
        store = self._tiers.store
        usable = [info for info in store.entries() if info.health is not Health.QUARANTINED]
        if not usable:
            if store.entries() or store.unreadable:
                names = [info.name for info in store.entries()] + [*store.unreadable]
                raise CorruptCheckpointError(
                    f"none of the checkpoints in {store.folder} can be used "
                    f"({', '.join(names)}): they are quarantined, or their manifest or health file "
                    "cannot be read; bring one back, or start over with run.overwrite=true"
                )
            return None
        info, extra = self._tiers.load_first(self._engine, usable[::-1])
        state = self._restore(extra).rewound(
            clock=self._history.clock, rewinds=self._history.num_rewinds
        )
        return Resumed(state=state, checkpoint=info, finished_incident=None)

    def _finish(self, intent: Incident) -> tuple[TrainState, Incident]:
        """Do what an intent says, from the load on; doing it twice does it once."""
        loaded, extra = self._tiers.load_first(self._engine, self._candidates(intent))
        self._ledger.add(intent.skip_range)
        state = self._restore(extra).rewound(clock=intent.clock, rewinds=intent.rewinds)
        self._tiers.ring.forget_after(loaded.clock)
        for name in intent.quarantine:
            self._tiers.store.quarantine(
                name, f"made after the target of incident {intent.incident}"
            )
        done = replace(
            intent, phase=Phase.DONE, target_checkpoint=loaded.name, target_step=loaded.step
        )
        self._write(done)
        return state, done

    def _candidates(self, intent: Incident) -> list[CheckpointInfo]:
        """Return the target of an intent and, behind it, the good states before it.

        Raises: JournalError if nothing is left to go back to.
        """
        target = self._tiers.find(intent.target_checkpoint)
        if target is not None and target.health is Health.QUARANTINED:
            target = None  # it was still being written when it was chosen, and came out broken
        target_clock = _clock_of(intent.target_checkpoint)
        older = [
            info
            for info in self._tiers.good()
            if info.clock < target_clock and info.name not in intent.quarantine
        ]
        if target is None and not older:
            raise JournalError(
                f"incident {intent.incident} wants to go back to {intent.target_checkpoint}, which "
                f"is not in {self._tiers.store.folder}; put it back, or start over with "
                "run.overwrite=true"
            )
        return ([target] if target is not None else []) + older[::-1]

    def _needed_for_attribution(self, clock: int) -> tuple[str, ...]:
        """Return the checkpoints on disk to replay from: the last two good ones up to a target."""
        good = [i.name for i in self._tiers.store.trusted(Health.GOOD) if i.clock <= clock]
        return tuple(good[-2:])

    def _restore(self, extra: dict[str, Any]) -> TrainState:
        """Take up a checkpoint's extra state. A collective.

        Raises: DataError, on all ranks, if the data are others now on one.
        """
        problem: str | None = None
        try:
            if "last_samples" in extra:
                self._data.check(extra["last_samples"])
        except DataError as error:
            problem = str(error)
        problems = [found for found in self._world.gather(problem) if found]
        if problems:
            raise DataError(problems[0])
        self._ledger.extend((start, stop) for start, stop in extra["ledger"])
        self._events.load_state_dict(extra["callbacks"])
        return TrainState(**extra["train_state"])

    def _single(
        self, rung: Rung, present: TrainState, reason: str, *, request: str = ""
    ) -> Incident:
        """Return the record of an act without parts, done at once."""
        return Incident(
            incident=self._history.last_incident + 1,
            phase=Phase.DONE,
            time=self._world.broadcast(now_utc()),
            rule="operator",
            rung=rung,
            reason=reason,
            verdict="",
            onset_step=present.step,
            detected_step=present.step,
            clock=present.clock,
            target_checkpoint="",
            target_step=present.step,
            skip=(present.cursor, present.cursor),
            quarantine=(),
            request=request,
        )

    def _write(self, record: Incident, *, is_vital: bool = True) -> None:
        """Make a record durable, then take it up, on all ranks.

        One that is not vital is taken up in any case: a restart would only count one refused
        update less.

        Raises: JournalError, on all ranks, if it could not be written. What it says was not done,
        or, if it is a `done`, will be finished by the next start.
        """
        failure: str | None = None
        if self._world.is_main:
            try:
                self._journal.append(record)
            except OSError as error:
                failure = error.strerror or str(error)
        failure = self._world.broadcast(failure)
        if failure is not None and not is_vital:
            logger.warning("%s cannot be written (%s)", self._journal.path, failure)
        elif failure is not None:
            raise JournalError(
                f"{self._journal.path} cannot be written ({failure}), so nothing can be decided "
                f"that a restart would keep to ({record.rung} of incident {record.incident}); make "
                "room and start the same command again"
            )
        self._history.add(record)


def _clock_of(name: str) -> int:
    """Return the clock that the name of a state carries."""
    return int(name.rsplit("-", 1)[-1])


def latest_gap(length: int, start: int, stop: int, taken: Iterable[tuple[int, int]]) -> int:
    """Return the last position in `[start, stop)` where `length` positions are free of `taken`.

    Without such a gap, the first one from `stop` on.
    """
    end = stop
    blocks = sorted((block for block in taken if block[1] > start), reverse=True)
    for block_start, block_stop in blocks:
        if block_stop < end and end - max(start, block_stop) >= length:
            break
        end = min(end, block_start)
    if end - start >= length:
        return end - length
    return max([start, stop, *(block[1] for block in blocks)])
