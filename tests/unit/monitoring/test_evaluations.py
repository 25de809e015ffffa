"""Which evaluations count, what the report shows of them, and what old folders have."""

from __future__ import annotations

import json
from typing import Any

import pytest
from synthetic_run import RunScript

from monitoring.evaluations import losses_of, overall_losses, read_evaluations, source_names
from monitoring.figure import MAX_POINTS, build_figure
from monitoring.incidents import collect_incidents
from monitoring.records import read_run
from monitoring.report import page_content, write_report


def train_and_evaluate(script: RunScript, num_times: int, *, kept: bool = True) -> None:
    for _ in range(num_times):
        script.train(10, kept=kept)
        script.evaluate(web=4.0 - script.step / 100, code=3.0 - script.step / 100)


def figure_of(script: RunScript) -> dict[str, Any]:
    run = read_run(script.write())
    figure: dict[str, Any] = build_figure(run, collect_incidents(run))
    return figure


def traces_of(figure: dict[str, Any]) -> dict[str, Any]:
    return {trace["name"]: trace for trace in figure["data"] if trace["name"] != "loss"}


def test_evaluations_that_a_rewind_threw_away_are_marked(script: RunScript) -> None:
    script.start()
    train_and_evaluate(script, 4)
    script.rewind(1, to_step=20, skip=[0, 8])
    train_and_evaluate(script, 1)
    points = read_evaluations(script.events)
    assert [(point.clock, point.step, point.is_kept) for point in points] == [
        (10, 10, True),
        (20, 20, True),
        (30, 30, False),
        (40, 40, False),
        (50, 30, True),
    ]


def test_evaluations_that_a_restart_threw_away_are_left_out_as_its_steps_are(
    script: RunScript,
) -> None:
    script.start()
    train_and_evaluate(script, 2)
    script.crash(back_to_step=12)
    script.start()
    train_and_evaluate(script, 1)
    points = read_evaluations(script.events)
    assert [(point.clock, point.step) for point in points] == [(10, 10), (22, 22)]


def test_restart_leaves_what_a_rewind_before_its_checkpoint_threw_away(script: RunScript) -> None:
    script.start()
    train_and_evaluate(script, 3)
    script.rewind(1, to_step=20, skip=[0, 8])
    script.train(5)
    script.crash(back_to_step=22)
    script.start()
    points = read_evaluations(script.events)
    assert [(point.step, point.is_kept) for point in points] == [
        (10, True),
        (20, True),
        (30, False),
    ]


def test_state_that_was_evaluated_again_counts_once(script: RunScript) -> None:
    script.start()
    script.train(10)
    script.evaluate(web=3.0)
    script.attempt += 1
    script.start()
    script.evaluate(web=2.0)
    (point,) = read_evaluations(script.events)
    assert point.loss_nats == 2.0


def test_evaluation_of_an_old_folder_has_a_loss_and_no_sources(recovered_run: RunScript) -> None:
    points = read_evaluations(recovered_run.events)
    assert [(point.loss_nats, dict(point.by_source)) for point in points] == [(3.22, {})]
    assert source_names(points) == []
    assert losses_of(points, "web") == []
    assert overall_losses(points) == [(points[0], 3.22)]


@pytest.mark.parametrize("by_source", [None, 3, ["web"], {"web": "high"}])
def test_sources_of_another_form_are_no_losses(by_source: object) -> None:
    event = {"kind": "evaluation", "clock": 1, "step": 1, "by_source": by_source}
    (point,) = read_evaluations([event])
    assert set(point.by_source.values()) <= {None}


def test_each_source_is_a_line_of_its_own_over_the_training_loss(script: RunScript) -> None:
    script.start()
    train_and_evaluate(script, 4)
    figure = figure_of(script)
    traces = traces_of(figure)
    web, code = traces["web (validation)"], traces["code (validation)"]
    assert web["x"] == code["x"] == [10, 20, 30, 40]
    assert web["y"] == pytest.approx([3.9, 3.8, 3.7, 3.6])
    assert web["line"]["color"] != code["line"]["color"]
    assert web["mode"] == "lines+markers"
    assert web["yaxis"] == "y"
    assert "validation loss" not in traces


def test_axis_reaches_the_held_out_losses_too(script: RunScript) -> None:
    script.start()
    script.train(10)
    script.evaluate(web=30.0, code=0.5)
    low, high = (10**end for end in figure_of(script)["layout"]["yaxis"]["range"])
    assert low < 0.5
    assert high > 30.0


def test_one_source_is_one_line_by_its_usual_name(script: RunScript) -> None:
    script.start()
    script.train(10)
    script.evaluate(text=3.0)
    traces = traces_of(figure_of(script))
    assert traces["validation loss"]["y"] == [3.0]
    assert not any("text" in name for name in traces)


