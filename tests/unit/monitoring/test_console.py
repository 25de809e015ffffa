"""Progress on stderr, on a terminal and elsewhere, and the summary on stdout."""

from __future__ import annotations

import time

import pytest
from synthetic_run import RunScript

from monitoring.console import ConsoleProgress, clock_time, print_summary
from monitoring.incidents import collect_incidents, short_count
from monitoring.records import read_run

METRICS = {"step": 12, "loss_nats": 3.25, "tokens_per_second": 31_400.0, "mfu": 0.41}


def test_without_a_terminal_lines_come_at_intervals_and_incidents_at_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    progress = ConsoleProgress(400, "falcon", is_terminal=False)
    progress.start()
    for step in range(1, 111):
        now += 0.1
        progress.update({**METRICS, "step": step})
        if step == 50:
            progress.incident("spike at step 50")
    progress.stop()
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert [line for line in lines if line.startswith("!")] == ["! spike at step 50"]
    steps = [line for line in lines if "step 1/400" in line or "/400" in line]
    assert len(steps) == 4
    assert "step 110/400  loss 3.2500  31k tok/s  MFU 41.0%  ETA 0:29" in lines[-1]
    assert lines[-1].endswith("last: spike at step 50")


def test_on_a_terminal_one_line_is_drawn_and_kept_out_of_stdout(
    capsys: pytest.CaptureFixture[str],
) -> None:
    progress = ConsoleProgress(400, "falcon [bold]", is_terminal=True)
    progress.start()
    progress.update(METRICS)
    progress.incident("spike [red] at step 11")
    progress.message("saved")
    progress.stop()
    progress.stop()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "12/400" in captured.err
    assert "loss 3.2500" in captured.err
    assert "! spike [red] at step 11" in captured.err


def test_loss_that_is_null_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    progress = ConsoleProgress(400, "falcon", is_terminal=False)
    progress.update({"step": 3, "loss_nats": None})
    assert "loss not finite" in capsys.readouterr().err


def test_summary_goes_to_stdout_with_each_incident(
    recovered_run: RunScript, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    run = read_run(recovered_run.folder)
    print_summary({**run.summary, "goodput": {"goodput": 0.87}}, collect_incidents(run))
    captured = capsys.readouterr()
    assert captured.err == ""
    for text in ("completed", "65,536", "87.0%", "64 [1,440, 1,504)", "2.40 s", "step 150"):
        assert text in captured.out


def test_summary_names_each_attempt_and_what_it_did(
    ladder_run: RunScript, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    print_summary({"name": "run"}, collect_incidents(read_run(ladder_run.folder)))
    out = capsys.readouterr().out
    for text in ("1.2", "put back", "cool, rate x 0.5", "-64 [1,200, 1,264)", "observed"):
        assert text in out


def test_summary_of_a_run_that_says_little(capsys: pytest.CaptureFixture[str]) -> None:
    print_summary({"name": "[x]", "reason": "stopped"}, [{"incident": 1}])
    assert "stopped" in capsys.readouterr().out


def test_counts_and_durations_are_short() -> None:
    assert [short_count(value) for value in (0, 950, 1500, 65_536, 2.5e9)] == [
        "0",
        "950",
        "1.5k",
        "66k",
        "2.5B",
    ]
    assert [clock_time(value) for value in (42, 725, 11_250)] == ["0:42", "12:05", "3:07:30"]


def test_validation_message_is_shown_at_once_and_the_progress_line_stays(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = "step 100: validation loss 3.200 nats (web 3.100, code [3.400])"
    for is_terminal in (False, True):
        progress = ConsoleProgress(400, "falcon", is_terminal=is_terminal)
        progress.start()
        progress.update(METRICS)
        progress.message(text)
        progress.stop()
        captured = capsys.readouterr()
        assert captured.out == ""
        assert text in captured.err
        assert "loss 3.2500" in captured.err


def test_summary_tells_the_sources_beside_the_validation_loss(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    summary = {"validation_loss_nats": 3.2, "validation_by_source": {"web": 3.1, "code": None}}
    print_summary(summary, [])
    assert "3.2000 (web 3.1000, code not finite)" in capsys.readouterr().out


@pytest.mark.parametrize("by_source", [{"text": 3.2}, {}, None])
def test_summary_of_one_source_tells_one_validation_loss(
    capsys: pytest.CaptureFixture[str], by_source: object
) -> None:
    print_summary({"validation_loss_nats": 3.2, "validation_by_source": by_source}, [])
    (row,) = (line for line in capsys.readouterr().out.splitlines() if "validation" in line)
    assert row.split("\u2502")[2].strip() == "3.2000"
