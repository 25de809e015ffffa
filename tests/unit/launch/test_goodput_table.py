"""`trimtab goodput`: a table that adds up, a waterfall in it, and lines for programs."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch import cli
from launch.errors import LaunchError


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs: 10 s of start-up, then steps; the second one hung and was restarted."""
    monkeypatch.chdir(tmp_path)
    _write("first", [_start(0, 10)], [_step(0, 10 + n, n) for n in range(1, 31)])
    hang = {"kind": "hang", "time": 100.0, "attempt": 0, "seconds": 79.0, "phase": "step"}
    steps = [_step(0, 10 + n, n) for n in range(1, 11)]
    steps += [_step(1, 120 + n, 10 + n) for n in range(1, 31)]
    _write("second", [_start(0, 10), hang, _start(1, 120)], steps)
    return tmp_path / "runs"


def _start(attempt: int, time: float) -> dict[str, object]:
    at = {"kind": "run_start", "attempt": attempt, "time": time}
    return {**at, "process_start_time": time - 10}


def _step(attempt: int, time: float, step: int) -> dict[str, object]:
    return {"attempt": attempt, "time": time, "step": step, "clock": step, "step_seconds": 1.0}


def _write(name: str, events: list[dict[str, object]], steps: list[dict[str, object]]) -> None:
    folder = Path("runs") / name
    folder.mkdir(parents=True)
    for stem, records in (("events", events), ("metrics", steps)):
        lines = [json.dumps(record) + "\n" for record in records]
        (folder / f"{stem}.jsonl").write_text("".join(lines))


def _goodput(*arguments: str) -> str:
    result = CliRunner().invoke(
        cli.build_app(), ["goodput", *arguments], catch_exceptions=False, env={"COLUMNS": "65"}
    )
    assert result.exit_code == 0, result.output
    return result.output


def test_table_of_one_run_is_a_waterfall(runs: Path) -> None:
    del runs
    assert _goodput("second").splitlines() == [
        "second: 2 min 30 s of wall time in 2 attempts, goodput 26.7%",
        "",
        "class             seconds   share",
        "wall time           150.0  100.0%  ####################",
        "restart              10.0    6.7%                     #",
        "startup              20.0   13.3%                  ###",
        "compile               0.0    0.0%",
        "data wait             0.0    0.0%",
        "checkpoint stall      0.0    0.0%",
        "evaluation            0.0    0.0%",
        "hang detection       79.0   52.7%       ###########",
        "rewind                0.0    0.0%",
        "recomputed            0.0    0.0%",
        "skipped tokens        0.0    0.0%",
        "idle                  1.0    0.7%       #",
        "training             40.0   26.7%  #####",
    ]


def test_several_runs_are_rows_with_their_sum_below(runs: Path) -> None:
    del runs
    lines = [line.split() for line in _goodput("first", "second").splitlines()]
    assert lines[1:] == [
        ["run", "time", "attempts", "training", "restart", "startup", "detection", "idle"],
        ["first", "40", "s", "1", "75.0%", "0.0%", "25.0%", "0.0%", "0.0%"],
        ["second", "2", "min", "30", "s", "2", "26.7%", "6.7%", "13.3%", "52.7%", "0.7%"],
        ["all", "runs", "3", "min", "10", "s", "3", "36.8%", "5.3%", "15.8%", "41.6%", "0.5%"],
    ]


def test_json_is_one_object_a_run(runs: Path) -> None:
    del runs
    rows = [json.loads(line) for line in _goodput("first", "second", "--json").splitlines()]
    assert [row["run"] for row in rows] == ["first", "second", "all runs"]
    assert [row["wall_seconds"] for row in rows] == pytest.approx([40.0, 150.0, 190.0])
    assert rows[1]["hang_detection"] == pytest.approx(79.0)
    assert rows[2]["goodput"] == pytest.approx(70 / 190)


def test_picture_is_written_and_named(runs: Path) -> None:
    assert _goodput("second", "-o", "w.html").splitlines()[-1] == "waterfall: w.html"
    assert (runs.parent / "w.html").read_text().count("<svg") == 1
    _goodput("first", "second", "-o", "both.html")
    assert (runs.parent / "both.html").read_text().count("<svg") == 3


def test_what_is_no_run_and_what_cannot_be_written_is_one_line(runs: Path) -> None:
    with pytest.raises(LaunchError, match=r"^runs is no run folder: it has no run\.json$"):
        _goodput("runs")
    with pytest.raises(LaunchError, match=r"--output w\.png: give a path that ends in"):
        _goodput("first", "-o", "w.png")
    assert not (runs.parent / "w.png").exists()


def test_help_has_an_example() -> None:
    assert "trimtab goodput falcon_like --output waterfall.html" in _goodput("--help")