def test_run_begun_before_sources_were_told_apart_shows_both(script: RunScript) -> None:
    script.start()
    script.train(10)
    script.event("evaluation", seconds=1.0, loss_nats=3.5)
    train_and_evaluate(script, 1)
    traces = traces_of(figure_of(script))
    assert traces["validation loss"]["x"] == [10]
    assert traces["web (validation)"]["x"] == [20]


def test_rewound_evaluations_are_drawn_as_rewound_steps_are(script: RunScript) -> None:
    script.start()
    train_and_evaluate(script, 2)
    train_and_evaluate(script, 2, kept=False)
    script.rewind(1, to_step=20, skip=[0, 8])
    train_and_evaluate(script, 1)
    traces = traces_of(figure_of(script))
    lost = traces["web (validation), thrown away"]
    assert traces["web (validation)"]["y"] == pytest.approx([3.9, 3.8, None, None, 3.7])
    assert lost["y"] == pytest.approx([None, 3.8, 3.7, 3.6, None])
    assert lost["line"]["color"] == traces["thrown away"]["line"]["color"]
    assert lost["marker"]["size"][1] == 0, "the point that it leaves from was not thrown away"
    assert lost["showlegend"] is False


def test_loss_that_is_not_finite_is_a_gap(script: RunScript) -> None:
    script.start()
    script.train(10)
    script.evaluate(web=3.0, code=2.0)
    script.train(10)
    script.evaluate(web=None, code=2.0)
    figure = figure_of(script)
    assert traces_of(figure)["web (validation)"]["y"] == [3.0, None]
    json.dumps(figure, allow_nan=False)


def test_evaluation_far_above_the_axis_tells_its_loss_on_hover(script: RunScript) -> None:
    script.start()
    script.train(50)
    script.evaluate(text=1e6)
    script.rewind(1, to_step=40, skip=[0, 8])
    script.train(20)
    figure = figure_of(script)
    trace = traces_of(figure)["validation loss, thrown away"]
    assert trace["y"][0] < 10 ** figure["layout"]["yaxis"]["range"][1]
    assert trace["customdata"] == [[1e6, 50]]


def test_many_evaluations_are_thinned(script: RunScript) -> None:
    script.events += [
        {"kind": "evaluation", "clock": step, "step": step, "loss_nats": 3.0 + step % 7}
        for step in range(1, 2 * MAX_POINTS)
    ]
    assert len(traces_of(figure_of(script))["validation loss"]["y"]) <= MAX_POINTS


def test_more_sources_than_colours_are_told_apart(script: RunScript) -> None:
    script.train(10)
    script.evaluate(**{f"source_{order}": 3.0 for order in range(8)})
    lines = [trace["line"] for name, trace in traces_of(figure_of(script)).items() if "val" in name]
    assert len({(line["color"], line["dash"]) for line in lines}) == 8


def test_name_of_a_source_is_escaped_in_the_chart_and_the_table(script: RunScript) -> None:
    script.train(10)
    script.evaluate(**{"<b>web</b>": 3.0, "code": 2.0})
    assert "&lt;b&gt;web&lt;/b&gt; (validation)" in traces_of(figure_of(script))
    assert "<b>web</b>" not in write_report(script.folder).read_text(encoding="utf-8")


def test_table_has_the_first_best_and_last_of_each_source_that_count(script: RunScript) -> None:
    script.start()
    train_and_evaluate(script, 2)
    script.train(10)
    script.evaluate(web=0.1, code=0.1)
    script.rewind(1, to_step=20, skip=[0, 8])
    script.train(10)
    script.evaluate(web=5.0, code=2.0)
    content: Any = page_content(read_run(script.write()))
    assert [(row["name"], row["cells"]) for row in content["validation"]] == [
        ("web", [("3.9000", "10"), ("3.8000", "20"), ("5.0000", "30")]),
        ("code", [("2.9000", "10"), ("2.0000", "30"), ("2.0000", "30")]),
        ("all sources", [("3.4000", "10"), ("3.3000", "20"), ("3.5000", "30")]),
    ]
    assert ("validation loss", "3.5000") in content["facts"], "of an unfinished run, the last"
    text = write_report(script.folder).read_text(encoding="utf-8")
    assert "Validation loss by source (nats)" in text


def test_table_of_one_source_has_one_row(script: RunScript) -> None:
    script.train(10)
    script.evaluate(text=None)
    content: Any = page_content(read_run(script.write()))
    (row,) = content["validation"]
    assert row == {
        "name": "text",
        "cells": [("not finite", "10"), ("not finite", "\u2013"), ("not finite", "10")],
    }
    assert "Validation loss (nats)" in write_report(script.folder).read_text(encoding="utf-8")


def test_old_folder_has_one_row_and_a_run_without_evaluations_none(
    recovered_run: RunScript,
) -> None:
    content: Any = page_content(read_run(recovered_run.folder))
    assert [row["name"] for row in content["validation"]] == ["all sources"]
    recovered_run.events = [
        event for event in recovered_run.events if event["kind"] != "evaluation"
    ]
    text = write_report(recovered_run.write()).read_text(encoding="utf-8")
    assert "Validation loss" not in text
