"""What a replay begins from, and what is refused with which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from monitoring.replay_plan import (
    CheckpointFacts,
    NoReplayError,
    checkpoints_of,
    make_plan,
    read_plan,
)


def name(step: int, clock: int | None = None) -> str:
    return f"step-{step:08d}-clock-{step if clock is None else clock:08d}"


def facts(step: int, *, is_quarantined: bool = False) -> CheckpointFacts:
    return CheckpointFacts(
        name=name(step),
        path=Path("/run/checkpoints") / name(step),
        step=step,
        cursor=8 * step,
        clock=step,
        num_ranks=2,
        format="dcp",
        is_quarantined=is_quarantined,
    )


def on_disk(*checkpoints: CheckpointFacts) -> dict[str, CheckpointFacts]:
    return {one.name: one for one in checkpoints}


def record(**changes: Any) -> dict[str, Any]:
    return {
        "incident": 1,
        "attempt": 1,
        "phase": "intent",
        "rule": "ladder",
        "reason": "spike at step 21",
        "verdict": "spike",
        "onset_step": 21,
        "detected_step": 22,
        "clock": 23,
        "target_checkpoint": name(15),
        "target_step": 15,
        "skip": [0, 0],
        "kept": [name(10), name(15)],
        **changes,
    }


VETO = record(incident=0, target_checkpoint="", rung="veto", phase="done", kept=[])
OPERATOR = record(incident=2, rule="operator", reason="rewind to step 5 asked for by Ann")
STOP = record(incident=3, target_checkpoint="", rung="stop", reason="no good checkpoint", kept=[])


def test_plan_is_that_of_the_first_attempt_with_the_skips_of_all() -> None:
    journal = [
        VETO,
        record(),
        record(phase="done"),
        record(attempt=2, skip=[120, 200], target_checkpoint=name(10), kept=[name(10)]),
        record(incident=4, skip=[300, 900]),
    ]
    plan = make_plan(journal, on_disk(facts(10), facts(15)), 1)
    assert (plan.attempt, plan.target_step, plan.onset_step, plan.detected_step) == (1, 15, 21, 22)
    assert plan.start.step == 15
    assert plan.earlier is not None and plan.earlier.step == 10
    assert plan.num_records_before == 1
    assert plan.skip_stop == 200
    assert plan.folder_name == "0001-1"


def test_target_that_lay_in_memory_is_reached_from_the_last_one_on_disk() -> None:
    journal = [record(target_checkpoint=name(18))]
    plan = make_plan(journal, on_disk(facts(10), facts(15)), 1)
    assert (plan.start.step, plan.target_step) == (15, 18)
    assert plan.earlier == plan.start, "it is an earlier state than the target"


def test_what_is_kept_is_used_though_a_later_attempt_quarantined_it() -> None:
    checkpoints = on_disk(facts(10), facts(15, is_quarantined=True))
    assert make_plan([record()], checkpoints, 1).start.step == 15


def test_earlier_state_is_any_other_that_is_left() -> None:
    quarantined = facts(5, is_quarantined=True)
    plan = make_plan([record(kept=[name(15)])], on_disk(quarantined, facts(15)), 1)
    assert plan.earlier is None
    plan = make_plan([record()], on_disk(facts(5), facts(15)), 1)
    assert plan.earlier is not None and plan.earlier.step == 5


def test_observed_incident_begins_from_what_happens_to_be_there() -> None:
    observed = record(phase="observed", kept=[])
    plan = make_plan([observed], on_disk(facts(5), facts(10), facts(20)), 1)
    assert (plan.start.step, plan.target_step) == (10, 15)


def test_operator_s_rewind_within_an_incident_is_not_the_attempt() -> None:
    journal = [record(rule="operator", target_checkpoint=name(5)), record(attempt=2)]
    assert make_plan(journal, on_disk(facts(15)), 1).attempt == 2


def test_wrong_bits_are_no_incident_of_the_loss() -> None:
    bits = record(rule="integrity", reason="silent corruption: rank 3")
    with pytest.raises(NoReplayError, match=r"was wrong bits \(silent corruption: rank 3\)"):
        make_plan([bits], on_disk(facts(15)), 1)
    assert make_plan([bits, record(attempt=2)], on_disk(facts(15)), 1).attempt == 2


@pytest.mark.parametrize(
    ("incident", "words"),
    [
        (7, "no incident 7; incidents of this run: 1, 2, 3"),
        (0, "refused on the device"),
        (2, "an operator's wish (rewind to step 5 asked for by Ann)"),
        (3, "ended the run before anything was tried (no good checkpoint)"),
    ],
)
def test_what_cannot_be_replayed_is_refused(incident: int, words: str) -> None:
    with pytest.raises(NoReplayError) as refusal:
        make_plan([VETO, record(), OPERATOR, STOP], on_disk(facts(15)), incident)
    assert words in str(refusal.value)


def test_run_without_incidents_says_so() -> None:
    with pytest.raises(NoReplayError, match="incidents of this run: none"):
        make_plan([], {}, 1)


@pytest.mark.parametrize("checkpoints", [{}, on_disk(facts(10)), on_disk(facts(20))])
def test_checkpoint_that_is_gone_is_named(checkpoints: dict[str, CheckpointFacts]) -> None:
    with pytest.raises(NoReplayError) as refusal:
        make_plan([record()], checkpoints, 1)
    assert name(15) in str(refusal.value) and "keep_incidents" in str(refusal.value)


@pytest.mark.parametrize("change", [{"onset_step": None}, {"target_checkpoint": "elsewhere"}])
def test_damaged_record_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(NoReplayError):
        make_plan([record(**change)], on_disk(facts(15)), 1)


def write_checkpoint(run: Path, step: int, **health: str) -> Path:
    folder = run / "checkpoints" / name(step)
    folder.mkdir(parents=True)
    manifest = {"step": step, "cursor": 8 * step, "clock": step, "world_size": 2, "format": "dcp"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "health.json").write_text(json.dumps({"health": "good", "reason": "", **health}))
    return folder


def test_folder_is_read_and_left_as_it_is(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 15)
    write_checkpoint(tmp_path, 10, health="quarantined", reason="made after the target")
    write_checkpoint(tmp_path, 5, health="quarantined", reason="corrupt: a file is short")
    (tmp_path / "checkpoints" / ".saving-step-00000020-clock-00000020").mkdir()
    (write_checkpoint(tmp_path, 12) / "manifest.json").write_text("{")
    (tmp_path / "journal.jsonl").write_text(json.dumps(record()) + '\n{"torn')
    before = sorted(path.name for path in tmp_path.rglob("*"))
    found = checkpoints_of(tmp_path)
    assert [(one.step, one.is_quarantined) for one in found.values()] == [(10, True), (15, False)]
    assert read_plan(tmp_path, 1).start.cursor == 120
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_folder_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert checkpoints_of(tmp_path) == {}
