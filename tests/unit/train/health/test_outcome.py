"""What is remembered of attempts, and what it means for the next one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from train.health.crash_loop import same_failures, verdict
from train.health.outcome import (
    Outcome,
    OutcomeRecord,
    fingerprint,
    is_final_for_this_launch,
    last_step_of,
    read_outcomes,
    tell_launcher,
)

FAILURE = Outcome(code="failed", exit_code=1, step=7, fingerprint="E: x", signature="s", reason="r")
DEATH = replace(FAILURE, code="died", fingerprint="died", reason="")
PREEMPTED = replace(FAILURE, code="preempted", exit_code=75, fingerprint="preempted")
OTHER_STEP = replace(FAILURE, step=8)
OTHER_CODE = replace(FAILURE, signature="t")


@pytest.mark.parametrize(
    ("ends", "count"),
    [
        ([], 0),
        ([FAILURE] * 3, 3),
        ([DEATH] * 3, 3),
        ([FAILURE, PREEMPTED, FAILURE], 2),
        ([FAILURE, OTHER_STEP, FAILURE], 1),
        ([FAILURE, replace(FAILURE, code="completed"), FAILURE], 1),
        ([FAILURE, DEATH], 1),
        ([OTHER_CODE, FAILURE, FAILURE], 2),
        ([FAILURE, FAILURE, OTHER_CODE], 0),
        ([FAILURE, FAILURE, replace(FAILURE, code="gave_up", exit_code=3)], 0),
        ([FAILURE, FAILURE, replace(FAILURE, code="crash_loop", exit_code=3)], 2),
    ],
)
def test_only_like_failures_at_one_step_without_a_change_count(
    ends: list[Outcome], count: int
) -> None:
    assert len(same_failures(ends, "s")) == count


def test_verdict_names_the_failure_and_the_way_out() -> None:
    assert verdict([FAILURE] * 2, "s", max_same_failures=3) is None
    assert verdict([FAILURE] * 9, "s", max_same_failures=0) is None
    why = verdict([FAILURE] * 3, "s", max_same_failures=3)
    assert why is not None
    assert why.startswith("the last 3 attempts all ended at step 7 in the same way: r. ")
    assert "health.max_same_failures=4" in why
    assert "without a word" in str(verdict([DEATH] * 3, "s", max_same_failures=3))


def test_an_attempt_that_is_killed_is_found_at_the_next_start(tmp_path: Path) -> None:
    start = Outcome(code="running", attempt=4, signature="s")
    record = OutcomeRecord(tmp_path, start, [FAILURE])
    record.begin()
    found = read_outcomes(tmp_path)
    assert found.last is not None and found.last.code == "running"
    first, died = found.ended(last_step=12)
    assert first == FAILURE
    assert (died.code, died.step, died.attempt) == ("died", 12, 4)


def test_the_first_end_stands_and_no_one_ends_an_attempt_that_came_later(tmp_path: Path) -> None:
    record = OutcomeRecord(tmp_path, Outcome(code="running"), [])
    record.begin()
    assert record.end("hang", 75, step=3)
    assert not OutcomeRecord(tmp_path, Outcome(code="running"), []).end("failed", 1, step=4)
    later = OutcomeRecord(tmp_path, Outcome(code="running", attempt=1), [])
    later.begin()
    assert not record.end("failed", 1, step=4), "a rank that was cut off"
    assert later.end("hang", 75, step=3)
    last = read_outcomes(tmp_path).last
    assert last is not None and (last.code, last.step) == ("hang", 3)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"code": 3}', '{"previous": 3}'])
def test_a_damaged_record_says_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "outcome.json").write_text(text)
    assert read_outcomes(tmp_path).ended(last_step=1) == []


def test_last_step_is_that_of_the_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert last_step_of(path) == 0
    path.write_text('{"step": 3}\n{"step": 4}\n{"validation_loss_nats": 1}\n{"st')
    assert last_step_of(path) == 4


def test_fingerprint_knows_no_numbers() -> None:
    one, other = ValueError("at 0x7f3a, rank 3"), ValueError("at 0x11, rank 12")
    assert fingerprint(one) == fingerprint(other) == "ValueError: at #, rank #"
    assert fingerprint(KeyError("at 1")) != fingerprint(one)


def test_the_launcher_finds_the_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_OUTCOME", str(tmp_path / "told.json"))
    tell_launcher("preempted", 75, "why")
    assert json.loads((tmp_path / "told.json").read_text())["exit_code"] == 75


@pytest.mark.parametrize(
    ("code", "exit_code", "restarts", "launch", "is_final"),
    [
        ("preempted", 75, "1", "L", True),
        ("gave_up", 3, "1", "L", True),
        ("hang", 75, "1", "L", False),
        ("failed", 1, "1", "L", False),
        ("running", 0, "1", "L", False),
        ("preempted", 75, "0", "L", False),
        ("preempted", 75, "1", "another", False),
        ("preempted", 75, "1", "", False),
    ],
)
def test_torchrun_starts_what_was_told_to_end_in_vain(
    code: str,
    exit_code: int,
    restarts: str,
    launch: str,
    is_final: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "L")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
    last = Outcome(code=code, exit_code=exit_code, launch=launch)
    assert is_final_for_this_launch(last) is is_final
