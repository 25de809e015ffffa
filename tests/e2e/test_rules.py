"""What each rule does about the same spike, and how recovery gives up."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from harness import (
    BAD_DATA,
    BAD_SAMPLES,
    TINY,
    Fault,
    assert_same_tensors,
    assert_trained_once,
    checkpoints,
    incidents,
    journal,
    lineage,
    metrics,
    run,
    rungs,
    summary,
)

ONSET_STEP = 21


def test_palm_goes_back_further_than_falcon_and_skips_from_there(
    tmp_path: Path, recovered_single: Any
) -> None:
    rule = ("recovery=palm", "recovery.rewind_steps=10", "recovery.skip=20 batches")
    run([*TINY, *BAD_DATA, *rule], tmp_path / "palm").expect(0)
    (palm,), (falcon,) = incidents(tmp_path / "palm"), incidents(recovered_single.folder)
    assert palm["rule"] == "palm"
    assert palm["onset_step"] == falcon["onset_step"] == ONSET_STEP
    assert palm["target_step"] <= ONSET_STEP - 10 < falcon["target_step"]
    start, stop = palm["skip"]
    assert start == next(
        record["cursor"]
        for record in metrics(tmp_path / "palm")
        if record["step"] == palm["target_step"]
    )
    assert stop - start == 20 * 8, "20 batches of 8, all of them after the ramp"
    assert set(BAD_SAMPLES) <= set(range(start, stop))
    assert set(palm["quarantine"]) > set(falcon["quarantine"])


def test_rule_none_marks_the_spike_and_never_acts(tmp_path: Path) -> None:
    folder, samples = tmp_path / "none", tmp_path / "samples"
    arguments = [*TINY, *BAD_DATA, "recovery=none"]
    run(arguments, folder, fault=Fault(samples=samples)).expect(0)
    kinds = Counter(record["verdict"] for record in metrics(folder))
    assert kinds["spike"] >= 1
    first = next(r for r in metrics(folder) if r["verdict"] in ("outlier", "spike"))
    assert first["step"] == ONSET_STEP
    assert not (folder / "journal.jsonl").exists()
    assert summary(folder)["rewinds"] == 0
    trained = lineage(samples)
    assert trained == list(range(len(trained))), "every sample once, in order"


@pytest.mark.parametrize(("budget", "length"), [(0, 4), (1, 40)])
def test_used_up_budget_stops_with_exit_code_3_and_says_what_was_tried(
    budget: int, length: int, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    arguments = [*TINY, *BAD_DATA, f"chaos.length={length} batches"]
    result = run([*arguments, f"recovery.max_rewinds={budget}"], folder).expect(3)
    assert len(incidents(folder)) == budget
    assert f"all {budget} rewinds of the run are used up (recovery.max_rewinds)" in result.output
    assert "spike at step" in result.output
    assert "raise the limit to go on, or begin another run with a lower optim.lr" in result.output
    assert summary(folder)["finished"] is False
    assert summary(folder)["reason_code"] == "rewinds_used_up"
    assert (journal(folder)[-1]["rung"], journal(folder)[-1]["code"]) == ("stop", "rewinds_used_up")
    assert journal(folder)[-1]["reason"] == summary(folder)["reason"]


def test_raising_the_budget_goes_on_where_recovery_gave_up(
    tmp_path: Path, recovered_single: Any
) -> None:
    folder = tmp_path / "run"
    arguments = [*TINY, *BAD_DATA]
    run([*arguments, "recovery.max_rewinds=0"], folder).expect(3)
    run([*arguments, "recovery.max_rewinds=0"], folder).expect(3)
    run([*arguments, "recovery.max_rewinds=1"], folder).expect(0)
    assert rungs(folder) == ["stop", "stop", "skip"]
    assert {record["incident"] for record in journal(folder)} == {1}, "one trouble, one incident"
    assert incidents(folder) == incidents(recovered_single.folder)
    assert summary(folder)["finished"] is True
    assert_same_tensors(checkpoints(folder)[-1], checkpoints(recovered_single.folder)[-1])


def test_each_rewind_of_a_long_bad_stretch_skips_the_whole_amount_again(tmp_path: Path) -> None:
    """14 bad batches from the onset, 10 skipped at a time: two rewinds get past them."""
    folder, samples = tmp_path / "run", tmp_path / "samples"
    arguments = [*TINY, *BAD_DATA, "chaos.length=14 batches"]
    run(arguments, folder, fault=Fault(samples=samples)).expect(0)
    assert len(incidents(folder)) == 2, [incident["skip"] for incident in incidents(folder)]
    assert_trained_once(folder, samples)
