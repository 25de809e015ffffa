"""Whatever the records say, the classes add up to the wall time and none is negative."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from monitoring.goodput import compute_goodput

Json = dict[str, Any]

KINDS = (
    "run_start",
    "first_step",
    "compile",
    "checkpoint_saved",
    "checkpoint_failed",
    "snapshot",
    "rewind",
    "ledger_change",
    "evaluation",
    "hang",
    "note",
    "run_end",
    "exit",
)

times = st.floats(min_value=0.0, max_value=1e6) | st.none() | st.just("nonsense")
seconds = st.floats(min_value=-10.0, max_value=1e5) | st.none() | st.just(float("nan"))
counts = st.integers(min_value=0, max_value=60) | st.none()
ranges = st.lists(st.integers(min_value=0, max_value=400), min_size=0, max_size=3)


def some(fields: Mapping[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[Json]:
    """Records of which any field may be missing."""
    return st.fixed_dictionaries({}, optional=dict(fields))


common = {
    "time": times,
    "uptime": times,
    "attempt": st.integers(min_value=0, max_value=3),
    "clock": counts,
    "step": counts,
}
steps = some(
    {
        **common,
        "cursor": counts,
        "batch_samples": counts,
        "update": st.sampled_from(["applied", "vetoed"]),
        "step_seconds": seconds,
        "data_seconds": seconds,
        "compile_seconds": seconds,
    }
)
happenings = some(
    {
        **common,
        "kind": st.sampled_from(KINDS),
        "seconds": seconds,
        "process_start_time": times,
        "process_seconds": seconds,
        "launcher_seconds": seconds,
        "boot_id": st.sampled_from(["a", "b", ""]),
        "to_step": counts,
        "skip": ranges,
        "returned": ranges,
        "reason": st.sampled_from(["completed", "preempted"]),
    }
)


@settings(max_examples=300, deadline=None)
@given(metrics=st.lists(steps, max_size=20), events=st.lists(happenings, max_size=12))
def test_any_records(metrics: list[Json], events: list[Json]) -> None:
    found = compute_goodput(metrics, events)
    spent = found.seconds_by_class()
    assert min(spent.values()) >= 0.0
    assert abs(sum(spent.values()) - found.wall_seconds) <= 1e-9 * found.wall_seconds + 1e-6


@settings(max_examples=100, deadline=None)
@given(
    gaps=st.lists(st.floats(min_value=0.0, max_value=500.0), min_size=1, max_size=4),
    lengths=st.lists(st.floats(min_value=0.01, max_value=50.0), min_size=1, max_size=8),
    jumps=st.lists(st.floats(min_value=-7200.0, max_value=7200.0), min_size=8, max_size=8),
)
def test_wall_time_is_what_passed_however_the_clock_is_set(
    gaps: list[float], lengths: list[float], jumps: list[float]
) -> None:
    """The host counts `uptime`; its wall clock is anything."""
    uptime, step = 500.0, 0
    began = uptime
    metrics: list[Json] = []
    events: list[Json] = []
    for attempt, gap in enumerate(gaps):
        uptime += gap if attempt else 0.0
        uptime += 3.0
        wall = 1e9 + uptime + jumps[attempt]
        start = {"kind": "run_start", "process_start_time": 0.0, "process_seconds": 3.0}
        at = {"attempt": attempt, "uptime": uptime}
        events.append({**start, **at, "boot_id": "a", "time": wall})
        for number, length in enumerate(lengths):
            uptime, step = uptime + length, step + 1
            time = 1e9 + uptime + jumps[number]
            stamp = {"attempt": attempt, "uptime": uptime, "time": time}
            metrics.append({**stamp, "step": step, "step_seconds": length})
    found = compute_goodput(metrics, events)
    assert abs(found.wall_seconds - (uptime - began)) < 1e-6
    assert abs(found.training - len(gaps) * sum(lengths)) < 1e-6
    assert abs(found.restart - sum(gaps[1:])) < 1e-6
