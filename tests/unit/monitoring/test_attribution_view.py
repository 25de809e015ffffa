"""The table and the picture of an attribution."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from monitoring.attribution import curve_before, show_attribution, write_attribution


def trial(name: str, title: str, **changes: Any) -> dict[str, Any]:
    return {
        "name": name,
        "title": title,
        "from_step": 15,
        "data": [104, 192],
        "has_spiked": True,
        "unknown_because": "",
        "verdict": "spike",
        "verdict_step": 22,
        "peak_loss_nats": 5.959,
        "peak_deviation": 6.9,
        "points": [{"batch": n, "loss_nats": 3.0 + n} for n in range(1, 6)],
        **changes,
    }


def attribution(**changes: Any) -> dict[str, Any]:
    return {
        "run": "a-run",
        "incident": 1,
        "reason": "spike at step 21",
        "onset_step": 21,
        "detected_step": 22,
        "target_step": 15,
        "cause": "data",
        "because": "the same data spike again",
        "suspect_hardware": None,
        "caveats": [],
        "trials": [
            trial("A", "same data, same state"),
            trial(
                "B",
                "same data, earlier state",
                has_spiked=None,
                unknown_because="there is no earlier checkpoint",
                from_step=None,
                data=None,
                verdict=None,
                verdict_step=None,
                peak_loss_nats=None,
                peak_deviation=None,
                points=[],
            ),
            trial("C", "other data, same state", has_spiked=False, verdict=None),
        ],
        "repeat": {
            "name": "D",
            "title": "one step, done twice",
            "steps": [20, 21],
            "differs": False,
        },
        "original": {
            "points": [{"step": n, "loss_nats": 3.0} for n in range(16, 23)],
            "num_equal_steps": 7,
            "first_other_step": None,
            "is_comparable": True,
        },
        **changes,
    }


def test_table_shows_each_trial_and_the_cause(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    show_attribution(attribution(), [tmp_path / "attribution.json"])
    text = capsys.readouterr().out
    (a, b, c, d) = [line for line in text.splitlines() if line[:3] in ("│ A", "│ B", "│ C", "│ D")]
    assert "5.959" in a and "6.9" in a and "spike at step 22" in a and "yes" in a
    assert "unknown" in b and "[104" not in b
    assert "calm" in c and "no" in c
    assert "same bits" in d and "(20, 21)" in d
    assert "cause: data" in text and "B is unknown: there is no earlier checkpoint" in text
    assert "bit for bit, in all 7 steps" in text
    assert str(tmp_path / "attribution.json") in text.replace("\n", "")


def test_hardware_is_named_or_said_to_be_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    cause = "not reproducible: suspect hardware"
    show_attribution(attribution(cause=cause), [])
    assert "no rank could be singled out" in capsys.readouterr().out
    suspect = {"ranks": [1], "hosts": ["node-7"], "words": "rank 1 on node-7 (it stood out)"}
    original = {"points": [], "num_equal_steps": 5, "first_other_step": 21, "is_comparable": True}
    result = attribution(cause=cause, suspect_hardware=suspect, original=original)
    show_attribution(result, [])
    text = capsys.readouterr().out
    assert "look first at: rank 1 on node-7" in text
    assert "for 5 steps; step 21 is the first that came out otherwise" in text


def test_caveats_are_shown_and_an_incomparable_run_is_not_compared(
    capsys: pytest.CaptureFixture[str],
) -> None:
    original = {"points": [], "num_equal_steps": 0, "first_other_step": 16, "is_comparable": False}
    show_attribution(attribution(caveats=["other ranks [red]"], original=original), [])
    text = capsys.readouterr().out
    assert "mind: other ranks [red]" in text
    assert "bit for bit" not in text


def test_losses_that_are_not_finite_are_shown_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    bad = trial("A", "same data, same state", peak_loss_nats=float("nan"))
    show_attribution(attribution(trials=[bad]), [])
    assert "not finite" in capsys.readouterr().out


def test_json_and_picture_are_written(tmp_path: Path) -> None:
    bad = trial("A", "x", points=[{"batch": 1, "loss_nats": float("nan")}])
    result = attribution(run="<run>", trials=[bad])
    path, picture = write_attribution(result, tmp_path / "deep" / "attribution.json")
    assert json.loads(path.read_text())["trials"][0]["points"][0]["loss_nats"] is None
    assert picture.suffix == ".svg"
    root = ElementTree.fromstring(picture.read_text())
    words = " ".join(root.itertext())
    assert "<run>, incident 1: data" in words and "batches after step 15" in words


def metric(clock: int, step: int, loss: float) -> dict[str, Any]:
    return {"clock": clock, "step": step, "loss_nats": loss, "verdict": "ok", "update": "applied"}


def test_curve_goes_back_over_what_a_rewind_replaced() -> None:
    # Steps 3 and 4 ran twice: a rewind at clock 4 led back to step 2.
    metrics = [metric(clock, clock, float(clock)) for clock in range(1, 5)]
    metrics += [metric(6, 3, 30.0), metric(7, 4, 40.0), metric(8, 5, 50.0)]
    points = curve_before(metrics, clock=7, steps=range(2, 6))
    assert [(point["step"], point["loss_nats"]) for point in points] == [
        (2, 2.0),
        (3, 30.0),
        (4, 40.0),
    ]
    first = curve_before(metrics, clock=5, steps=range(1, 5))
    assert [point["loss_nats"] for point in first] == [1.0, 2.0, 3.0, 4.0]
    assert curve_before([], clock=5, steps=range(1, 5)) == []
