"""kill -9 at each phase of a rewind: the restart finishes the same recovery, to the same bits."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
from harness import (
    BAD_DATA,
    BAD_SAMPLES,
    TINY,
    Fault,
    assert_same_tensors,
    checkpoints,
    health,
    incidents,
    losses_by_clock,
    records,
    run,
    summary,
)

ARGUMENTS = (*TINY, *BAD_DATA)
PHASES = (
    "before_intent",
    "torn_intent",
    "after_intent",
    "after_load",
    "after_quarantine",
    "torn_done",
    "after_done",
)


def after_last_rewind(samples: Path, rank: int = 0) -> list[int]:
    """Return the samples that were trained on after the last rewind of a log."""
    log = records(Path(f"{samples}.{rank}"))
    tail = list(takewhile(lambda record: not record["rewind"], reversed(log)))[::-1]
    return [sample for record in tail for sample in record["samples"]]


def assert_same_recovery(folder: Path, reference: Any) -> None:
    assert incidents(folder) == incidents(reference.folder)
    assert len(incidents(folder)) == 1
    assert losses_by_clock(folder) == losses_by_clock(reference.folder)
    assert_same_tensors(checkpoints(folder)[-1], checkpoints(reference.folder)[-1])
    for key in ("step", "clock", "cursor", "rewinds", "tokens_seen", "skipped_samples"):
        assert summary(folder)[key] == summary(reference.folder)[key]


def assert_nothing_skipped_is_trained_on(folder: Path, samples: Path, rank: int = 0) -> None:
    start, stop = incidents(folder)[-1]["skip"]
    trained = after_last_rewind(samples, rank)
    assert trained, "something was trained on after the recovery"
    assert not set(trained) & set(range(start, stop))
    assert set(BAD_SAMPLES) <= set(range(start, stop)), "the bad stretch is what was skipped"


def test_undisturbed_recovery_goes_back_once_and_skips_the_bad_stretch(
    recovered_single: Any,
) -> None:
    (incident,) = incidents(recovered_single.folder)
    assert incident["target_step"] < incident["onset_step"] <= incident["detected_step"]
    assert incident["onset_step"] == 21
    assert_nothing_skipped_is_trained_on(recovered_single.folder, recovered_single.samples)
    assert summary(recovered_single.folder)["rewinds"] == 1


@pytest.mark.parametrize("phase", PHASES)
def test_kill_in_a_rewind_changes_nothing(
    phase: str, tmp_path: Path, recovered_single: Any
) -> None:
    folder, samples = tmp_path / "run", tmp_path / "samples"
    run(ARGUMENTS, folder, fault=Fault(kill_at=phase)).expect(-9)
    assert len(incidents(folder)) == (1 if phase == "after_done" else 0)
    result = run(ARGUMENTS, folder, fault=Fault(samples=samples)).expect(0)
    assert_same_recovery(folder, recovered_single)
    assert_nothing_skipped_is_trained_on(folder, samples)
    is_cut_short = phase in ("after_intent", "after_load", "after_quarantine", "torn_done")
    assert ("finishing incident 1, cut short before" in result.output) == is_cut_short


def test_kill_while_the_restart_finishes_a_rewind_changes_nothing(
    tmp_path: Path, recovered_single: Any
) -> None:
    folder, samples = tmp_path / "run", tmp_path / "samples"
    run(ARGUMENTS, folder, fault=Fault(kill_at="after_intent")).expect(-9)
    for phase in ("after_load", "after_quarantine", "torn_done"):
        run(ARGUMENTS, folder, fault=Fault(kill_at=phase)).expect(-9)
    run(ARGUMENTS, folder, fault=Fault(samples=samples)).expect(0)
    assert_same_recovery(folder, recovered_single)
    assert_nothing_skipped_is_trained_on(folder, samples)


@pytest.mark.parametrize(
    ("phase", "kill_rank"), [("before_intent", 0), ("after_intent", 0), ("after_load", 1)]
)
def test_kill_of_one_of_two_ranks_in_a_rewind_changes_nothing(
    phase: str, kill_rank: int, tmp_path: Path, recovered_ddp: Any
) -> None:
    folder, samples = tmp_path / "run", tmp_path / "samples"
    fault = Fault(kill_at=phase, kill_rank=kill_rank)
    killed = run(ARGUMENTS, folder, num_ranks=2, fault=fault)
    assert killed.exit_codes[kill_rank] == -9
    run(ARGUMENTS, folder, num_ranks=2, fault=Fault(samples=samples)).expect(0)
    assert_same_recovery(folder, recovered_ddp)
    for rank in range(2):
        assert_nothing_skipped_is_trained_on(folder, samples, rank)


def test_checkpoint_made_after_the_onset_is_never_loaded_again(
    tmp_path: Path, recovered_single: Any
) -> None:
    """The one of step 20 is younger than the target; it stays quarantined until it is replaced."""
    folder = tmp_path / "run"
    run(ARGUMENTS, folder, fault=Fault(kill_at="after_done")).expect(-9)
    (incident,) = incidents(folder)
    assert incident["quarantine"]
    for name in incident["quarantine"]:
        assert health(folder / "checkpoints" / name)["health"] == "quarantined"
    result = run(ARGUMENTS, folder).expect(0)
    assert f"resumed at step {incident['target_step']}" in result.output
    assert losses_by_clock(folder) == losses_by_clock(recovered_single.folder)


def test_samples_and_their_order_do_not_depend_on_the_number_of_ranks(
    recovered_single: Any, recovered_ddp: Any
) -> None:
    alone = records(Path(f"{recovered_single.samples}.0"))
    assert [record for record in alone if record["rewind"]], "a recovery is part of it"
    for rank in range(2):
        assert records(Path(f"{recovered_ddp.samples}.{rank}")) == alone
    assert (
        incidents(recovered_ddp.folder)[0]["skip"] == incidents(recovered_single.folder)[0]["skip"]
    )
    ours, theirs = (
        losses_by_clock(reference.folder) for reference in (recovered_single, recovered_ddp)
    )
    assert ours == pytest.approx(theirs, rel=1e-4)
