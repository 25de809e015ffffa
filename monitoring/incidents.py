"""The incidents of a run as one row an attempt, joined from the recovery journal and the timeline.

Owns the join, what the starts found beside them, and the sentence that sums a run up. Refuses to
decide anything about recovery. Called by the console's summary, the report and the CLI.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from monitoring.goodput import Goodput
from monitoring.records import Record, RunRecords, integer, number, sample_range

SPIKE_VERDICTS = frozenset({"spike", "divergence", "nonfinite", "resume_discontinuity"})
"""What needs more than the refusal of one update; a level shift is accepted, so it is none."""

BAD_SHARDS = "bad_shards"
NOTICE_KINDS = (BAD_SHARDS, "settings_changed")
VETO = "veto"
_STOP = "stop"

Row = dict[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """What a start of the run found that is no incident, a line each.

    Files of tokens that cannot be used, whose samples are skipped; settings that are no longer
    those of the folder.
    """

    kind: str
    lines: tuple[str, ...]
    step: int | None = None
    unix_seconds: float | None = None


def collect_incidents(run: RunRecords) -> list[Record]:
    """One mapping an attempt, by incident and then in the journal's order; vetoes are left out.

    Keys beside the journal's: `attempt` (1 where an old journal has none), `rung` (likewise ""),
    `is_done`, `is_rewind` (it went back, or began to), `state` (done, cut short, observed, stopped,
    put back), `seconds` (detection to ready, or None), `num_skipped_samples` (its own range),
    `from_step`, `to_step` and `rewind_clock` where the timeline has them.
    """
    rows = _join(run.journal)
    for event in run.events:
        if event.get("kind") == "rewind" and integer(event, "incident") is not None:
            _add_event(rows, event)
    returned = [back for row in rows if (back := returned_samples(row)) is not None]
    for row in rows:
        skip = sample_range(row)
        row["num_skipped_samples"] = max(0, skip[1] - skip[0]) if skip else 0
        row["is_rewind"] = _is_rewind(row)
        row["state"] = _state(row, returned)
        row.setdefault("seconds", None)
    return sorted(rows, key=lambda row: integer(row, "incident") or 0)


def collect_vetoes(run: RunRecords) -> list[Record]:
    """The updates that were refused and written down, in the journal's order."""
    return [entry for entry in run.journal if entry.get("rung") == VETO]


def collect_notices(run: RunRecords) -> list[Notice]:
    """What the starts of a run found, in order; files still unusable at a restart are told once."""
    bad_shards: tuple[str, ...] = ()
    notices: list[Notice] = []
    for event in run.events:
        kind, lines = str(event.get("kind")), event.get("lines")
        if kind not in NOTICE_KINDS or not isinstance(lines, list) or not lines:
            continue
        texts = tuple(str(line) for line in lines)
        if kind == BAD_SHARDS:
            texts, bad_shards = tuple(text for text in texts if text not in bad_shards), texts
        if texts:
            step, time = integer(event, "step"), number(event, "time")
            notices.append(Notice(kind=kind, lines=texts, step=step, unix_seconds=time))
    return notices


def returned_samples(row: Record) -> tuple[int, int, int] | None:
    """What an attempt put back: `(position, start, stop)`, or None."""
    value = row.get("returned")
    if not isinstance(value, list | tuple) or len(value) != 3:
        return None
    position, start, stop = value
    if not (isinstance(position, int) and isinstance(start, int) and isinstance(stop, int)):
        return None
    return position, start, stop


def count_skipped_samples(rows: Sequence[Record]) -> int:
    """How many samples the attempts skip together, each once, without those put back."""
    ranges = [
        skip
        for row in rows
        if row.get("state") != "observed" and (skip := sample_range(row)) is not None
    ]
    count = reached = 0
    for start, stop in sorted(ranges):
        count += max(0, stop - max(start, reached))
        reached = max(reached, stop)
    backs = [back for row in rows if (back := returned_samples(row)) is not None]
    return count - sum(stop - start for _, start, stop in backs)


def count_spikes(curve: Sequence[Record], incidents: Sequence[Record] = ()) -> int:
    """How many episodes of bad verdicts there were; neighbouring steps are one episode.

    So is what comes again after an attempt and leads to the next one of the same incident.
    """
    spans = _spans(incidents)
    count = 0
    was_bad = False
    for record in curve:
        is_bad = record.get("verdict") in SPIKE_VERDICTS
        if is_bad and not was_bad:
            clock = integer(record, "clock") or 0
            count += not any(first < clock <= last for first, last in spans)
        was_bad = is_bad
    return count


def sum_up(run: RunRecords, incidents: Sequence[Record], goodput: Goodput) -> str:
    """The run in one sentence: how it ended, what happened, what was skipped, the goodput."""
    curve = run.curve
    steps = integer(run.summary, "steps")
    if steps is None:
        steps = (integer(curve[-1], "step") if curve else None) or 0
    starts = [event for event in run.events if event.get("kind") == "run_start"]
    num_observed = sum(row.get("state") == "observed" for row in incidents)
    bad_shards = {
        line
        for notice in collect_notices(run)
        if notice.kind == BAD_SHARDS
        for line in notice.lines
    }
    num_refused = integer(run.summary, "num_vetoed")
    if num_refused is None:
        num_refused = sum(record.get("update") == "vetoed" for record in curve)
    parts = [
        plural(count_spikes(curve, incidents), "spike"),
        _rewinds(run, incidents),
        f"{num_observed:,} only observed",
        plural(len({integer(start, "attempt") or 0 for start in starts}) - 1, "restart"),
        _skipped(run, incidents),
        f"{plural(num_refused, 'update')} refused",
        f"{plural(len(bad_shards), 'bad shard')}",
    ]
    happened = ", ".join(part for part in parts if part[0] not in "0-") or "no incidents"
    opening = f"{_ending(run)} {plural(steps, 'step')}"
    return f"{opening}; {happened}; goodput {goodput.goodput:.0%}"


