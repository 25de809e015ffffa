"""The operator's hand: requests that `trimtab rewind`, `skip` and `unskip` leave in a run folder.

A request is one file in `control/requests`, its answer one in `control/answers`. On rank 0 a thread
looks for requests, away from the hot path; the next step's reduce carries the news to all ranks,
which then read the same requests from rank 0 and come to the same actions. A run that is not
running meets its requests when it starts. Each is carried out once: the journal remembers it.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.actions import Action, Rewind, Skip, Unskip
from train.amounts import Amount
from train.checkpoint.tiers import Tiers
from train.distributed import World
from train.durable import write_json
from train.recovery.history import RecoveryHistory
from train.recovery.policy import Rung
from train.schedule import Schedule
from train.state import BatchRange, TrainState

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0


class RefusedRequestError(Exception):
    """A request that cannot be carried out; the message is the operator's answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One valid request: what to do, and its name."""

    name: str
    action: Action


class Inbox:
    """The requests to one run.

    `is_waiting` costs nothing; all ranks call `next_request` and `answer` in the same order.
    """

    def __init__(
        self,
        folder: Path,
        *,
        tiers: Tiers,
        schedule: Schedule,
        history: RecoveryHistory,
        sequence_length: int,
        near_steps: int,
        world: World,
    ) -> None:
        self._requests = folder / "requests"
        self._answers = folder / "answers"
        self._tiers = tiers
        self._schedule = schedule
        self._history = history
        self._sequence_length = sequence_length
        self._near_steps = near_steps
        self._world = world
        self._has_request = threading.Event()
        self._is_closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._answered: set[str] = set()

    def start(self) -> None:
        """Begin to look for requests, on rank 0."""
        if self._world.is_main:
            self._thread = threading.Thread(target=self._watch, name="inbox", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Stop looking."""
        self._is_closed.set()
        if self._thread is not None:
            self._thread.join(timeout=2 * POLL_SECONDS)

    def is_waiting(self) -> bool:
        """True on rank 0 if there is a request; no disk, no collective."""
        return self._has_request.is_set()

    def next_request(self, state: TrainState) -> Request | None:
        """Return the oldest request that can be carried out now, or None if there is none.

        What cannot be done is answered on the way. One at a time, since each is judged by what the
        one before has left.
        """
        found: list[tuple[str, Any]] = []
        if self._world.is_main:
            self._has_request.clear()
            found = [(path.stem, _read(path)) for path in self._paths()]
        for name, fields in self._world.broadcast(found):
            if self._history.is_request_known(name):
                self.answer(name, is_accepted=True, message="carried out before a restart")
                continue
            try:
                return Request(name=name, action=self._action(name, fields, state))
            except RefusedRequestError as error:
                logger.warning("request %s refused: %s", name, error)
                self.answer(name, is_accepted=False, message=str(error))
        return None

    def answer(self, name: str, *, is_accepted: bool, message: str) -> None:
        """Tell the operator, and take the request off the list. Writes on rank 0 alone."""
        if not self._world.is_main:
            return
        self._answered.add(name)  # should its file stay, it is not read again
        try:
            self._answers.mkdir(parents=True, exist_ok=True)
            write_json(
                self._answers / f"{name}.json",
                {"is_accepted": is_accepted, "message": message, "unix_seconds": time.time()},
            )
            (self._requests / f"{name}.json").unlink(missing_ok=True)
        except OSError as error:
            logger.warning("the answer to request %s could not be written (%s)", name, error)

    def _watch(self) -> None:
        while not self._is_closed.wait(POLL_SECONDS):
            if self._paths():
                self._has_request.set()

    def _paths(self) -> list[Path]:
        try:
            found = [path for path in self._requests.iterdir() if path.suffix == ".json"]
        except OSError:
            return []
        return sorted(path for path in found if path.stem not in self._answered)

    def _action(self, name: str, fields: object, state: TrainState) -> Action:
        if not isinstance(fields, Mapping):
            raise RefusedRequestError("the request cannot be read; give it again")
        named = str(fields.get("operator") or "")[:100]
        who = "".join(letter for letter in named if letter.isprintable()) or "an operator"
        match fields.get("kind"):
            case "rewind":
                return self._rewind(name, fields, state, f"asked for by {who}")
            case "skip":
                amount = self._samples(fields.get("amount"), state.step)
                if amount == 0:
                    raise RefusedRequestError("an amount of nothing skips nothing")
                return Skip(amount=amount, reason=f"skip asked for by {who}", request=name)
            case "unskip":
                return self._unskip(name, fields, f"unskip asked for by {who}")
            case kind:
                raise RefusedRequestError(f"unknown request {kind!r}; use rewind, skip or unskip")

    def _rewind(
        self, name: str, fields: Mapping[str, Any], state: TrainState, reason: str
    ) -> Rewind:
        to_step = fields.get("to_step")
        if not isinstance(to_step, int) or isinstance(to_step, bool):
            raise RefusedRequestError(f"to_step={to_step!r} is not a step")
        if to_step > state.step:
            raise RefusedRequestError(f"step {to_step} lies ahead: the run is at step {state.step}")
        good = self._tiers.good()
        before = [info for info in good if info.step <= to_step]
        if not before:
            steps = ", ".join(str(info.step) for info in good) or "none"
            raise RefusedRequestError(
                f"there is no good checkpoint at or before step {to_step}; good ones are of steps "
                f"{steps}"
            )
        target = max(before, key=lambda info: (info.step, info.clock))
        if to_step - target.step > self._near_steps and fields.get("is_far") is not True:
            steps = ", ".join(str(info.step) for info in good)
            raise RefusedRequestError(
                f"the last good state up to step {to_step} is of step {target.step}, "
                f"{to_step - target.step} steps before it, and what came after is given up; good "
                f"ones are of steps {steps}: name one of them, or add --far"
            )
        amount = fields.get("amount")
        covers_all = amount == "seen"
        samples = self._samples("0 tokens" if covers_all else amount or "0 tokens", target.step)
        if covers_all and state.cursor > target.cursor:
            samples = 1  # and up to the present, since it is not exact
        return Rewind(
            target=target.name,
            target_step=target.step,
            skip_from=target.cursor,
            skip_amount=samples,
            rule="operator",
            rung=Rung.REWIND,
            verdict="operator",
            onset_step=state.step,
            detected_step=state.step,
            reason=f"rewind to step {to_step} {reason}, the last good state before it is of step "
            f"{target.step}",
            incident=self._history.last_incident + 1,
            is_exact=not covers_all,
            request=name,
        )

    def _unskip(self, name: str, fields: Mapping[str, Any], reason: str) -> Unskip:
        incident = fields.get("incident")
        if not isinstance(incident, int) or isinstance(incident, bool) or incident < 1:
            raise RefusedRequestError(f"incident {incident!r} is not the number of an incident")
        ranges = [
            record.skip_range
            for record in self._history.done
            if record.incident == incident and len(record.skip_range)
        ]
        if not ranges:
            known = sorted({r.incident for r in self._history.done if len(r.skip_range)})
            raise RefusedRequestError(
                f"incident {incident!r} skipped nothing; incidents that did: {known or 'none'}"
            )
        pieces = sorted(
            {piece for one in ranges for piece in without(one, self._history.returns())},
            key=lambda piece: piece.start,
        )
        left = merged(pieces)
        if not left:
            raise RefusedRequestError(f"what incident {incident} skipped is put back already")
        return Unskip(skipped=tuple(left), reason=f"incident {incident}: {reason}", request=name)

    def _samples(self, amount: object, from_step: int) -> int:
        try:
            parsed = Amount.parse(amount)
        except ValueError as error:
            raise RefusedRequestError(f"amount {amount!r}: {error}") from error
        if parsed.value == 0:
            return 0
        return self._schedule.amount_in_samples(
            parsed, from_step=from_step, sequence_length=self._sequence_length
        )


def without(whole: BatchRange, returns: Iterable[tuple[int, int, int]]) -> list[BatchRange]:
    """Return what is left of a range when that which was put back is taken away."""
    pieces = [whole]
    for _, start, stop in returns:
        pieces = [
            BatchRange(start=first, stop=last)
            for piece in pieces
            for first, last in (
                (piece.start, min(piece.stop, start)),
                (max(piece.start, stop), piece.stop),
            )
            if first < last
        ]
    return pieces


def merged(pieces: Iterable[BatchRange]) -> list[BatchRange]:
    """Return the union of ranges that are sorted by their start."""
    union: list[BatchRange] = []
    for piece in pieces:
        if union and piece.start <= union[-1].stop:
            stop = max(union[-1].stop, piece.stop)
            union[-1] = BatchRange(start=union[-1].start, stop=stop)
        else:
            union.append(piece)
    return union


def _read(path: Path) -> object:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
