"""`trimtab incidents`: a row an attempt, readable at 100 columns and by a program."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch import cli

ATTEMPT = {
    "incident": 1,
    "attempt": 1,
    "rung": "replay",
    "phase": "done",
    "time": "2026-09-21T10:00:05.123+00:00",
    "rule": "ladder",
    "reason": "spike at step 123456, found at step 123460, grad_norm led by 4, 38.1 sigma over its"
    " baseline",
    "verdict": "spike",
    "onset_step": 123456,
    "detected_step": 123460,
    "target_step": 123000,
    "target_checkpoint": "step-00123000-clock-00123000",
    "clock": 123461,
    "skip": [9000, 9000],
    "lr_scale": 1.0,
    "code": "",
    "returned": None,
}
JOURNAL = [
    ATTEMPT,
    {**ATTEMPT, "attempt": 2, "rung": "skip", "skip": [9000, 9640]},
    {**ATTEMPT, "attempt": 3, "rung": "cool", "skip": [9000, 9700], "lr_scale": 0.25},
    {**ATTEMPT, "rung": "stop", "code": "ladder_exhausted", "target_checkpoint": ""},
    {**ATTEMPT, "incident": 0, "rung": "veto", "target_checkpoint": "", "reason": "refused it"},
    {
        **ATTEMPT,
        "incident": 2,
        "rung": "unskip",
        "verdict": "",
        "onset_step": 7,
        "detected_step": 7,
        "target_checkpoint": "",
        "returned": [20000, 9000, 9640],
    },
    {**ATTEMPT, "incident": 3, "phase": "observed", "verdict": "resume_discontinuity"},
    {**ATTEMPT, "incident": 4, "rung": "skip_further", "phase": "intent", "skip": [9000, 9900]},
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return _write(tmp_path / "demo", JOURNAL)


def _write(folder: Path, journal: list[dict[str, object]]) -> Path:
    folder.mkdir()
    (folder / "journal.jsonl").write_text("".join(json.dumps(one) + "\n" for one in journal))
    event = {"kind": "rewind", "incident": 1, "from_clock": 123461, "seconds": 2.4}
    (folder / "events.jsonl").write_text(json.dumps(event) + "\n")
    (folder / "config.yaml").write_text("data:\n  sequence_length: 1024\n")
    return folder


def _incidents(run: Path, *options: str) -> str:
    result = CliRunner().invoke(
        cli.build_app(), ["incidents", str(run), *options], catch_exceptions=False
    )
    assert result.exit_code == 0
    return result.stdout


def _rows(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()[1:] if line[:1].isdigit()]


def test_each_attempt_is_a_row_with_its_state(run: Path) -> None:
    text = _incidents(run)
    assert [(row[0], row[1]) for row in _rows(text)[:7]] == [
        ("1", "1"),
        ("1", "2"),
        ("1", "3"),
        ("1", "1"),
        ("2", "1"),
        ("3", "1"),
        ("4", "1"),
    ]
    states = [line.rpartition("  ")[2] for line in text.splitlines() if line[:1].isdigit()]
    assert states[:7] == ["done", "put back", "done", "stopped", "done", "observed", "cut short"]


def test_table_fits_into_a_hundred_columns(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert max(map(len, _incidents(run, "--all").splitlines())) <= 100


def test_verdict_goes_only_where_there_is_no_room(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert "resume discontinuity" in _incidents(run)
    monkeypatch.setenv("COLUMNS", "100")
    assert "verdict" not in _incidents(run).splitlines()[0]


def test_amounts_are_in_samples_and_tokens_and_a_cooled_rate_has_its_factor(run: Path) -> None:
    text = _incidents(run)
    assert "640 (655k)" in text
    assert "x0.25" in text
    assert "samples [9000, 9640) come again at 20000" in text


def test_stop_says_its_code_before_its_reason(run: Path) -> None:
    assert "    ladder_exhausted: spike at step 123456" in _incidents(run)


def test_column_that_says_nothing_is_left_out(tmp_path: Path) -> None:
    heading = _incidents(_write(tmp_path / "a", [ATTEMPT])).splitlines()[0]
    assert "lr" not in heading.split()
    assert "skipped" not in heading.split()


def test_refused_updates_are_one_line_unless_all_are_asked_for(run: Path) -> None:
    text = _incidents(run)
    assert text.splitlines()[-1] == (
        "1 update refused, the last at step 123460: refused it; --all lists them"
    )
    assert _rows(_incidents(run, "--all"))[0][:2] == ["0", "1"]


def test_run_with_refused_updates_alone_had_no_incident(tmp_path: Path) -> None:
    folder = _write(tmp_path / "a", [JOURNAL[4]])
    (folder / "events.jsonl").unlink()
    first, second = _incidents(folder).splitlines()
    assert first == "no incidents"
    assert second.startswith("1 update refused")


def test_evidence_is_named_where_it_exists(run: Path) -> None:
    capsule = run / "incidents" / "0001-2" / "capsule.json"
    capsule.parent.mkdir(parents=True)
    capsule.write_text("{}")
    lines = [line for line in _incidents(run).splitlines() if "evidence" in line]
    assert lines == [f"    evidence: {capsule}"]


def test_program_reads_one_object_a_line(run: Path) -> None:
    rows = [json.loads(line) for line in _incidents(run, "--json").splitlines()]
    assert [(row["incident"], row["rung"]) for row in rows][:2] == [(1, "replay"), (1, "skip")]
    assert rows[1]["num_skipped_tokens"] == 640 * 1024
    assert {"state", "capsule", "seconds", "is_rewind"} <= rows[1].keys()
    first = _incidents(run, "--json", "--all").splitlines()[0]
    assert json.loads(first)["rung"] == "veto"


def test_json_of_a_run_without_incidents_is_empty(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "run.json").write_text("{}")
    assert _incidents(tmp_path / "a", "--json") == ""


@pytest.mark.parametrize("config", ["", "data: 7", "data: {sequence_length: many}", "a: [", None])
def test_tokens_are_left_out_where_the_config_does_not_tell(run: Path, config: str | None) -> None:
    (run / "config.yaml").unlink()
    if config is not None:
        (run / "config.yaml").write_text(config)
    assert "640  " in _incidents(run)
