"""The accounting of wall time, against a run whose every second is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from synthetic_run import START, Json, RunScript

from monitoring.goodput import Goodput, compute_goodput, goodput_of_run, total
from monitoring.survival import survivors, thrown_away


def test_each_class_matches_a_run_with_a_rewind_and_a_crash(recovered_run: RunScript) -> None:
    found = goodput_of_run(recovered_run.folder)
    expected = {**dict.fromkeys(found.seconds_by_class(), 0.0), **recovered_run.spent}
    assert found.seconds_by_class() == pytest.approx(expected, abs=0.05)
    assert found.wall_seconds == pytest.approx(recovered_run.time - START)


def test_classes_add_up_to_the_wall_time(recovered_run: RunScript) -> None:
    found = goodput_of_run(recovered_run.folder)
    assert sum(found.seconds_by_class().values()) == pytest.approx(found.wall_seconds)
    assert sum(share for _, _, share in found.as_table()) == pytest.approx(1.0)
    assert found.goodput == pytest.approx(found.training / found.wall_seconds)


def test_run_without_records_took_no_time() -> None:
    assert compute_goodput([], []) == Goodput()
    assert Goodput().goodput == 0.0


def test_attempt_that_never_took_a_step_is_startup(script: RunScript) -> None:
    script.start()
    found = compute_goodput([], script.events)
    assert found.startup == found.wall_seconds == pytest.approx(12.0)


def test_background_save_costs_only_what_training_waited(script: RunScript) -> None:
    script.start()
    script.train(10)
    script.event("checkpoint_saved", seconds=500.0, bytes=1, path="a")
    script.train(10)
    found = compute_goodput(script.metrics, script.events)
    assert found.checkpoint_stall == pytest.approx(0.0, abs=0.01)
    assert found.training == pytest.approx(5.0, abs=0.01)


def test_wait_for_a_save_is_charged_when_it_was_and_not_when_it_is_told(script: RunScript) -> None:
    script.start()
    script.train(10)
    script.spend("checkpoint_stall", 0.8)
    stalled = script.time
    script.train(10)
    background = script.time - stalled
    script.event("checkpoint_saved", seconds=0.8, background_seconds=background, path="a")
    script.train(10)
    found = compute_goodput(script.metrics, script.events)
    assert found.checkpoint_stall == pytest.approx(0.8, abs=0.01)
    assert found.training == pytest.approx(7.5, abs=0.01)


def test_step_seconds_that_include_the_data_wait_are_not_counted_twice(script: RunScript) -> None:
    script.start()
    script.train(10)
    for record in script.metrics:
        record["step_seconds"] = 0.26
    found = compute_goodput(script.metrics, script.events)
    assert found.data_wait == pytest.approx(0.1, abs=0.01)
    assert found.training == pytest.approx(2.5, abs=0.01)


def test_clock_that_jumps_back_never_makes_a_class_negative(script: RunScript) -> None:
    script.start()
    script.train(10)
    for record in script.metrics[5:]:
        record["time"] = START - 1000.0
    found = compute_goodput(script.metrics, script.events)
    assert min(found.seconds_by_class().values()) >= 0.0
    assert sum(found.seconds_by_class().values()) == pytest.approx(found.wall_seconds)


def test_vetoed_step_is_not_training(script: RunScript) -> None:
    script.start()
    script.train(9)
    script.train(1, verdict="nonfinite")
    found = compute_goodput(script.metrics, script.events)
    assert found.recomputed == pytest.approx(0.25, abs=0.01)


def test_rewind_that_nothing_followed_yet_already_throws_work_away(script: RunScript) -> None:
    script.start()
    script.train(10)
    script.rewind(1, to_step=6, skip=[0, 8])
    lives = survivors(script.metrics, script.events)
    assert lives == [True] * 6 + [False] * 4
    assert thrown_away(script.metrics, lives) == [(7, 10)]


def test_work_before_two_rewinds_to_one_checkpoint_is_thrown_away_once(script: RunScript) -> None:
    script.train(10)
    script.rewind(1, to_step=6, skip=[0, 8])
    script.train(4)
    script.rewind(2, to_step=6, skip=[8, 16])
    script.train(4)
    lives = survivors(script.metrics, script.events)
    assert lives == [True] * 6 + [False] * 8 + [True] * 4


def test_every_evaluation_counts_once_and_nothing_else_grows(script: RunScript) -> None:
    script.start()
    for seconds in (0.5, 2.0, 0.125, 1.0):
        script.train(10)
        script.evaluate(seconds=seconds, web=3.0, code=2.0)
        script.save()
    script.train(1)
    script.rewind(1, to_step=40, skip=[0, 8])
    script.evaluate(web=3.0, code=2.0)
    script.train(10)
    script.evaluate(web=3.0, code=2.0)
    script.crash(back_to_step=50)
    script.start()
    script.train(5)
    script.evaluate(seconds=3.0, web=3.0, code=2.0)
    script.event("run_end", reason="completed")
    script.spent["training"] -= 0.25  # the step that was rewound
    script.spent["recomputed"] = 0.25
    found = compute_goodput(script.metrics, script.events)
    expected = {**dict.fromkeys(found.seconds_by_class(), 0.0), **script.spent}
    assert found.seconds_by_class() == pytest.approx(expected, abs=0.001)
    assert found.evaluation == pytest.approx(0.5 + 2.0 + 0.125 + 1.0 + 0.5 + 0.5 + 3.0)
    assert found.wall_seconds == pytest.approx(script.time - START)


def test_evaluation_that_spans_its_gap_leaves_the_step_its_own_seconds(script: RunScript) -> None:
    script.start()
    script.train(10)
    script.evaluate(seconds=2.0, web=3.0)
    script.events[-1]["seconds"] = 2.26  # began while the step before was still under way
    script.train(10)
    found = compute_goodput(script.metrics, script.events)
    assert found.training == pytest.approx(5.0, abs=0.001)
    assert found.data_wait == pytest.approx(0.2, abs=0.001)
    assert found.evaluation == pytest.approx(2.0, abs=0.001)
    assert sum(found.seconds_by_class().values()) == pytest.approx(found.wall_seconds)


# The classes that a run with a rewind, a crash and an evaluation does not show.


def classes(script: RunScript) -> dict[str, float]:
    found = compute_goodput(script.metrics, script.events)
    assert sum(found.seconds_by_class().values()) == pytest.approx(found.wall_seconds)
    return {name: seconds for name, seconds in found.seconds_by_class().items() if seconds > 1e-6}


def test_every_class_that_was_asked_for_exists() -> None:
    assert list(Goodput().seconds_by_class()) == [
        "restart", "startup", "compile", "data_wait", "checkpoint_stall", "evaluation",
        "hang_detection", "rewind", "recomputed", "skipped_tokens", "idle", "training",
    ]  # fmt: skip


def test_silence_before_a_hang_was_found_is_hang_detection(script: RunScript) -> None:
    script.start()
    script.train(10)
    script.spend("idle", 2.0)  # whatever the silence does not cover
    script.spend("hang_detection", 90.0)
    script.event("hang", seconds=90.0, phase="step", ranks=[3])
    script.crash(back_to_step=10)
    script.start()
    script.train(1)
    assert classes(script) == pytest.approx(script.spent)


def test_hang_that_another_process_reports_is_placed_by_the_wall_clock(script: RunScript) -> None:
    script.boot_id = "a"
    script.start()
    script.train(10)
    script.clock_was_set = 3600.0
    script.train(10)
    script.spend("hang_detection", 90.0)
    script.event("hang", seconds=90.0, phase="step", ranks=[3])
    del script.events[-1]["uptime"]
    assert classes(script) == pytest.approx(script.spent)


def test_compiling_in_the_first_step_is_not_training(script: RunScript) -> None:
    script.start()
    script.train(10)
    first = script.metrics[0]
    first["compile_seconds"] = 0.2
    assert classes(script)["compile"] == pytest.approx(0.2)
    assert classes(script)["training"] == pytest.approx(2.3)


def test_compiling_that_an_event_tells_of_is_taken_off_what_it_was_in(script: RunScript) -> None:
    script.spend("startup", 1.0)
    script.start()
    script.event("compile", seconds=5.0)  # before the first step: off the start-up
    script.spend("data_wait", 0.01)
    script.step += 1
    script.time += 0.2
    script.event("compile", seconds=0.15)  # within the step
    script.time -= 0.21
    script.step -= 1
    script.spent["data_wait"] -= 0.01
    script.train(2)
    script.spent["startup"] += -5.0 - 1.0  # the first second was before the process
    script.spent |= {"compile": 5.15, "training": 0.35}
    assert classes(script) == pytest.approx(script.spent)


def test_failed_save_is_a_stall(script: RunScript) -> None:
    script.start()
    script.train(10)
    script.spend("checkpoint_stall", 4.0)
    script.event("checkpoint_failed", reason="no space", seconds=4.0)
    script.train(10)
    assert classes(script) == pytest.approx(script.spent)


@pytest.mark.parametrize("kind", ["checkpoint_saved", "checkpoint_failed"])
def test_save_beside_training_is_charged_where_training_stood_still(
    script: RunScript, kind: str
) -> None:
    script.start()
    script.train(10)
    script.spend("checkpoint_stall", 0.5)
    began = script.time
    script.train(10)
    script.event(kind, seconds=0.5, background_seconds=script.time - began)
    script.train(3)
    assert classes(script) == pytest.approx(script.spent)


def test_step_under_way_when_a_rewind_was_decided_is_lost_work(script: RunScript) -> None:
    script.start()
    script.train(10)
    script.spend("recomputed", 0.25)  # it is in no record
    script.rewind(1, to_step=10, skip=[80, 80])
    script.train(10)
    assert classes(script) == pytest.approx(script.spent)


def test_samples_that_come_again_are_recomputed_and_those_that_do_not_are_skipped(
    script: RunScript,
) -> None:
    script.start()
    script.train(20)
    script.train(5, kept=False)
    script.train(1, kept=False, lost="half")  # samples 200 to 207, of which 204 are gone
    script.train(4, kept=False, lost="skipped_tokens")
    script.rewind(1, to_step=20, skip=[204, 300])
    script.cursor = 160
    script.train(5)
    half = script.spent.pop("half") / 2
    for name in ("recomputed", "skipped_tokens"):
        script.spent[name] += half
    assert classes(script) == pytest.approx(script.spent)


def test_samples_that_an_operator_put_back_were_not_skipped(script: RunScript) -> None:
    script.start()
    script.train(20)
    script.train(5, kept=False)
    script.rewind(1, to_step=20, skip=[160, 200])
    script.train(5)
    script.event("ledger_change", skip=[0, 0], returned=[900, 160, 200])
    assert classes(script) == pytest.approx(script.spent)


def test_step_that_passed_over_what_was_skipped_before_is_not_skipped(script: RunScript) -> None:
    script.start()
    script.train(10)
    script.rewind(1, to_step=10, skip=[80, 160])
    script.train(2, kept=False)  # samples 160 to 175
    script.metrics[-2]["batch_samples"] = 16  # as if it had taken some from before the gap
    script.rewind(2, to_step=10, skip=[176, 176])
    script.train(4)
    assert classes(script) == pytest.approx(script.spent)


# Restarts.


def test_time_behind_a_completed_run_is_idle_and_behind_any_other_end_restart(
    script: RunScript,
) -> None:
    for number, reason in enumerate(["preempted", "completed"]):
        script.start()
        script.train(4)
        script.event("run_end", reason=reason)
        script.spend(("restart", "idle")[number], 1000.0)
        script.attempt += 1
    script.start()
    script.train(4)
    found = compute_goodput(script.metrics, script.events)
    assert classes(script) == pytest.approx(script.spent)
    assert found.num_attempts == 3


@pytest.mark.parametrize("jump", [3600.0, -3600.0])
@pytest.mark.parametrize("where", ["startup", "steps", "between"])
def test_clock_that_is_set_changes_nothing(script: RunScript, where: str, jump: float) -> None:
    script.boot_id = "a"
    script.start()
    script.events[-1]["process_start_time"] = START - (jump if where == "startup" else 0.0)
    script.train(10)
    script.clock_was_set = jump if where == "steps" else 0.0
    script.train(10)
    script.save()
    script.crash(back_to_step=20)
    script.clock_was_set = jump
    script.start()
    script.train(10)
    assert classes(script) == pytest.approx(script.spent)


def test_on_another_host_the_wall_clock_tells_the_gap(script: RunScript) -> None:
    script.boot_id = "a"
    script.start()
    script.train(10)
    script.crash(back_to_step=10)
    script.boot_id = "b"
    script.start()
    for event in script.events[1:]:
        event["uptime"] = 5.0 + 12.0  # booted just before
    assert classes(script) == pytest.approx(script.spent)


def test_launcher_counts_as_start_up_unless_it_has_seen_an_earlier_attempt(
    script: RunScript,
) -> None:
    script.boot_id = "a"
    script.spend("startup", 4.0)
    script.start()
    script.events[-1]["launcher_seconds"] = 16.0
    script.train(10)
    script.crash(back_to_step=10)
    script.start()
    script.events[-1]["launcher_seconds"] = script.time - START
    assert classes(script) == pytest.approx(script.spent)


def test_process_that_tries_again_by_itself_is_not_counted_twice(script: RunScript) -> None:
    script.boot_id = "a"
    script.start()
    script.train(10)
    script.attempt += 1
    script.start()
    script.events[-1]["process_seconds"] = script.time - START
    script.train(10)
    assert classes(script) == pytest.approx(script.spent)


def test_records_of_attempts_may_be_chained_in_any_order(recovered_run: RunScript) -> None:
    def later_first(records: list[Json]) -> list[Json]:
        return sorted(records, key=lambda record: record["attempt"] == 0)

    metrics, events = recovered_run.metrics, recovered_run.events
    chained = compute_goodput(later_first(metrics), later_first(events))
    assert chained == compute_goodput(metrics, events)


def test_torn_and_wiped_lines_cost_themselves_alone(
    recovered_run: RunScript, add_torn_line: Callable[[Path], None]
) -> None:
    whole = goodput_of_run(recovered_run.folder)
    for name in ("metrics.jsonl", "events.jsonl"):
        add_torn_line(recovered_run.folder / name)
        with (recovered_run.folder / name).open("ab") as file:
            file.write(b"\n" + bytes(4096))  # what a power loss may leave of a file that grew
    assert goodput_of_run(recovered_run.folder) == whole


def test_total_adds_up_runs(recovered_run: RunScript) -> None:
    one = goodput_of_run(recovered_run.folder)
    both = total([one, one])
    assert both.training == 2 * one.training
    assert both.num_attempts == 4
    assert both.goodput == pytest.approx(one.goodput)
