"""Silent corruption in whole runs: a bit that no loss shows is found, named and undone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness import (
    TINY,
    assert_same_tensors,
    checkpoints,
    incidents,
    journal,
    losses_by_step,
    metrics,
    records,
    run,
    summary,
)

FLIP = ("chaos=quiet_bit_flip", "chaos.start=22 steps")


def findings(folder: Path) -> list[dict[str, Any]]:
    events = records(folder / "events.jsonl")
    return [e for e in events if e["kind"] == "integrity_check" and e["ranks"]]


def checks(folder: Path, kind: str) -> list[int]:
    events = records(folder / "events.jsonl")
    return [e["step"] for e in events if e["kind"] == "integrity_check" and e["check"] == kind]


def test_bit_of_one_replica_is_found_at_the_next_check_and_undone(
    tmp_path: Path, clean_ddp: Any
) -> None:
    folder = tmp_path / "run"
    result = run([*TINY, *FLIP, "chaos.rank=1"], folder, num_ranks=2).expect(0)
    assert {r["verdict"] for r in metrics(folder)} <= {"warmup", "ok"}, "the detector sees nothing"
    (incident,) = incidents(folder)
    assert (incident["rule"], incident["rung"]) == ("integrity", "replay")
    assert (incident["target_step"], incident["detected_step"]) == (20, 25)
    assert incident["onset_step"] == 21 and incident["skip"][0] == incident["skip"][1]
    (found,) = findings(folder)
    assert 1 in found["ranks"] and found["tensors"], found
    assert "silent corruption on rank" in result.output
    assert losses_by_step(folder) == losses_by_step(clean_ddp.folder)
    assert_same_tensors(checkpoints(folder)[-1], checkpoints(clean_ddp.folder)[-1])
    ours, theirs = summary(folder), summary(clean_ddp.folder)
    assert ours["validation_loss_nats"] == theirs["validation_loss_nats"]


def test_replicas_of_a_clean_run_are_compared_before_each_checkpoint(clean_ddp: Any) -> None:
    assert checks(clean_ddp.folder, "replicas") == list(range(5, 41, 5))
    assert findings(clean_ddp.folder) == [] == journal(clean_ddp.folder)


def test_run_that_is_to_stop_names_the_host_to_take_out(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = [*TINY, *FLIP, "integrity.on_mismatch=stop"]
    result = run(arguments, folder, num_ranks=2).expect(3)
    assert summary(folder)["reason_code"] == "silent_corruption"
    (stop,) = journal(folder)
    assert stop["rule"] == "integrity" and stop["suspects"]
    assert "out of the job and start the same command again" in result.output
    assert checkpoints(folder)[-1].name == "step-00000020-clock-00000020", "none holds it"


def test_step_that_does_not_repeat_is_found_and_the_run_ends_as_if_nothing_had_been(
    tmp_path: Path, clean_single: Any
) -> None:
    folder = tmp_path / "run"
    chaos = ["chaos=quiet_bit_flip", "chaos.start=24 steps"]
    run([*TINY, *chaos, "integrity.reexecution_interval_steps=5"], folder).expect(0)
    (incident,) = incidents(folder)
    assert (incident["rule"], incident["detected_step"]) == ("integrity", 25)
    assert "step 25 came out otherwise when it was executed again" in incident["reason"]
    (found,) = findings(folder)
    assert found["ranks"] == [0]
    assert checks(folder, "reexecution") == [5, 10, 15, 20, 25, 25, 30, 35, 40]
    assert losses_by_step(folder) == losses_by_step(clean_single.folder)
    assert_same_tensors(checkpoints(folder)[-1], checkpoints(clean_single.folder)[-1])


def test_checks_that_need_the_same_bits_are_refused_without_them(tmp_path: Path) -> None:
    arguments = [*TINY, "integrity.reexecution_interval_steps=5", "run.is_deterministic=false"]
    result = run(arguments, tmp_path / "run").expect(2)
    assert "integrity.reexecution_interval_steps=5 needs run.is_deterministic=true" in result.output
