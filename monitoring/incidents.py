"""The incidents of a run as one row each, joined from the recovery journal and the timeline.

Owns the join and the sentence that sums a run up. Refuses to decide anything about recovery. Called
by the console's summary, the report and the CLI.
"""

from __future__ import annotations

from collections.abc import Sequence

from monitoring.goodput import Goodput
from monitoring.records import Record, RunRecords, integer, number, sample_range

SPIKE_VERDICTS = frozenset({"spike", "divergence", "level_shift", "nonfinite"})


def collect_incidents(run: RunRecords) -> list[Record]:
    """One mapping an incident, by id: the journal's keys, with what the rewind event adds.

    Keys beside the journal's: `is_done` (bool), `seconds` (detection to ready, or None),
    `num_skipped_samples` (int), `from_step`, `to_step` and `rewind_clock` where the timeline has
    them. An intent that no `done` followed shows with `is_done` False.
    """
    rows: dict[int, dict[str, object]] = {}
    for entry in run.journal:
        incident = integer(entry, "incident")
        if incident is None:
            continue
        row = rows.setdefault(incident, {"incident": incident, "is_done": False})
        row.update({key: value for key, value in entry.items() if value is not None})
        row["is_done"] = bool(row["is_done"]) or entry.get("phase") == "done"
    for event in run.events:
        incident = integer(event, "incident")
        if event.get("kind") != "rewind" or incident is None:
            continue
        row = rows.setdefault(incident, {"incident": incident})
        row.update(is_done=True, rewind_clock=integer(event, "clock"))
        for key in ("seconds", "from_step", "to_step", "skip", "reason"):
            if event.get(key) is not None:
                row.setdefault(key, event[key])
    for row in rows.values():
        skip = sample_range(row)
        row["num_skipped_samples"] = max(0, skip[1] - skip[0]) if skip else 0
        row.setdefault("seconds", None)
    return [rows[incident] for incident in sorted(rows)]


def count_spikes(curve: Sequence[Record]) -> int:
    """How many episodes of bad verdicts there were; neighbouring steps are one episode."""
    count = 0
    was_bad = False
    for record in curve:
        is_bad = record.get("verdict") in SPIKE_VERDICTS
        count += is_bad and not was_bad
        was_bad = is_bad
    return count


def sum_up(run: RunRecords, incidents: Sequence[Record], goodput: Goodput) -> str:
    """The run in one sentence: how it ended, what happened, what was skipped, the goodput."""
    curve = run.curve
    steps = integer(run.summary, "steps")
    if steps is None:
        steps = (integer(curve[-1], "step") if curve else None) or 0
    num_rewinds = integer(run.summary, "rewinds")
    if num_rewinds is None:
        num_rewinds = sum(event.get("kind") == "rewind" for event in run.events)
    parts = [plural(count_spikes(curve), "spike"), plural(num_rewinds, "rewind")]
    num_restarts = len({integer(record, "attempt") or 0 for record in run.events}) - 1
    if num_restarts > 0:
        parts.append(plural(num_restarts, "restart"))
    skipped = _skipped(run, incidents)
    if skipped:
        parts.append(skipped)
    happened = ", ".join(part for part in parts if not part.startswith("0 ")) or "no incidents"
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


def _ending(run: RunRecords) -> str:
    if run.summary.get("finished"):
        return "Completed"
    reasons = [run.summary.get("reason")]
    reasons += [event.get("reason") for event in run.events if event.get("kind") == "run_end"]
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
    samples = sum(integer(row, "num_skipped_samples") or 0 for row in incidents)
    return f"{plural(samples, 'sample')} skipped"
