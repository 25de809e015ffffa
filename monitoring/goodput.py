"""Where a run's wall time went: classes of seconds that add up to the wall time.

Owns the accounting. Refuses to guess from totals: it cuts each attempt at the time stamps of its
records and charges every piece to one class, so that nothing is counted twice and work that runs
beside training (a background save) costs only the seconds that training really waited. Called by
the report, the CLI and the end of a run; needs the run's files alone.

    attempt 0                                      attempt 1
    |startup|step step step [rewind] step step|     |startup|step step ...
                                              restart
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from monitoring.records import Record, integer, number, read_run
from monitoring.survival import survivors

_BLOCKING_KINDS: Mapping[str, str] = {
    "checkpoint_saved": "checkpoint",
    "checkpoint_failed": "checkpoint",
    "snapshot": "checkpoint",
    "rewind": "rewind",
    "evaluation": "evaluation",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Goodput:
    """Seconds of wall time a class; every field but `wall_seconds` adds up to `wall_seconds`.

    `startup`: from process start to the first step of each attempt. `training`: applied steps that
    are part of the final model. `recomputed`: steps that were vetoed, thrown away by a rewind, or
    executed again after a crash. `data_wait`: waiting for batches, in any step. `checkpoint`,
    `rewind` and `evaluation`: what the loop stood still for; on a GPU an evaluation begins with
    what is left of the step under way. `restart`: from the last sign of life of an attempt to the
    next process start. `other`: the remainder.
    """

    startup: float = 0.0
    training: float = 0.0
    recomputed: float = 0.0
    data_wait: float = 0.0
    checkpoint: float = 0.0
    rewind: float = 0.0
    evaluation: float = 0.0
    restart: float = 0.0
    other: float = 0.0
    wall_seconds: float = 0.0

    @property
    def goodput(self) -> float:
        """Training time over wall time, in [0, 1]; 0 for a run without records."""
        return self.training / self.wall_seconds if self.wall_seconds > 0 else 0.0

    def seconds_by_class(self) -> dict[str, float]:
        """The classes in display order, without the wall time."""
        names = [item.name for item in fields(self) if item.name != "wall_seconds"]
        return {name: float(getattr(self, name)) for name in names}

    def as_table(self) -> list[tuple[str, float, float]]:
        """Rows of (class, seconds, share of the wall time), in display order."""
        wall = self.wall_seconds or 1.0
        return [(name, value, value / wall) for name, value in self.seconds_by_class().items()]

    def as_dict(self) -> dict[str, float]:
        """Plain values for `summary.json`: seconds a class, the wall time and the goodput."""
        return {
            **self.seconds_by_class(),
            "wall_seconds": self.wall_seconds,
            "goodput": self.goodput,
        }


def goodput_of_run(folder: Path) -> Goodput:
    """Account for a run folder, finished or not.

    Raises:
        UnreadableRecordsError: the folder does not exist or cannot be read.
    """
    run = read_run(folder)
    return compute_goodput(run.metrics, run.events)


def compute_goodput(metrics: Sequence[Record], events: Sequence[Record]) -> Goodput:
    """Account for a run from all its metrics lines, repeated clocks included, and its events.

    The wall time goes from the first process start to the last time stamp. Time stamps that go
    backwards (a clock that was set) count as no time.
    """
    attempts = _split_attempts(metrics, events)
    ledger = _Ledger()
    for number_of_attempt in sorted(attempts):
        attempts[number_of_attempt].charge(ledger)
    return Goodput(**ledger.seconds, wall_seconds=sum(ledger.seconds.values()))


class _Ledger:
    """Charges consecutive pieces of wall time; the cursor never moves back."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.cursor: float | None = None

    def advance(self, time: float, wishes: Sequence[tuple[str, float]], remainder: str) -> None:
        """Charge `[cursor, time]` to the wishes in turn, each as far as time is left."""
        left = max(0.0, time - self.cursor) if self.cursor is not None else 0.0
        self.cursor = time if self.cursor is None else max(self.cursor, time)
        for name, wanted in wishes:
            charged = min(max(wanted, 0.0), left)
            self.seconds[name] += charged
            left -= charged
        self.seconds[remainder] += left


@dataclass(slots=True)
class _Attempt:
    """One process lifetime: its steps as (time, wishes) and its other events."""

    steps: list[tuple[float, list[tuple[str, float]]]]
    events: list[Record]

    def charge(self, ledger: _Ledger) -> None:
        pending = sorted(self.events, key=_moment)
        start = self._start_time(pending)
        if start is None:
            return
        ledger.advance(start, (), "restart")
        gap = "startup"
        for step_time, wishes in self.steps:
            ready = [event for event in pending if _moment(event) <= step_time]
            pending = pending[len(ready) :]
            first = [_time(event) for event in ready if event.get("kind") == "first_step"]
            if gap == "startup" and first:
                ledger.advance(first[0], wishes, gap)
                ledger.advance(step_time, _blocking(ready), "other")
            else:
                ledger.advance(step_time, [*wishes, *_blocking(ready)], gap)
            gap = "other"
        if pending:
            ledger.advance(max(map(_time, pending)), _blocking(pending), gap)

    def _start_time(self, pending: Sequence[Record]) -> float | None:
        for event in pending:
            started = number(event, "process_start_time")
            if started is not None:
                return started
        candidates = [_time(event) for event in pending]
        if self.steps:
            time, wishes = self.steps[0]
            candidates.append(time - sum(seconds for _, seconds in wishes))
        return min(candidates, default=None)


def _split_attempts(metrics: Sequence[Record], events: Sequence[Record]) -> dict[int, _Attempt]:
    attempts: defaultdict[int, _Attempt] = defaultdict(lambda: _Attempt(steps=[], events=[]))
    for record, lives in zip(metrics, survivors(metrics, events), strict=True):
        time = number(record, "time")
        if time is None:
            continue
        is_kept = lives and record.get("update") != "vetoed"
        data_seconds = number(record, "data_seconds") or 0.0
        step_seconds = number(record, "step_seconds") or 0.0
        wishes = [
            ("data_wait", data_seconds),
            ("training" if is_kept else "recomputed", step_seconds),
        ]
        attempts[integer(record, "attempt") or 0].steps.append((time, wishes))
    for event in events:
        if number(event, "time") is not None:
            attempts[integer(event, "attempt") or 0].events.append(event)
    return attempts


def _blocking(events: Sequence[Record]) -> list[tuple[str, float]]:
    return [
        (_BLOCKING_KINDS[str(event.get("kind"))], number(event, "seconds") or 0.0)
        for event in events
        if event.get("kind") in _BLOCKING_KINDS
    ]


def _time(record: Record) -> float:
    return number(record, "time") or 0.0


def _moment(record: Record) -> float:
    """Return when training stood still: a save is told of later, when it has become durable."""
    return _time(record) - (number(record, "background_seconds") or 0.0)
