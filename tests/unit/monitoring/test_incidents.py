"""One row an attempt: intents joined, acts without parts alone, refusals and observations apart."""

from __future__ import annotations

import pytest
from synthetic_run import RunScript

from monitoring.goodput import Goodput, compute_goodput
from monitoring.incidents import (
    collect_incidents,
    collect_notices,
    collect_vetoes,
    count_skipped_samples,
    count_spikes,
    returned_samples,
    sum_up,
)
from monitoring.records import read_run

GOODPUT = Goodput()


def test_attempts_of_one_incident_are_rows_of_their_own(ladder_run: RunScript) -> None:
    rows = collect_incidents(read_run(ladder_run.folder))
    assert [(row["incident"], row["attempt"], row["rung"], row["state"]) for row in rows] == [
        (1, 1, "replay", "done"),
        (1, 2, "skip", "put back"),
        (2, 1, "skip_ahead", "done"),
        (3, 1, "cool", "done"),
        (4, 1, "unskip", "done"),
        (9, 1, "replay", "observed"),
    ]
    assert [row["seconds"] for row in rows] == [0.4, 0.4, None, 0.4, None, None]
    assert [row["is_rewind"] for row in rows] == [True, True, False, True, False, False]


def test_each_event_goes_to_the_attempt_with_its_clock(ladder_run: RunScript) -> None:
    ladder_run.events = [
        event for event in ladder_run.events if event.get("rung") != "replay"
    ]  # its process died before it could tell
    rows = collect_incidents(read_run(ladder_run.write()))
    assert [row["seconds"] for row in rows[:2]] == [None, 0.4]


def test_rewind_that_a_restart_finished_has_no_known_seconds(script: RunScript) -> None:
    script.climb(1, 1, "skip", 0, skip=[0, 8])
    script.events[-1]["seconds"] = 0.0
    (row,) = collect_incidents(read_run(script.write()))
    assert (row["state"], row["seconds"]) == ("done", None)


def test_refused_updates_are_no_incidents(ladder_run: RunScript) -> None:
    run = read_run(ladder_run.folder)
    assert [veto["verdict"] for veto in collect_vetoes(run)] == ["nonfinite"]
    assert 0 not in {row["incident"] for row in collect_incidents(run)}


def test_intent_that_was_cut_short_counts_its_skip_and_no_rewind(script: RunScript) -> None:
    script.train(5)
    script.climb(1, 1, "replay", 2)
    script.climb(1, 2, "skip", 2, skip=[16, 40])
    script.journal.pop()
    script.events.pop()
    run = read_run(script.write())
    rows = collect_incidents(run)
    assert [row["state"] for row in rows] == ["done", "cut short"]
    assert count_skipped_samples(rows) == 24
    assert "1 rewind (replay), 24 samples skipped" in sum_up(run, rows, GOODPUT)


def test_stop_is_a_row_beside_the_attempt_of_the_same_number(script: RunScript) -> None:
    script.train(5)
    script.climb(1, 1, "skip", 2, skip=[16, 40])
    script.record(1, "stop", code="ladder_exhausted")
    rows = collect_incidents(read_run(script.write()))
    assert [(row["rung"], row["state"]) for row in rows] == [("skip", "done"), ("stop", "stopped")]
    assert "is_rewind" in rows[1] and not rows[1]["is_rewind"]


def test_two_observations_of_one_number_stay_two(script: RunScript) -> None:
    for _ in range(2):
        script.record(1, "replay", "observed")
    assert len(collect_incidents(read_run(script.write()))) == 2


def test_skipped_samples_count_once_and_without_what_came_back() -> None:
    rows = [
        {"state": "done", "skip": [100, 200]},
        {"state": "done", "skip": [150, 260]},
        {"state": "observed", "skip": [500, 900]},
        {"state": "done", "skip": [300, 300], "returned": [9000, 100, 140]},
    ]
    assert count_skipped_samples(rows) == 160 - 40


@pytest.mark.parametrize("value", [None, [1, 2], "abc", [1, 2, "3"], 7])
def test_returns_of_another_form_are_none(value: object) -> None:
    assert returned_samples({"returned": value}) is None


def test_spike_that_comes_back_after_a_replay_is_the_same_spike(ladder_run: RunScript) -> None:
    run = read_run(ladder_run.folder)
    assert count_spikes(run.curve) == 4
    assert count_spikes(run.curve, collect_incidents(run)) == 3


def test_accepted_level_is_no_spike() -> None:
    curve = [{"clock": clock, "verdict": kind} for clock, kind in enumerate(["ok", "level_shift"])]
    assert count_spikes(curve) == 0


def test_ladder_is_summed_up_by_what_was_done(ladder_run: RunScript) -> None:
    run = read_run(ladder_run.folder)
    goodput = compute_goodput(run.metrics, run.events)
    text = sum_up(run, collect_incidents(run), goodput)
    assert text.startswith(
        "Completed 400 steps; 3 spikes, 3 rewinds (replay, skip, cool), 1 only observed, "
        "164 samples skipped, 1 update refused; goodput "
    )


def test_rungs_climbed_often_are_counted(script: RunScript) -> None:
    script.train(5)
    for attempt, rung in enumerate(["replay", "skip_further", "skip_further", "rewind"], start=1):
        script.climb(1, attempt, rung, 2)
        script.train(3)
    run = read_run(script.write())
    text = sum_up(run, collect_incidents(run), GOODPUT)
    assert "4 rewinds (replay, 2 skip further, by hand)" in text


def test_end_is_named_by_its_code_where_there_is_one(script: RunScript) -> None:
    script.train(5)
    summary = {"reason": "a long sentence", "reason_code": "ladder_exhausted", "steps": 5}
    run = read_run(script.write(summary=summary))
    assert sum_up(run, (), GOODPUT).startswith("Stopped (ladder exhausted) after 5 steps")


def test_snapshots_cost_what_the_loop_waited_for_them(ladder_run: RunScript) -> None:
    run = read_run(ladder_run.folder)
    goodput = compute_goodput(run.metrics, run.events)
    stall = ladder_run.spent["checkpoint_stall"]
    assert goodput.checkpoint_stall == pytest.approx(stall)


def test_notices_are_in_order_and_files_still_bad_at_a_restart_come_once(
    script: RunScript,
) -> None:
    script.start()
    script.event("bad_shards", lines=["a is short", "b is gone"])
    script.train(5)
    script.crash(back_to_step=2)
    script.start()
    script.event("bad_shards", lines=["a is short", "b is gone"])
    script.event("settings_changed", lines=["run.steps: the folder has 40, now 60"])
    script.train(5)
    script.crash(back_to_step=4)
    script.start()
    script.event("bad_shards", lines=["a is short", "c is gone"])
    run = read_run(script.write())
    assert [(found.kind, found.step, found.lines) for found in collect_notices(run)] == [
        ("bad_shards", 0, ("a is short", "b is gone")),
        ("settings_changed", 2, ("run.steps: the folder has 40, now 60",)),
        ("bad_shards", 4, ("c is gone",)),
    ]
    assert ", 3 bad shards; goodput" in sum_up(run, (), GOODPUT)


@pytest.mark.parametrize("lines", [None, [], "text", {"a": 1}])
def test_notice_without_lines_is_none(script: RunScript, lines: object) -> None:
    script.event("bad_shards", lines=lines)
    run = read_run(script.write())
    assert collect_notices(run) == []
    assert "bad shard" not in sum_up(run, (), GOODPUT)
