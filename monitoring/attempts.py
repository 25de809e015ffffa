"""The attempts of a run, one process lifetime each, cut into pieces of seconds by their records.

Owns the rule by which each piece is charged: a piece ends at a record, what the record says of its
seconds is charged first, and the rest of the piece goes to what was going on. So nothing is counted
twice, and work that runs beside training (a background save) costs only what training waited for.
Refuses the wall clock where records carry the time since boot. Called by `goodput` alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass

from monitoring.records import Record, integer, number
from monitoring.survival import SkippedSamples, survivors

Wishes = list[tuple[str, float]]
"""Classes and the seconds they ask for; they are served in order, as far as a piece goes."""

_BLOCKING_KINDS: Mapping[str, str] = {
    "compile": "compile",
    "checkpoint_saved": "checkpoint_stall",
    "checkpoint_failed": "checkpoint_stall",
    "snapshot": "checkpoint_stall",
    "rewind": "rewind",
    "evaluation": "evaluation",
    "integrity_check": "evaluation",
    "hang": "hang_detection",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mark:
    """A record and its place on the attempt's own axis, in seconds."""

    at: float
    record: Record


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """An executed step: when it ended, its seconds, and the classes that share them."""

    at: float
    data_seconds: float
    step_seconds: float
    compile_seconds: float
    shares: Mapping[str, float]

    def wishes(self, told: float) -> Wishes:
        """What it asks for; `told`: seconds of compiling that events place within it."""
        compiling = min(max(self.compile_seconds, told), self.step_seconds)
        working = self.step_seconds - compiling
        return [
            ("compile", compiling),
            ("data_wait", self.data_seconds),
            *((name, share * working) for name, share in self.shares.items()),
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One process lifetime. Times are on its own axis: since boot, or of the wall clock.

    `starts`: when its launcher and its process began, or the first record; latest last.
    `axis_to_unix`: what to add to the end's place for the wall clock at the end; `start_to_unix`
    likewise at the start, since the clock may have been set between.
    """

    boot_id: str
    starts: tuple[float, ...]
    start_to_unix: float
    end: float
    end_to_unix: float
    steps: tuple[_Step, ...]
    events: tuple[_Mark, ...]

    @property
    def is_completed(self) -> bool:
        """True if nothing was left to do at its end, so that nobody waited for the next one."""
        ends = [mark.record for mark in self.events if _kind(mark) == "run_end"]
        return any(record.get("reason") == "completed" for record in ends)

    def seconds_since(self, before: Attempt) -> float:
        """Seconds from the end of an attempt to the start of this one, 0 at least."""
        return max(0.0, self._gap(self._start(before), before))

    def seconds(self, *, after: Attempt | None) -> float:
        """Seconds from its start to its last record."""
        return self.end - self._start(after)

    def _gap(self, start: float, before: Attempt) -> float:
        if self.boot_id and self.boot_id == before.boot_id:
            return start - before.end
        return (start + self.start_to_unix) - (before.end + before.end_to_unix)

    def _start(self, before: Attempt | None) -> float:
        """The start of the launcher, unless that has seen an earlier attempt end already."""
        for start in self.starts:
            if before is None or self._gap(start, before) >= 0:
                return start
        if before is not None and self.boot_id and self.boot_id == before.boot_id:
            return min(before.end, self.end)  # one process that made several attempts
        return self.starts[-1]

    def charge(self, seconds: MutableMapping[str, float], *, after: Attempt | None) -> None:
        """Add the seconds from start to end to their classes."""
        pieces = _Pieces(seconds, self._start(after))
        rest = "startup"
        waiting = list(reversed(self.events))
        for step in self.steps:
            ready: list[_Mark] = []
            while waiting and waiting[-1].at <= step.at:
                ready.append(waiting.pop())
            first = [mark.at for mark in ready if _kind(mark) == "first_step"]
            if rest == "startup" and first and first[0] < step.at:
                pieces.charge(first[0], [], rest)  # its own metrics are missing
                rest = "idle"
            began = step.at - step.step_seconds
            inside = [mark for mark in ready if mark.at > began and _kind(mark) == "compile"]
            outside = [mark for mark in ready if mark not in inside]
            wishes = step.wishes(sum(_seconds(mark) for mark in inside))
            pieces.charge(step.at, [*wishes, *_blocking(outside)], _rest(rest, outside))
            rest = "idle"
        for mark in reversed(waiting):
            pieces.charge(mark.at, _blocking([mark]), _rest(rest, [mark]))


class _Pieces:
    """Charges consecutive pieces of time; it never moves back."""

    def __init__(self, seconds: MutableMapping[str, float], start: float) -> None:
        self._seconds = seconds
        self._cursor = start

    def charge(self, until: float, wishes: Wishes, rest: str) -> None:
        """Charge what lies between the last piece and `until`."""
        left = max(0.0, until - self._cursor)
        self._cursor = max(self._cursor, until)
        for name, wanted in wishes:
            charged = min(max(wanted, 0.0), left)
            self._seconds[name] += charged
            left -= charged
        self._seconds[rest] += left


def split_attempts(metrics: Sequence[Record], events: Sequence[Record]) -> list[Attempt]:
    """The attempts of a run in order, from all its metrics lines and events, in any order."""
    metrics = sorted(metrics, key=_number_of)  # stable: within an attempt, the file's order
    skipped = SkippedSamples.from_events(events)
    steps: defaultdict[int, list[tuple[Record, Mapping[str, float]]]] = defaultdict(list)
    for record, lives in zip(metrics, survivors(metrics, events), strict=True):
        steps[_number_of(record)].append((record, _shares(record, lives=lives, skipped=skipped)))
    others: defaultdict[int, list[Record]] = defaultdict(list)
    for event in events:
        others[_number_of(event)].append(event)
    found = (_attempt(steps[key], others[key]) for key in sorted(steps.keys() | others.keys()))
    return [attempt for attempt in found if attempt is not None]


def _attempt(
    steps: Sequence[tuple[Record, Mapping[str, float]]], events: Sequence[Record]
) -> Attempt | None:
    axis = _Axis([*(record for record, _ in steps), *events])
    taken = tuple(
        _Step(
            at=at,
            data_seconds=max(0.0, number(record, "data_seconds") or 0.0),
            step_seconds=max(0.0, number(record, "step_seconds") or 0.0),
            compile_seconds=max(0.0, number(record, "compile_seconds") or 0.0),
            shares=shares,
        )
        for record, shares in steps
        if (at := axis.place(record)) is not None
    )
    told = [(at, event) for event in events if (at := axis.place(event)) is not None]
    marks = [_Mark(at=at - _seconds_ago(event), record=event) for at, event in told]
    marks.sort(key=lambda mark: mark.at)
    if not taken and not marks:
        return None
    start = next((mark for mark in marks if "process_start_time" in mark.record), None)
    starts = _starts(start) if start is not None else ()
    if not starts:
        firsts = [step.at - step.data_seconds - step.step_seconds for step in taken[:1]]
        starts = (min([*firsts, *(mark.at for mark in marks[:1])]),)
    places = [*(step.at for step in taken), *(at for at, _ in told)]
    end = max([starts[-1], *places])
    return Attempt(
        boot_id=str(start.record.get("boot_id") or "") if start is not None else "",
        starts=starts,
        start_to_unix=axis.to_unix(min(places) if start is None else start.at),
        end=end,
        end_to_unix=axis.to_unix(end),
        steps=taken,
        events=tuple(marks),
    )


def _seconds_ago(event: Record) -> float:
    """How long ago the loop stood still: a save is told of when it has become durable."""
    return max(0.0, number(event, "background_seconds") or 0.0)


def _starts(mark: _Mark) -> tuple[float, ...]:
    """When the launcher and the process began, by what the event of the start knows."""
    record = mark.record
    ages = [number(record, "launcher_seconds"), number(record, "process_seconds")]
    known = [age for age in ages if age is not None]
    time, started = number(record, "time"), number(record, "process_start_time")
    if not known and time is not None and started is not None:
        known = [time - started]
    return tuple(mark.at - max(0.0, age) for age in known)


class _Axis:
    """Places the records of an attempt: by the time since boot where they have it.

    A record that has the wall clock alone (written by another process, as when an attempt is ended
    from outside) is placed by what the two clocks differed by in the last record that has both.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        both = [
            (uptime, time)
            for record in records
            if (uptime := number(record, "uptime")) is not None
            and (time := number(record, "time")) is not None
        ]
        uptime, time = max(both, default=(0.0, 0.0))
        self._offset = uptime - time
        self._times = dict(both)

    def place(self, record: Record) -> float | None:
        """Where on the axis a record lies, None if it has no time."""
        uptime, time = number(record, "uptime"), number(record, "time")
        if uptime is not None:
            return uptime
        return None if time is None else time + self._offset

    def to_unix(self, place: float) -> float:
        """What to add at a record's place for the wall clock that it saw."""
        return self._times[place] - place if place in self._times else -self._offset


def _shares(record: Record, *, lives: bool, skipped: SkippedSamples) -> Mapping[str, float]:
    if lives:
        return {"recomputed" if record.get("update") == "vetoed" else "training": 1.0}
    gone = skipped.share_of(record)
    return {"skipped_tokens": gone, "recomputed": 1.0 - gone}


def _rest(rest: str, marks: Sequence[_Mark]) -> str:
    """What the rest of a piece goes to; a rewind drops the step under way, which has no record."""
    is_back = any(_kind(mark) == "rewind" and _seconds(mark) > 0 for mark in marks)
    return "recomputed" if is_back and rest == "idle" else rest


def _blocking(marks: Sequence[_Mark]) -> Wishes:
    return [
        (_BLOCKING_KINDS[kind], _seconds(mark))
        for mark in marks
        if (kind := _kind(mark)) in _BLOCKING_KINDS
    ]


def _kind(mark: _Mark) -> str:
    return str(mark.record.get("kind"))


def _seconds(mark: _Mark) -> float:
    """What the loop stood still for; a step that was executed twice has it in its own seconds."""
    is_in_step = mark.record.get("check") == "reexecution"
    return 0.0 if is_in_step else number(mark.record, "seconds") or 0.0


def _number_of(record: Record) -> int:
    return integer(record, "attempt") or 0