def plural(count: int, noun: str) -> str:
    """`1 spike`, `2 spikes`, with thousands separated."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def short_count(count: float) -> str:
    """A count with a unit prefix: 950, 33k, 1.2M, 4.5B."""
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            scaled = count / limit
            return f"{scaled:.0f}{suffix}" if scaled >= 10 else f"{scaled:.1f}{suffix}"
    return f"{count:.0f}"


def in_words(name: object) -> str:
    """A rung or a verdict for people: `skip_further` is `skip further`."""
    return str(name or "").replace("_", " ")


def _join(journal: Sequence[Record]) -> list[Row]:
    """Join each intent with its done; what is done at once, or observed, stands alone."""
    rows: list[Row] = []
    intents: dict[tuple[object, ...], Row] = {}
    for entry in journal:
        incident = integer(entry, "incident")
        if incident is None or entry.get("rung") == VETO:
            continue
        attempt, rung = integer(entry, "attempt") or 1, str(entry.get("rung") or "")
        key = (incident, attempt, rung, entry.get("request") or "")
        row = intents.pop(key, None)
        if row is None:
            row = {"incident": incident, "attempt": attempt, "rung": rung}
            rows.append(row)
        row.update({name: value for name, value in entry.items() if value is not None})
        row["is_done"] = entry.get("phase") == "done"
        if entry.get("phase") == "intent":
            intents[key] = row
    return rows


def _add_event(rows: list[Row], event: Record) -> None:
    """Give a rewind's event to its row, found by the clock that both carry; else make a row."""
    incident, clock = integer(event, "incident"), integer(event, "from_clock")
    known = [
        row
        for row in rows
        if row["incident"] == incident and _is_rewind(row) and "rewind_clock" not in row
    ]
    same = [row for row in known if clock is not None and integer(row, "clock") == clock]
    row = next(iter(same or known), None)
    if row is None:
        row = {"incident": incident, "attempt": 1, "rung": str(event.get("rung") or "")}
        rows.append(row)
    row.update(is_done=True, rewind_clock=integer(event, "clock"))
    for name in ("from_step", "to_step", "skip", "reason"):
        if event.get(name) is not None:
            row.setdefault(name, event[name])
    if number(event, "seconds"):  # 0 if a restart finished it: that time is not known
        row["seconds"] = event["seconds"]


def _is_rewind(row: Record) -> bool:
    """True of what has a target and was not merely observed; old journals know nothing else."""
    is_one = row.get("target_checkpoint") or not row.get("rung") or "rewind_clock" in row
    return bool(is_one) and row.get("phase") != "observed"


def _state(row: Record, returned: Sequence[tuple[int, int, int]]) -> str:
    if row.get("phase") == "observed":
        return "observed"
    if row.get("rung") == _STOP:
        return "stopped"
    if not row.get("is_done"):
        return "cut short"
    skip = sample_range(row)
    is_back = skip is not None and any(
        start <= skip[0] < skip[1] <= stop for _, start, stop in returned
    )
    return "put back" if is_back else "done"


def _spans(incidents: Sequence[Record]) -> list[tuple[int, int]]:
    """Of each incident, the clocks of its first and of its last attempt."""
    clocks: dict[object, list[int]] = {}
    for row in incidents:
        clock = integer(row, "clock")
        if clock is not None:
            clocks.setdefault(row.get("incident"), []).append(clock)
    return [(min(found), max(found)) for found in clocks.values()]


def _rewinds(run: RunRecords, incidents: Sequence[Record]) -> str:
    """`2 rewinds (replay, skip)`; an old journal does not say of which kind."""
    done = [row for row in incidents if row.get("is_rewind") and row.get("is_done")]
    count = integer(run.summary, "rewinds")
    text = plural(len(done) if count is None else count, "rewind")
    names = [in_words(row.get("rung")) for row in done if row.get("rung")]
    rungs = Counter("by hand" if name == "rewind" else name for name in names)
    kinds = [rung if times == 1 else f"{times} {rung}" for rung, times in rungs.items()]
    return f"{text} ({', '.join(kinds)})" if kinds else text


def _ending(run: RunRecords) -> str:
    if run.summary.get("finished"):
        return "Completed"
    reasons = [run.summary.get("reason")]
    reasons += [event.get("reason") for event in run.events if event.get("kind") == "run_end"]
    reasons.append(in_words(run.summary.get("reason_code")))  # shorter than a reason
    reason = next((str(reason) for reason in reversed(reasons) if reason), "")
    if reason == "completed":
        return "Completed"
    if run.summary or reason:
        return f"Stopped ({reason}) after" if reason not in ("", "stopped") else "Stopped after"
    return "Unfinished:" if run.metrics else "Not started:"


def _skipped(run: RunRecords, incidents: Sequence[Record]) -> str:
    tokens = number(run.summary, "skipped_tokens")
    if tokens is not None:
        return f"{short_count(tokens)} tokens skipped"
    return f"{plural(count_skipped_samples(incidents), 'sample')} skipped"
