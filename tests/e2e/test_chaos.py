"""Each kind of fault in a whole run, and what the ladder does about it.

The model is tiny; its batches are four times as large as in other tests, so that its noise is small
enough for what these faults do. The fault strikes in the step that makes update 61.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from harness import (
    TINY,
    Fault,
    Result,
    incidents,
    journal,
    lineage,
    metrics,
    run,
    rungs,
    summary,
)

NUM_STEPS = 100
ONSET_STEP = 61
BATCH = 32
FAULTY = (
    *TINY,
    "recovery=ladder",
    f"run.steps={NUM_STEPS}",
    f"schedule.batch_samples={BATCH}",
    "recovery.window_steps=24",
    "recovery.warmup_steps=12",
    "recovery.threshold_sigma=6",
    "recovery.margin=2 batches",
    "recovery.rewind_steps=5",
    "recovery.cooldown_steps=20",
    "recovery.cool_steps=20",
    "chaos.start=60 steps",
)
FULL_LADDER = ["replay", "skip", "skip_further", "skip_further", "cool"]


def vetoed_steps(folder: Path) -> list[int]:
    return [record["step"] for record in metrics(folder) if record["update"] == "vetoed"]


def ends_calm(folder: Path) -> bool:
    last = [record for record in metrics(folder) if record["step"] > NUM_STEPS - 10][-10:]
    return all(record["verdict"] in ("ok", "level_shift") for record in last)


def expect_complete(result: Result) -> dict[str, Any]:
    """Return the summary of a run that came to its last step and ended calm."""
    result.expect(0)
    found = summary(result.folder)
    assert found["finished"] and found["step"] == NUM_STEPS
    assert ends_calm(result.folder), [r["verdict"] for r in metrics(result.folder)][-10:]
    return found


@pytest.fixture(scope="module")
def clean_loss(tmp_path_factory: pytest.TempPathFactory) -> float:
    """Return the held-out loss of the run without a fault."""
    folder = tmp_path_factory.mktemp("chaos") / "clean"
    run(FAULTY, folder).expect(0)
    assert rungs(folder) == [] and vetoed_steps(folder) == []
    return float(summary(folder)["validation_loss_nats"])


# Bad data.


def test_one_bad_batch_is_refused_and_nothing_else_happens(
    tmp_path: Path, clean_loss: float
) -> None:
    folder = tmp_path / "run"
    result = run([*FAULTY, "chaos=bad_data", "chaos.length=1 batches"], folder)
    found = expect_complete(result)
    assert vetoed_steps(folder) == [ONSET_STEP]
    assert rungs(folder) == []
    assert found["rewinds"] == found["skipped_samples"] == 0
    assert found["validation_loss_nats"] == pytest.approx(clean_loss, rel=0.02)


def test_five_bad_batches_come_again_on_a_replay_and_are_skipped(
    tmp_path: Path, clean_loss: float
) -> None:
    folder, samples = tmp_path / "run", tmp_path / "samples"
    arguments = [*FAULTY, "chaos=bad_data", "chaos.length=5 batches"]
    found = expect_complete(run(arguments, folder, fault=Fault(samples=samples)))
    assert rungs(folder) == ["replay", "skip"]
    replay, skip = incidents(folder)
    assert replay["skip"][0] == replay["skip"][1]
    assert skip["incident"] == replay["incident"] and skip["attempt"] == 2
    first_bad = next(r["cursor"] for r in metrics(folder) if r["step"] == ONSET_STEP - 1)
    bad = range(first_bad, first_bad + 5 * BATCH)
    assert set(bad) <= set(range(*skip["skip"]))
    assert not set(lineage(samples)) & set(bad)
    assert found["validation_loss_nats"] == pytest.approx(clean_loss, rel=0.03)


def test_fifty_bad_batches_take_several_attempts_and_the_run_ends_calm(
    tmp_path: Path, clean_loss: float
) -> None:
    folder = tmp_path / "run"
    result = run([*FAULTY, "chaos=bad_data", "chaos.length=50 batches"], folder)
    found = expect_complete(result)
    done = rungs(folder)
    assert len(done) >= 3 and done == FULL_LADDER[: len(done)]
    assert {record["incident"] for record in incidents(folder)} == {1}
    assert found["skipped_samples"] >= 50 * BATCH
    assert found["validation_loss_nats"] == pytest.approx(clean_loss, rel=0.15)


# The learning rate.


def test_shock_that_cooling_tames_is_left_behind(tmp_path: Path, clean_loss: float) -> None:
    """It is in the step and not in the data: replaying and skipping do not help."""
    folder = tmp_path / "run"
    shock = ["chaos=lr_shock", "chaos.length=5 steps", "chaos.factor=50"]
    found = expect_complete(run([*FAULTY, *shock, "recovery.cool_factor=0.2"], folder))
    assert rungs(folder) == FULL_LADDER
    assert incidents(folder)[-1]["lr_scale"] == 0.2
    assert found["validation_loss_nats"] == pytest.approx(clean_loss, rel=0.1)


def test_shock_that_cooling_does_not_tame_stops_the_run_and_says_what_was_tried(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    arguments = [*FAULTY, "chaos=lr_shock", "chaos.length=30 steps", "chaos.factor=1000"]
    result = run(arguments, folder).expect(3)
    assert rungs(folder) == [*FULL_LADDER, "stop"]
    assert summary(folder)["reason_code"] == "ladder_exhausted"
    assert f"tried for incident 1: {', '.join(FULL_LADDER)}" in result.output


def test_rate_that_creeps_up_is_found_and_cooled_or_stopped(tmp_path: Path) -> None:
    """Whatever is tried, the rate goes on creeping: the run must not go on unwatched."""
    folder = tmp_path / "run"
    arguments = [*FAULTY, "chaos=slow_divergence", "chaos.length=10 steps", "chaos.factor=10"]
    run(arguments, folder)
    done = rungs(folder)
    assert done[:1] in (["replay"], ["skip"])
    assert "cool" in done
    first = next(r for r in metrics(folder) if r["verdict"] in ("spike", "divergence"))
    assert ONSET_STEP < first["step"] < NUM_STEPS
    if not summary(folder)["finished"]:
        assert summary(folder)["reason_code"] == "ladder_exhausted"


# Hardware.


@pytest.mark.parametrize(("engine", "num_ranks"), [("single", 1), ("ddp", 2), ("fsdp", 2)])
def test_flipped_bit_is_healed_by_a_replay_that_skips_nothing(
    engine: str, num_ranks: int, tmp_path: Path, clean_loss: float
) -> None:
    folder = tmp_path / "run"
    arguments = [*FAULTY, "chaos=bit_flip", f"engine={engine}", f"chaos.rank={num_ranks - 1}"]
    found = expect_complete(run(arguments, folder, num_ranks=num_ranks))
    assert rungs(folder) == ["replay"]
    assert incidents(folder)[-1]["onset_step"] == ONSET_STEP
    assert found["skipped_samples"] == 0
    tolerance = 0 if num_ranks == 1 else 1e-5
    assert found["validation_loss_nats"] == pytest.approx(clean_loss, rel=tolerance, abs=0)


def test_flipped_bit_does_not_come_again_after_a_restart_amid_its_recovery(
    tmp_path: Path, clean_loss: float
) -> None:
    folder = tmp_path / "run"
    arguments = [*FAULTY, "chaos=bit_flip"]
    run(arguments, folder, fault=Fault(kill_at="after_intent"))
    assert [record["rung"] for record in journal(folder)][-1] == "replay"
    found = expect_complete(run(arguments, folder))
    assert rungs(folder) == ["replay"]
    assert found["validation_loss_nats"] == clean_loss


def test_nan_of_one_rank_is_refused_and_the_rank_is_named(
    tmp_path: Path, clean_loss: float
) -> None:
    folder = tmp_path / "run"
    arguments = [*FAULTY, "chaos=nan_on_one_rank", "chaos.rank=1", "engine=ddp"]
    found = expect_complete(run(arguments, folder, num_ranks=2))
    assert vetoed_steps(folder) == [ONSET_STEP, ONSET_STEP + 1]
    assert rungs(folder) == []
    bad = [record for record in metrics(folder) if record["verdict"] == "nonfinite"]
    assert {record["bad_rank"] for record in bad} == {1}
    assert found["validation_loss_nats"] == pytest.approx(clean_loss, rel=0.02)


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_nan_that_lasts_is_healed_by_a_replay(
    engine: str, tmp_path: Path, clean_loss: float
) -> None:
    folder = tmp_path / "run"
    arguments = ["chaos=nan_on_one_rank", "chaos.length=5 steps", "chaos.rank=1"]
    result = run([*FAULTY, *arguments, f"engine={engine}"], folder, num_ranks=2)
    found = expect_complete(result)
    assert rungs(folder) == ["replay"]
    assert found["skipped_samples"] == 0
    assert found["validation_loss_nats"] == pytest.approx(clean_loss, rel=1e-5)
    capsule = json.loads((folder / "incidents" / "0001-1" / "capsule.json").read_text())
    assert capsule["ranks"]["bad_rank"] == 1
    assert capsule["ranks"]["bad_rank_step"] == ONSET_STEP


# Nothing wrong.


@pytest.mark.parametrize("batch_samples", [32, 64, 128])
def test_harder_data_do_no_harm(batch_samples: int, tmp_path: Path) -> None:
    """The larger the batch, the further the new level lies above the noise: 1.5 to 5 sigma."""
    folder = tmp_path / "run"
    arguments = ["chaos=level_shift", f"schedule.batch_samples={batch_samples}"]
    found = expect_complete(run([*FAULTY, *arguments], folder))
    assert rungs(folder) == []
    assert found["skipped_samples"] == 0
    assert len(vetoed_steps(folder)) <= 5
