"""The accounting of wall time, against a run whose every second is known."""

from __future__ import annotations

import pytest
from synthetic_run import START, RunScript

from monitoring.goodput import Goodput, compute_goodput, goodput_of_run
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
    assert found.checkpoint == pytest.approx(0.0, abs=0.01)
    assert found.training == pytest.approx(5.0, abs=0.01)


def test_wait_for_a_save_is_charged_when_it_was_and_not_when_it_is_told(script: RunScript) -> None:
    script.start()
    script.train(10)
    script.spend("checkpoint", 0.8)
    stalled = script.time
    script.train(10)
    background = script.time - stalled
    script.event("checkpoint_saved", seconds=0.8, background_seconds=background, path="a")
    script.train(10)
    found = compute_goodput(script.metrics, script.events)
    assert found.checkpoint == pytest.approx(0.8, abs=0.01)
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
