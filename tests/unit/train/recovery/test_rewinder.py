"""Going back and taking up again, with a kill between any two of its durable parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import BATCH_SAMPLES, Killed, Process, at, corrupt_snapshot, rewind_to

from train.actions import Note, Skip, Stop, Unskip
from train.checkpoint.info import Health
from train.checkpoint.snapshots import snapshot_name
from train.errors import CorruptCheckpointError, JournalError
from train.recovery.journal import Incident, Journal, Phase, pending
from train.recovery.policy import Rung
from train.recovery.rewind import Resumed
from train.state import BatchRange, TrainState

pytestmark = pytest.mark.usefixtures("fast_disk")

AFTER = TrainState(step=40, cursor=640, clock=61, tokens_seen=40, rewinds=1)
SKIPPED = [(640, 16 * 61)]


@pytest.fixture
def process(tmp_path: Path) -> Process:
    """A run at step 61 that has its checkpoints on disk alone."""
    made = Process(tmp_path)
    made.save(0, Health.GOOD)
    made.save(20, Health.GOOD)
    made.save(40, Health.GOOD)
    made.save(60, Health.CANDIDATE)
    return made


@pytest.fixture
def with_memory(tmp_path: Path) -> Process:
    """The same with step 40 on disk and in memory, and step 50 in memory alone."""
    made = Process(tmp_path)
    made.save(0, Health.GOOD)
    made.save(20, Health.GOOD)
    made.save(40, Health.GOOD, to_memory=True)
    made.save(50, Health.GOOD, to_disk=False, to_memory=True)
    made.save(60, Health.CANDIDATE, to_memory=True)
    return made


def health_of(process: Process, step: int) -> Health:
    return process.entry(step).health


def taken_up(process: Process) -> Resumed:
    resumed = process.rewinder.resume()
    assert resumed is not None
    return resumed


def die(*args: object, **kwargs: object) -> None:
    raise Killed


def spoil(process: Process, step: int) -> None:
    (process.entry(step).path / "number.bin").write_text("x")


# A rewind.


def test_rewind_restores_model_callbacks_and_state_but_not_the_history(process: Process) -> None:
    state, incident = process.rewinder.rewind(rewind_to(40), at(61))
    assert state == AFTER
    assert process.engine.number == process.counter.count == 40
    assert process.ledger.ranges() == SKIPPED
    assert health_of(process, 60) is Health.QUARANTINED
    assert incident.phase is Phase.DONE
    assert incident.quarantine == (snapshot_name(at(60)),)
    assert [record.phase for record in process.journal.read()] == [Phase.INTENT, Phase.DONE]
    assert list(process.history.records) == process.journal.read()


def test_second_rewind_counts_on_and_adds_to_the_skips(process: Process) -> None:
    process.rewinder.rewind(rewind_to(40), at(61))
    state, incident = process.rewinder.rewind(
        rewind_to(20, incident=2), TrainState(step=45, cursor=1200, clock=66, rewinds=1)
    )
    assert (incident.incident, incident.rewinds, state.rewinds) == (2, 2, 2)
    assert (state.step, state.clock) == (20, 66)
    assert process.ledger.ranges() == [(320, 1200)]
    assert health_of(process, 40) is Health.QUARANTINED


def test_what_was_decided_is_in_the_journal(process: Process) -> None:
    action = rewind_to(
        40,
        incident=3,
        attempt=5,
        rung=Rung.COOL,
        rule="ladder",
        verdict="divergence",
        lr_scale=0.5,
        lr_until_step=160,
        lr_return_step=260,
        request="r-1",
    )
    _, incident = process.rewinder.rewind(action, at(61))
    assert (incident.incident, incident.attempt, incident.rung) == (3, 5, Rung.COOL)
    assert (incident.rule, incident.verdict, incident.reason) == ("ladder", "divergence", "spike")
    assert (incident.onset_step, incident.detected_step, incident.clock) == (58, 60, 61)
    assert (incident.lr_scale, incident.lr_from_step) == (0.5, 40)
    assert (incident.lr_until_step, incident.lr_return_step) == (160, 260)
    assert incident.request == "r-1"
    assert process.history.lr_factor_at(100) == 0.5


def test_replay_skips_nothing(process: Process) -> None:
    state, incident = process.rewinder.rewind(rewind_to(40, amount=0, rung=Rung.REPLAY), at(61))
    assert state == AFTER
    assert len(incident.skip_range) == 0
    assert process.ledger.ranges() == []


def test_skip_covers_what_was_seen_and_the_margin(process: Process) -> None:
    process.rewinder.rewind(rewind_to(40, amount=10, margin=64), at(61))
    assert process.ledger.ranges() == [(640, 16 * 61 + 64)]


def test_exact_skip_covers_its_amount_alone(process: Process) -> None:
    process.rewinder.rewind(rewind_to(40, amount=10, margin=64, is_exact=True), at(61))
    assert process.ledger.ranges() == [(640, 650)]


def test_evidence_is_kept_before_anything_is_replaced(process: Process) -> None:
    state = at(61)
    process.engine.number = 61
    process.rewinder.rewind(rewind_to(40), state)
    ((intent, seen, number),) = process.evidence.captured
    assert (seen, number) == (state, 61)
    assert intent.phase is Phase.INTENT


@pytest.mark.parametrize("amount", [50, 5000])
def test_second_rewind_of_an_incident_to_the_same_target_skips_fresh_data(
    amount: int, process: Process
) -> None:
    process.rewinder.rewind(rewind_to(40, amount=amount), at(61))
    (first,) = process.ledger.ranges()
    # Two steps after the first skip, the data is still bad.
    again = TrainState(step=42, cursor=first[1] + 32, clock=63, rewinds=1)
    process.rewinder.rewind(rewind_to(40, amount=amount, attempt=2), again)
    (second,) = process.ledger.ranges()
    assert second[1] - first[1] == max(amount, 32)


def test_amount_of_a_rewind_counts_none_that_is_skipped_already(process: Process) -> None:
    process.rewinder.rewind(rewind_to(40, amount=500), at(61))
    assert process.ledger.ranges() == [(640, 1140)]
    again = TrainState(step=42, cursor=1140 + 32, clock=63, rewinds=1)
    _, incident = process.rewinder.rewind(rewind_to(20, amount=1000, rung=Rung.SKIP_FURTHER), again)
    assert incident.skip == (320, 1820)
    assert process.ledger.num_samples() == 500 + 1000


# Taking up.


def test_fresh_folder_has_nothing_to_take_up(tmp_path: Path) -> None:
    assert Process(tmp_path).rewinder.resume() is None


def test_restart_takes_up_the_youngest_checkpoint(process: Process, tmp_path: Path) -> None:
    restarted = Process(tmp_path)
    resumed = taken_up(restarted)
    assert resumed.state == at(60)
    assert resumed.finished_incident is None
    assert restarted.engine.number == restarted.counter.count == 60


def test_restart_after_a_rewind_keeps_skips_clock_and_count(
    process: Process, tmp_path: Path
) -> None:
    process.rewinder.rewind(rewind_to(40), at(61))
    restarted = Process(tmp_path)
    resumed = taken_up(restarted)
    assert resumed.state == AFTER
    assert resumed.finished_incident is None
    assert restarted.ledger.ranges() == SKIPPED
    assert restarted.history.records == process.history.records


@pytest.mark.parametrize("phase", ["intent", "load", "quarantine", "done"])
def test_kill_at_any_phase_of_a_rewind_ends_in_the_same_decision(
    phase: str, process: Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_at(phase, process, monkeypatch)
    with pytest.raises(Killed):
        process.rewinder.rewind(rewind_to(40), at(61))

    for _ in range(2):  # a second restart changes nothing
        restarted = Process(tmp_path)
        resumed = taken_up(restarted)
        assert resumed.state == AFTER
        assert restarted.engine.number == restarted.counter.count == 40
        assert restarted.ledger.ranges() == SKIPPED
        assert health_of(restarted, 60) is Health.QUARANTINED
        phases = [record.phase for record in restarted.journal.read()]
        assert phases == [Phase.INTENT, Phase.DONE]


def kill_at(phase: str, process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    def append_then_kill(incident: Any) -> None:
        Journal.append(process.journal, incident)
        if incident.phase is Phase(phase):
            raise Killed

    if phase in ("intent", "done"):
        monkeypatch.setattr(process.journal, "append", append_then_kill)
    elif phase == "load":
        monkeypatch.setattr(process.engine, "load", die)
        monkeypatch.setattr(process.engine, "restore", die)
    else:
        monkeypatch.setattr(process.store, "quarantine", die)


def test_restart_that_finishes_a_rewind_says_which(
    process: Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_at("intent", process, monkeypatch)
    with pytest.raises(Killed):
        process.rewinder.rewind(rewind_to(40, incident=4), at(61))
    resumed = taken_up(Process(tmp_path))
    assert resumed.finished_incident is not None
    assert resumed.finished_incident.incident == 4
    assert resumed.checkpoint.step == 40


def test_notes_after_an_intent_do_not_close_it(
    process: Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_at("intent", process, monkeypatch)
    with pytest.raises(Killed):
        process.rewinder.rewind(rewind_to(40), at(61))
    (intent,) = process.journal.read()
    process.journal.append(replace(intent, phase=Phase.OBSERVED, incident=7))
    assert taken_up(Process(tmp_path)).state == AFTER


def test_rewind_before_there_were_rungs_is_finished(process: Process, tmp_path: Path) -> None:
    """Its record knows neither its rung nor how many rewinds there were."""
    _, done = process.rewinder.rewind(rewind_to(40), at(61))
    process.journal.path.unlink()
    Journal(process.journal.path).append(replace(done, phase=Phase.INTENT, rewinds=0, kept=()))
    assert taken_up(Process(tmp_path)).state.cursor == AFTER.cursor


def test_corrupt_youngest_checkpoint_is_quarantined_and_the_one_before_taken(
    process: Process, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spoil(process, 60)
    restarted = Process(tmp_path)
    assert taken_up(restarted).state.step == 40
    assert health_of(restarted, 60) is Health.QUARANTINED
    assert "is corrupt" in caplog.text


def test_corrupt_target_falls_back_to_the_good_one_before(process: Process) -> None:
    spoil(process, 40)
    state, incident = process.rewinder.rewind(rewind_to(40), at(61))
    assert (state.step, state.cursor) == (20, 320)
    assert (incident.target_step, incident.target_checkpoint) == (20, snapshot_name(at(20)))
    assert process.ledger.ranges() == SKIPPED
    assert health_of(process, 40) is Health.QUARANTINED


def test_no_readable_checkpoint_is_an_error_with_the_way_out(
    process: Process, tmp_path: Path
) -> None:
    for step in (0, 20, 40, 60):
        spoil(process, step)
    with pytest.raises(CorruptCheckpointError, match=r"none of 4 checkpoints .* can be read"):
        Process(tmp_path).rewinder.resume()


def test_checkpoints_that_are_all_quarantined_are_an_error_with_the_way_out(
    process: Process, tmp_path: Path
) -> None:
    for info in process.store.entries():
        process.store.quarantine(info.name, "bad")
    with pytest.raises(CorruptCheckpointError, match=r"quarantined.*run\.overwrite=true"):
        Process(tmp_path).rewinder.resume()


def test_target_that_has_vanished_gives_way_to_the_good_one_before(
    process: Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_at("load", process, monkeypatch)
    with pytest.raises(Killed):
        process.rewinder.rewind(rewind_to(40), at(61))
    process.entry(40).path.rename(tmp_path / "elsewhere")
    restarted = Process(tmp_path)
    assert taken_up(restarted).state.step == 20
    assert restarted.ledger.ranges() == SKIPPED


def test_intent_with_nothing_to_go_back_to_is_an_error_with_the_way_out(
    process: Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_at("load", process, monkeypatch)
    with pytest.raises(Killed):
        process.rewinder.rewind(rewind_to(40), at(61))
    for step in (0, 20, 40):
        process.entry(step).path.rename(tmp_path / f"elsewhere-{step}")
    with pytest.raises(JournalError, match=r"put it back, or start over with run\.overwrite=true"):
        Process(tmp_path).rewinder.resume()


def test_record_that_cannot_be_written_ends_the_run_before_anything_is_done(
    process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(incident: object) -> None:
        raise OSError(28, "No space left on device")

    process.engine.number = 61
    monkeypatch.setattr(process.journal, "append", full)
    with pytest.raises(JournalError, match=r"cannot be written \(No space left on device\)"):
        process.rewinder.rewind(rewind_to(40), at(61))
    assert process.engine.number == 61
    assert process.history.records == ()
    assert health_of(process, 60) is Health.CANDIDATE


def test_quarantine_that_a_full_disk_kept_from_being_written_holds_after_a_restart(
    process: Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("train.checkpoint.store.write_json", full)
        process.rewinder.rewind(rewind_to(40), at(61))
    assert health_of(process, 60) is Health.QUARANTINED
    restarted = Process(tmp_path)
    assert health_of(restarted, 60) is Health.CANDIDATE
    assert taken_up(restarted).state == AFTER
    assert health_of(restarted, 60) is Health.QUARANTINED


# From memory, and from disk when that fails.


def test_memory_comes_before_disk(with_memory: Process) -> None:
    state, incident = with_memory.rewinder.rewind(rewind_to(40), at(61))
    assert state == AFTER
    assert with_memory.engine.number == with_memory.counter.count == 40
    assert (with_memory.engine.num_restores, with_memory.engine.num_loads) == (1, 0)
    assert incident.target_checkpoint == snapshot_name(at(40))


def test_memory_and_disk_lead_to_the_same_records(with_memory: Process, tmp_path: Path) -> None:
    disk = Process(tmp_path / "disk", keep_snapshots=0)
    for step, health in ((0, Health.GOOD), (20, Health.GOOD), (40, Health.GOOD)):
        disk.save(step, health)
    disk.save(60, Health.CANDIDATE)
    found = []
    for process in (with_memory, disk):
        state, incident = process.rewinder.rewind(rewind_to(40), at(61))
        found.append((state, replace(incident, time=""), process.ledger.ranges()))
    assert found[0] == found[1]


def test_snapshot_that_fails_its_checksum_gives_way_to_the_same_state_on_disk(
    with_memory: Process, caplog: pytest.LogCaptureFixture
) -> None:
    corrupt_snapshot(with_memory.ring, snapshot_name(at(40)))
    state, incident = with_memory.rewinder.rewind(rewind_to(40), at(61))
    assert state == AFTER
    assert with_memory.engine.number == with_memory.counter.count == 40
    assert with_memory.engine.num_loads == 1
    assert incident.target_checkpoint == snapshot_name(at(40))
    assert not with_memory.ring.holds(snapshot_name(at(40)))
    assert "changed in host memory" in caplog.text and "falling back to disk" in caplog.text


def test_state_that_is_spoilt_in_memory_and_on_disk_gives_way_to_an_older_one(
    with_memory: Process,
) -> None:
    corrupt_snapshot(with_memory.ring, snapshot_name(at(40)))
    spoil(with_memory, 40)
    state, incident = with_memory.rewinder.rewind(rewind_to(40), at(61))
    assert (state.step, incident.target_step) == (20, 20)
    assert with_memory.engine.number == 20
    assert with_memory.ledger.ranges() == SKIPPED


def test_spoilt_state_that_was_in_memory_alone_gives_way_to_an_older_one_in_memory(
    with_memory: Process,
) -> None:
    corrupt_snapshot(with_memory.ring, snapshot_name(at(50)))
    state, _ = with_memory.rewinder.rewind(rewind_to(50), at(61))
    assert (state.step, with_memory.engine.number) == (40, 40)
    assert with_memory.engine.num_loads == 0
    assert with_memory.ledger.ranges() == [(800, 16 * 61)]


def test_snapshots_of_what_was_rewound_are_forgotten(with_memory: Process) -> None:
    with_memory.rewinder.rewind(rewind_to(40), at(61))
    assert [info.step for info in with_memory.ring.entries()] == [40]


def test_state_in_memory_can_be_gone_back_to_twice(with_memory: Process) -> None:
    for number in (1, 2):
        state, _ = with_memory.rewinder.rewind(rewind_to(50, attempt=number), at(61))
        assert state.step == with_memory.engine.number == 50
        with_memory.engine.number = 61
    assert with_memory.engine.num_loads == 0


# A target that was in memory alone, and a process that is gone.


def test_restart_without_the_target_trains_the_same_samples_and_skips_the_same(
    with_memory: Process, tmp_path: Path
) -> None:
    state, _ = with_memory.rewinder.rewind(rewind_to(50, amount=300), at(61))
    undisturbed = with_memory.samples(state, up_to_step=90)
    restarted = Process(tmp_path)
    resumed = taken_up(restarted)
    assert (resumed.state.step, resumed.state.cursor) == (40, 640)
    assert restarted.engine.number == 40
    assert restarted.ledger.ranges() == with_memory.ledger.ranges() == [(800, 1100)]
    assert restarted.samples(resumed.state, up_to_step=90) == [*range(640, 800), *undisturbed]


@pytest.mark.parametrize("phase", ["intent", "load", "quarantine", "done"])
def test_kill_at_any_phase_without_the_target_ends_in_the_same_data(
    phase: str, with_memory: Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_at(phase, with_memory, monkeypatch)
    with pytest.raises(Killed):
        with_memory.rewinder.rewind(rewind_to(50, amount=300), at(61))
    for _ in range(2):
        restarted = Process(tmp_path)
        state = taken_up(restarted).state
        assert (state.step, state.cursor, state.clock, state.rewinds) == (40, 640, 61, 1)
        assert restarted.engine.number == restarted.counter.count == 40
        assert restarted.samples(state, up_to_step=70)[: 16 * 11] == [
            *range(640, 800),
            *range(1100, 1116),
        ]
        assert health_of(restarted, 60) is Health.QUARANTINED
        assert pending(restarted.journal.read()) is None


def test_replay_without_the_target_trains_the_same_samples_in_order(
    with_memory: Process, tmp_path: Path
) -> None:
    with_memory.rewinder.rewind(rewind_to(50, amount=0, rung=Rung.REPLAY), at(61))
    restarted = Process(tmp_path)
    state = taken_up(restarted).state
    assert restarted.samples(state, up_to_step=70) == list(range(640, 16 * 70))


# What is kept for attribution.


def test_last_two_good_checkpoints_up_to_the_target_are_named(with_memory: Process) -> None:
    _, incident = with_memory.rewinder.rewind(rewind_to(40), at(61))
    assert incident.kept == (snapshot_name(at(20)), snapshot_name(at(40)))


def test_target_in_memory_alone_names_those_on_disk(with_memory: Process) -> None:
    _, incident = with_memory.rewinder.rewind(rewind_to(50), at(61))
    assert incident.kept == (snapshot_name(at(20)), snapshot_name(at(40)))


@pytest.mark.parametrize("is_restarted", [False, True])
def test_kept_checkpoints_outlive_retention(
    is_restarted: bool, process: Process, tmp_path: Path
) -> None:
    process.rewinder.rewind(rewind_to(40), at(61))
    if is_restarted:
        process = Process(tmp_path)
        taken_up(process)
    for number in range(1, 10):
        process.save(at(40 + 10 * number, clock=61 + 10 * number), Health.GOOD)
    steps = {info.step for info in process.store.entries()}
    assert {20, 40} <= steps
    assert steps.isdisjoint({0, 60})


# Notes and stops.


def note(clock: int = 61, **fields: Any) -> Note:
    wish: dict[str, Any] = {
        "rule": "ladder",
        "rung": Rung.VETO,
        "incident": 0,
        "attempt": 1,
        "is_observed": False,
        "verdict": "outlier",
        "onset_step": 61,
        "detected_step": 61,
        "clock": clock,
        "reason": "outlier; its update was refused",
    }
    return Note(**{**wish, **fields})


def test_refused_update_is_written_down_once(process: Process, tmp_path: Path) -> None:
    process.rewinder.note(note(61))
    process.rewinder.note(note(62))
    process.rewinder.note(note(61))
    restarted = Process(tmp_path)
    taken_up(restarted)
    restarted.rewinder.note(note(62))
    restarted.rewinder.note(note(63))
    restarted.rewinder.note(note(63, detected_step=20))  # a lost target led to an older state
    records = restarted.journal.read()
    assert [record.clock for record in records] == [61, 62, 63, 63]
    assert {record.phase for record in records} == {Phase.DONE}
    assert restarted.history.num_vetoes == 4


def test_incident_is_observed_once_even_if_two_reports_are_read_at_once(process: Process) -> None:
    target = snapshot_name(at(40))
    for step, incident in ((65, 1), (66, 1), (300, 2)):
        process.rewinder.note(
            note(
                clock=step,
                detected_step=step,
                is_observed=True,
                rung=Rung.REPLAY,
                incident=incident,
                target=target,
                target_step=40,
            )
        )
    found = [(record.incident, record.detected_step) for record in process.journal.read()]
    assert found == [(1, 65), (2, 300)]


def test_note_changes_neither_data_nor_state(process: Process) -> None:
    process.engine.number = 61
    target = snapshot_name(at(40))
    process.rewinder.note(note())
    process.rewinder.note(
        note(
            is_observed=True,
            rung=Rung.SKIP,
            incident=1,
            target=target,
            target_step=40,
            code="a_code",
        )
    )
    assert process.engine.number == 61
    assert process.ledger.ranges() == []
    assert process.history.num_rewinds == 0
    observed = process.journal.read()[1]
    assert (observed.phase, observed.target_checkpoint, observed.target_step) == (
        Phase.OBSERVED,
        target,
        40,
    )
    assert observed.code == "a_code"


def test_restart_does_not_do_what_was_merely_observed(process: Process, tmp_path: Path) -> None:
    target = snapshot_name(at(40))
    process.rewinder.note(
        note(is_observed=True, rung=Rung.SKIP, incident=1, target=target, target_step=40)
    )
    restarted = Process(tmp_path)
    resumed = taken_up(restarted)
    assert resumed.state == at(60)
    assert restarted.ledger.ranges() == []


def test_stop_is_written_down_with_what_led_to_it(process: Process) -> None:
    stop = Stop(
        reason="tried all",
        needs_save=False,
        is_failure=True,
        code="ladder_exhausted",
        rule="palm",
        incident=3,
        verdict="spike",
        onset_step=55,
        detected_step=60,
    )
    process.rewinder.stopped(stop, at(61))
    (record,) = process.journal.read()
    assert (record.rung, record.phase, record.clock) == (Rung.STOP, Phase.DONE, 61)
    assert (record.code, record.reason, record.rule) == ("ladder_exhausted", "tried all", "palm")
    assert (record.incident, record.verdict) == (3, "spike")
    assert (record.onset_step, record.detected_step) == (55, 60)
    assert len(record.skip_range) == 0
    assert not record.is_rewind


# An operator's skip.


def test_skip_begins_at_the_next_sample(process: Process, tmp_path: Path) -> None:
    record = process.rewinder.skip(Skip(amount=100, reason="bad shard", request="r-1"), at(61))
    assert record.skip == (976, 1076)
    assert (record.rung, record.rule, record.request) == (Rung.SKIP_AHEAD, "operator", "r-1")
    assert process.samples(at(61), up_to_step=62) == list(range(1076, 1092))
    restarted = Process(tmp_path)
    state = taken_up(restarted).state
    assert restarted.samples(state, up_to_step=62) == [*range(960, 976), *range(1076, 1092)]


def test_second_skip_at_the_same_place_skips_fresh_data(process: Process) -> None:
    for number in (1, 2):
        process.rewinder.skip(Skip(amount=100, reason="more", request=f"r-{number}"), at(61))
    assert process.ledger.ranges() == [(976, 1176)]
    assert [record.incident for record in process.history.records] == [1, 2]


# An operator's unskip.

LAST_STEP = 300


def unskip(
    process: Process, state: TrainState, *skipped: BatchRange, name: str = "u"
) -> list[Incident]:
    end = process.ledger.advance(state.cursor, BATCH_SAMPLES * (LAST_STEP - state.step))
    action = Unskip(skipped=skipped, reason="innocent", request=name)
    return process.rewinder.unskip(action, state, end_cursor=end)


def test_what_is_put_back_is_the_last_that_the_run_reads(process: Process) -> None:
    state, incident = process.rewinder.rewind(rewind_to(40), at(61))
    before = process.samples(state, up_to_step=LAST_STEP)
    (record,) = unskip(process, state, incident.skip_range)
    after = process.samples(state, up_to_step=LAST_STEP)
    num_back = len(incident.skip_range)
    assert after == [*before[:-num_back], *range(640, 976)]
    assert (record.rung, record.rule, record.request) == (Rung.UNSKIP, "operator", "u")
    assert [record.returned] == process.returns.entries()


def test_several_ranges_are_put_back_in_their_order(process: Process) -> None:
    state, _ = process.rewinder.rewind(rewind_to(40), at(61))
    before = process.samples(state, up_to_step=LAST_STEP)
    ranges = [BatchRange(start=640, stop=700), BatchRange(start=800, stop=900)]
    records = unskip(process, state, *ranges)
    after = process.samples(state, up_to_step=LAST_STEP)
    assert after == [*before[:-160], *range(640, 700), *range(800, 900)]
    assert sorted(record.request for record in records) == ["", "u"]


def test_request_for_several_ranges_is_known_only_when_all_are_back(
    process: Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, _ = process.rewinder.rewind(rewind_to(40), at(61))
    ranges = [BatchRange(start=640, stop=700), BatchRange(start=800, stop=900)]

    def append_then_kill(incident: Any) -> None:
        Journal.append(process.journal, incident)
        raise Killed

    monkeypatch.setattr(process.journal, "append", append_then_kill)
    with pytest.raises(Killed):
        unskip(process, state, *ranges)
    restarted = Process(tmp_path)
    taken_up(restarted)
    assert len(restarted.returns.entries()) == 1
    assert not restarted.history.is_request_known("u")


def test_what_is_put_back_survives_a_restart(process: Process, tmp_path: Path) -> None:
    state, incident = process.rewinder.rewind(rewind_to(40), at(61))
    unskip(process, state, incident.skip_range)
    restarted = Process(tmp_path)
    resumed = taken_up(restarted)
    assert restarted.returns.entries() == process.returns.entries()
    assert restarted.samples(resumed.state, up_to_step=LAST_STEP) == process.samples(
        state, up_to_step=LAST_STEP
    )


def test_two_that_are_put_back_are_both_read(process: Process) -> None:
    _, first = process.rewinder.rewind(rewind_to(40), at(61))
    later = TrainState(step=50, cursor=976 + 160, clock=71)
    second = process.rewinder.skip(Skip(amount=200, reason="", request="s"), later)
    unskip(process, later, first.skip_range, name="a")
    unskip(process, later, second.skip_range, name="b")
    trained = process.samples(later, up_to_step=LAST_STEP)
    assert len(set(trained)) == len(trained)
    assert {*range(640, 976), *range(1136, 1336)} <= set(trained)


@pytest.mark.parametrize("room", [0, 100, 335, 336, 337])
def test_what_finds_no_room_is_read_only_by_a_longer_run(room: int, process: Process) -> None:
    state, incident = process.rewinder.rewind(rewind_to(40), at(61))
    assert len(incident.skip_range) == 336
    end = 976 + room
    action = Unskip(skipped=(incident.skip_range,), reason="innocent", request="u")
    (record,) = process.rewinder.unskip(action, replace(state, cursor=976), end_cursor=end)
    assert record.returned is not None
    is_read = record.returned[0] + 336 <= end
    assert is_read == (room >= 336)
    assert ("no room is left" in record.reason) != is_read


def test_what_is_put_back_lies_before_no_cursor_in_use_and_after_what_is_skipped(
    process: Process,
) -> None:
    state, incident = process.rewinder.rewind(rewind_to(40, amount=3000), at(61))
    (record,) = unskip(process, state, BatchRange(start=640, stop=700))
    assert record.returned is not None
    assert record.returned[0] >= process.ledger.end > state.cursor
    assert incident.skip == (640, 3640)


def test_what_is_skipped_further_on_stays_skipped_when_something_is_put_back(
    with_memory: Process, tmp_path: Path
) -> None:
    """A target lost with its process leaves the skip some way ahead of the cursor."""
    with_memory.rewinder.skip(Skip(amount=100, reason="", request="s"), at(20))
    with_memory.rewinder.rewind(rewind_to(50, amount=3000), at(61))
    restarted = Process(tmp_path)
    state = taken_up(restarted).state
    assert state.cursor == 640
    bad = set(range(800, 3800))
    assert bad.isdisjoint(restarted.samples(state, up_to_step=LAST_STEP))
    action = Unskip(skipped=(BatchRange(start=320, stop=420),), reason="", request="u")
    restarted.rewinder.unskip(action, state, end_cursor=3850)
    assert bad.isdisjoint(restarted.samples(state, up_to_step=LAST_STEP))


def test_what_cannot_be_put_back_is_not_written_down(process: Process, tmp_path: Path) -> None:
    state, incident = process.rewinder.rewind(rewind_to(40), at(61))
    unskip(process, state, incident.skip_range, name="a")
    num_records = len(process.journal.read())
    with pytest.raises(ValueError, match="are back already"):
        unskip(process, state, incident.skip_range, name="b")
    assert len(process.journal.read()) == num_records
    taken_up(Process(tmp_path))


# Requests.


@pytest.mark.parametrize("phase", ["intent", "load", "quarantine", "done"])
def test_request_cut_short_is_known_after_the_restart(
    phase: str, process: Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_at(phase, process, monkeypatch)
    with pytest.raises(Killed):
        process.rewinder.rewind(rewind_to(40, request="r-1", rung=Rung.REWIND), at(61))
    restarted = Process(tmp_path)
    taken_up(restarted)
    assert restarted.history.is_request_known("r-1")
    assert restarted.history.policy_rewinds() == 0
    assert restarted.history.num_rewinds == 1


Act = Callable[[Process], object]


@pytest.mark.parametrize(
    "act",
    [
        lambda process: process.rewinder.skip(Skip(amount=5, reason="", request="r"), at(61)),
        lambda process: process.rewinder.note(note()),
        lambda process: process.rewinder.stopped(Stop(reason="", needs_save=False), at(61)),
    ],
    ids=["skip", "note", "stop"],
)
def test_act_without_parts_is_one_record(act: Act, process: Process) -> None:
    act(process)
    assert [record.phase for record in process.journal.read()] == [Phase.DONE]
    assert list(process.history.records) == process.journal.read()
