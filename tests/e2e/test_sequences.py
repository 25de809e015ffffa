"""Troubles in a row, too early, too often, or at the worst moment: each has a sane end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from harness import (
    BAD_DATA,
    LADDER,
    TINY,
    Fault,
    assert_same_tensors,
    assert_trained_once,
    checkpoints,
    health,
    incidents,
    journal,
    losses_by_step,
    metrics,
    run,
    rungs,
    summary,
)

SAVED_AT_20 = Fault(kill_at="after_save_of_step_20")
# NaN from the fourth step on, for longer than is borne, when nothing but step 0 is good yet.
EARLY = ("chaos=nan_on_one_rank", "chaos.start=3 steps", "chaos.length=4 steps")


def verdicts(folder: Path) -> Counter[str]:
    return Counter(record["verdict"] for record in metrics(folder))


def last_record(folder: Path) -> dict[str, Any]:
    return journal(folder)[-1]


def assert_stopped(folder: Path, code: str) -> None:
    """It says why in the journal, in the summary, and to whoever reads exit codes."""
    assert (last_record(folder)["rung"], last_record(folder)["code"]) == ("stop", code)
    assert last_record(folder)["reason"] == summary(folder)["reason"]
    assert summary(folder)["reason_code"] == code
    assert summary(folder)["finished"] is False


@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_two_troubles_in_a_row_are_two_incidents_and_cost_their_own_data_alone(
    num_ranks: int, tmp_path: Path, oracle: Any
) -> None:
    folder, samples = tmp_path / "run", tmp_path / "samples"
    arguments = (*TINY, *BAD_DATA, "recovery.cooldown_steps=4")
    fault = Fault(samples=samples, more_bad_samples=range(296, 312))  # steps 30 and 31
    run(arguments, folder, num_ranks=num_ranks, fault=fault).expect(0)
    first, second = incidents(folder)
    assert (first["incident"], second["incident"]) == (1, 2)
    assert (first["rewinds"], second["rewinds"]) == (1, 2)
    assert second["target_step"] > first["onset_step"], "the second goes back to a younger state"
    for rank in range(num_ranks):
        assert_trained_once(folder, samples, rank)
    never_met = oracle(
        arguments, (tuple(first["skip"]), tuple(second["skip"])), num_ranks=num_ranks
    )
    assert losses_by_step(folder) == losses_by_step(never_met.folder)
    assert_same_tensors(checkpoints(folder)[-1], checkpoints(never_met.folder)[-1])


@pytest.mark.parametrize("rule", ["falcon", "ladder"])
def test_bad_data_right_after_a_resume_cost_one_replay_more_and_end_the_same(
    rule: str, tmp_path: Path, oracle: Any
) -> None:
    """At first it looks as if the resume had gone wrong; from the state before, it is the data."""
    folder, samples = tmp_path / "run", tmp_path / "samples"
    arguments = (*(TINY if rule == "falcon" else LADDER), *BAD_DATA)
    run(arguments, folder, fault=Fault(samples=samples, kill_at=SAVED_AT_20.kill_at)).expect(-9)
    result = run(arguments, folder, fault=Fault(samples=samples)).expect(0)
    assert "resumed at step 20" in result.output
    assert rungs(folder) == ["replay", "skip"]
    replayed, skipped = incidents(folder)
    assert replayed["verdict"] in ("resume_discontinuity", "spike")
    assert replayed["skip"][0] == replayed["skip"][1]
    assert_trained_once(folder, samples)
    never_met = oracle(arguments, (tuple(skipped["skip"]),))
    assert losses_by_step(folder) == losses_by_step(never_met.folder)
    assert_same_tensors(checkpoints(folder)[-1], checkpoints(never_met.folder)[-1])


@pytest.mark.parametrize("rule", ["falcon", "ladder", pytest.param("palm", marks=pytest.mark.slow)])
def test_state_that_came_back_wrong_is_replaced_by_an_older_one_and_no_data_are_blamed(
    rule: str, tmp_path: Path, clean_single: Any
) -> None:
    folder, samples = tmp_path / "run", tmp_path / "samples"
    arguments = (*TINY, f"recovery={rule}")
    run(arguments, folder, fault=Fault(samples=samples, kill_at=SAVED_AT_20.kill_at)).expect(-9)
    fault = Fault(samples=samples, is_resume_corrupt=True)
    result = run(arguments, folder, fault=fault).expect(0)
    assert "resumed at step 20" in result.output
    (incident,) = incidents(folder)
    assert (incident["verdict"], incident["rung"]) == ("resume_discontinuity", "replay")
    assert incident["target_step"] < 20
    assert incident["skip"][0] == incident["skip"][1]
    assert summary(folder)["skipped_samples"] == 0
    suspect = "step-00000020-clock-00000020"
    assert suspect in incident["quarantine"]
    assert_trained_once(folder, samples)
    if rule == "falcon":  # other gates come to the same, but for what they refuse
        assert losses_by_step(folder) == losses_by_step(clean_single.folder)
        assert_same_tensors(checkpoints(folder)[-1], checkpoints(clean_single.folder)[-1])


@pytest.mark.parametrize("rule", ["falcon", "ladder"])
def test_trouble_before_the_first_good_checkpoint_goes_back_to_step_0(
    rule: str, tmp_path: Path
) -> None:
    folder, samples = tmp_path / "run", tmp_path / "samples"
    run([*TINY, *EARLY, f"recovery={rule}"], folder, fault=Fault(samples=samples)).expect(0)
    (incident,) = incidents(folder)
    assert incident["target_step"] == 0
    assert incident["rung"] == ("skip" if rule == "falcon" else "replay")
    assert_trained_once(folder, samples)
    assert summary(folder)["finished"] is True


def test_trouble_before_any_good_checkpoint_stops_and_says_how_to_have_one(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result = run([*TINY, *EARLY, "checkpoint.save_at_start=false"], folder).expect(3)
    assert_stopped(folder, "no_good_checkpoint")
    assert "keep the one of step 0 (checkpoint.save_at_start=true)" in result.output
    assert not incidents(folder)


def test_ladder_that_ends_says_what_was_tried_and_goes_on_with_one_more_attempt(
    tmp_path: Path,
) -> None:
    folder, samples = tmp_path / "run", tmp_path / "samples"
    arguments = (*LADDER, "recovery.skip=10 batches", *BAD_DATA)
    short = (*arguments, "recovery.ladder=[replay]")
    result = run(short, folder, fault=Fault(samples=samples)).expect(3)
    assert_stopped(folder, "ladder_exhausted")
    assert "tried for incident 1: replay; the ladder ends here (recovery.ladder)" in result.output
    assert last_record(folder)["incident"] == 1
    longer = (*arguments, "recovery.ladder=[replay,skip]")
    run(longer, folder, fault=Fault(samples=samples)).expect(0)
    assert rungs(folder) == ["replay", "stop", "skip"]
    assert [record["incident"] for record in incidents(folder)] == [1, 1]
    assert [record["attempt"] for record in incidents(folder)] == [1, 2]
    assert_trained_once(folder, samples)
    assert summary(folder)["reason_code"] == "completed"


def test_kill_in_the_save_amid_a_spike_leaves_the_same_recovery(tmp_path: Path) -> None:
    """The 20th step is the first bad one, and its checkpoint is due before a spike is certain."""
    arguments = (*TINY, "recovery.persistence_steps=3", *BAD_DATA, "chaos.start=19 batches")
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    run(arguments, calm).expect(0)
    samples = tmp_path / "samples"
    run(arguments, killed, fault=Fault(samples=samples, kill_at="in_save_of_step_20")).expect(-9)
    assert [path.name for path in checkpoints(killed)][-1] == "step-00000015-clock-00000015"
    run(arguments, killed, fault=Fault(samples=samples)).expect(0)
    (incident,) = incidents(killed)
    assert incident["onset_step"] == 20
    assert journal(killed) == journal(calm)
    assert_same_tensors(checkpoints(killed)[-1], checkpoints(calm)[-1])
    assert_trained_once(killed, samples)


def test_checkpoint_saved_amid_a_spike_is_never_loaded(tmp_path: Path) -> None:
    arguments = (*TINY, "recovery.persistence_steps=3", *BAD_DATA, "chaos.start=19 batches")
    arguments = (*arguments, "checkpoint.is_async=false")  # it has landed when the run is killed
    folder, samples = tmp_path / "run", tmp_path / "samples"
    run(arguments, folder, fault=Fault(samples=samples, kill_at="after_done")).expect(-9)
    (incident,) = incidents(folder)
    (suspect,) = (path for path in checkpoints(folder) if path.name.startswith("step-00000020"))
    assert suspect.name in incident["quarantine"]
    assert health(suspect)["health"] == "quarantined"
    result = run(arguments, folder, fault=Fault(samples=samples)).expect(0)
    assert "resumed at step 15" in result.output
    assert_trained_once(folder, samples)


@pytest.mark.parametrize(
    ("moment", "num_ranks"),
    [
        ("before_intent", 2),
        ("after_intent", 1),
        pytest.param("before_intent", 1, marks=pytest.mark.slow),
        pytest.param("after_intent", 2, marks=pytest.mark.slow),
    ],
)
def test_full_disk_in_a_rewind_ends_the_run_and_room_brings_it_to_the_same_end(
    moment: Literal["before_intent", "after_intent"],
    num_ranks: int,
    small_disk: Callable[[Path, str], None],
    tmp_path: Path,
    recovered_single: Any,
    recovered_ddp: Any,
) -> None:
    """What could not be written was not decided; what was decided is finished."""
    disk, samples = tmp_path / "disk", tmp_path / "samples"
    small_disk(disk, "8m")
    # The log lies on that disk too, and its last page is soon full.
    folder, arguments = disk / "run", (*TINY, *BAD_DATA, "checkpoint.retry_seconds=[]")
    reference = recovered_single if num_ranks == 1 else recovered_ddp
    fault = Fault(samples=samples, full_in_rewind=moment)
    result = run(arguments, folder, num_ranks=num_ranks, fault=fault).expect(1)
    phases = [record["phase"] for record in journal(folder)]
    if moment == "before_intent":
        assert "journal.jsonl cannot be written (No space left on device)" in result.output
        assert "make room and start the same command again" in result.output
        assert "Traceback" not in result.output
        assert phases == []
    else:  # back from memory; `done` still fits into the last page of the journal, saves do not
        assert phases[0] == "intent"
        # The output lies on the full disk, too: it ends with its last page, before the last save.
        assert "the checkpoint of step 20 could not be written" in result.output
    (disk / "ballast").unlink()
    run(arguments, folder, num_ranks=num_ranks, fault=Fault(samples=samples)).expect(0)
    assert journal(folder) == journal(reference.folder)
    assert_same_tensors(checkpoints(folder)[-1], checkpoints(reference.folder)[-1])
    assert_trained_once(folder, samples)


def test_level_that_was_announced_is_accepted_and_nothing_is_undone(tmp_path: Path) -> None:
    folder, samples = tmp_path / "run", tmp_path / "samples"
    shift = ("chaos=level_shift", "chaos.start=20 batches")
    announced = ("recovery.announced=[21]", "recovery.announced_steps=12")
    run([*LADDER, *shift, *announced], folder, fault=Fault(samples=samples)).expect(0)
    assert not incidents(folder)
    assert not verdicts(folder)["spike"]
    assert_trained_once(folder, samples)


def test_level_that_lasts_is_accepted_in_the_stated_number_of_steps(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = ("recovery=observe", "recovery.max_flagged_steps=6")
    run([*TINY, *BAD_DATA, "chaos.length=400 batches", *arguments], folder).expect(0)
    by_step = {record["step"]: record["verdict"] for record in metrics(folder)}
    shift = min(step for step, verdict in by_step.items() if verdict == "level_shift")
    assert 26 <= shift <= 28
    assert all(by_step[step] in ("ok", "level_shift") for step in range(shift, 34))


def test_observing_changes_no_bit_and_writes_each_incident_down_once(tmp_path: Path) -> None:
    none, observe = tmp_path / "none", tmp_path / "observe"
    run([*TINY, *BAD_DATA, "recovery=none", "recovery.veto=off"], none).expect(0)
    run([*TINY, *BAD_DATA, "recovery=observe"], observe).expect(0)
    assert losses_by_step(none) == losses_by_step(observe)
    assert_same_tensors(checkpoints(none)[-1], checkpoints(observe)[-1])
    assert journal(none) == []
    (record,) = journal(observe)
    assert (record["phase"], record["rung"], record["incident"]) == ("observed", "replay", 1)
    assert record["onset_step"] == 21
    assert record["target_step"] == 15, "where it would have gone"
    assert summary(observe)["rewinds"] == 0
    assert summary(observe)["skipped_samples"] == 0


def test_observing_after_a_restart_does_not_write_the_same_incident_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = (*TINY, *BAD_DATA, "recovery=observe", "checkpoint.interval_steps=20")
    run(arguments, folder, fault=Fault(kill_at="in_save_of_step_40")).expect(-9)
    before = journal(folder)
    assert len(before) == 1
    run(arguments, folder).expect(0)
    assert journal(folder) == before


def test_outlier_is_refused_and_the_run_goes_on_without_going_back(tmp_path: Path) -> None:
    folder, samples = tmp_path / "run", tmp_path / "samples"
    one_batch = ("chaos.length=1 batches", "checkpoint.interval_steps=1", "checkpoint.keep_good=50")
    arguments = (*TINY, "recovery=skip_step", *BAD_DATA, *one_batch)
    run(arguments, folder, fault=Fault(samples=samples)).expect(0)
    assert rungs(folder) == [], "nothing but vetoes"
    (veto,) = journal(folder)
    assert (veto["rung"], veto["detected_step"]) == ("veto", 21)
    updates = {record["step"]: record["update"] for record in metrics(folder)}
    assert [step for step, update in updates.items() if update == "vetoed"] == [21]
    assert_refused_updates_changed_nothing(folder, 21)
    assert_trained_once(folder, samples)


@pytest.mark.parametrize(("num_ranks", "bad_rank"), [(1, 0), (2, 1)])
def test_step_of_nan_changes_nothing_and_clean_steps_after_it_are_not_refused(
    num_ranks: int, bad_rank: int, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    fault = ("chaos=nan_on_one_rank", "chaos.start=20 steps", "chaos.length=1 steps")
    saves = ("checkpoint.interval_steps=1", "checkpoint.keep_good=50")
    arguments = (*TINY, "recovery=skip_step", *fault, f"chaos.rank={bad_rank}", *saves)
    run(arguments, folder, num_ranks=num_ranks).expect(0)
    by_step = {record["step"]: record for record in metrics(folder)}
    assert [s for s, record in by_step.items() if record["update"] == "vetoed"] == [21]
    assert by_step[21]["verdict"] == "nonfinite"
    assert by_step[21]["bad_rank"] == bad_rank
    assert all(by_step[step]["verdict"] == "ok" for step in range(22, 41))
    assert_refused_updates_changed_nothing(folder, 21)
    assert rungs(folder) == []


def assert_refused_updates_changed_nothing(folder: Path, step: int) -> None:
    """No weight, no moment, no step counter of the optimizer."""
    by_step = {int(path.name.split("-")[1]): path for path in checkpoints(folder)}
    assert_same_tensors(by_step[step], by_step[step - 1])
