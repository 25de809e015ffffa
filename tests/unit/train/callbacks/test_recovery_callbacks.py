"""From verdicts to rewinds, notes and stops, and from calm steps to states that are trusted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import Process, at, rewind_to

from train.actions import Note, Rewind, Save, Stop
from train.callbacks.checkpointing import Checkpointing
from train.callbacks.spike_detection import SpikeDetection
from train.callbacks.spike_recovery import SpikeRecovery
from train.checkpoint.info import Health
from train.checkpoint.snapshots import snapshot_name
from train.events import RunStart
from train.recovery.detector import Verdict, VerdictKind
from train.recovery.history import RecoveryHistory
from train.recovery.policy import Rung
from train.schedule import Schedule
from train.settings import RunConfig
from train.signals import Gate, StepReport, StepSignals
from train.state import TrainState

pytestmark = pytest.mark.usefixtures("fast_disk")

ComposeConfig = Callable[..., tuple[RunConfig, dict[str, Any]]]

# One step is one step, whatever the size that the defaults are scaled to.
UNSCALED = ["recovery.step_scale=1.0", "recovery.token_scale=1.0"]
QUIET = Verdict(kind=VerdictKind.OK, step=1, onset_step=1)


@pytest.fixture
def process(tmp_path: Path) -> Process:
    return Process(tmp_path)


def report(
    step: int,
    kind: VerdictKind,
    *,
    onset: int | None = None,
    is_vetoed: bool = False,
    loss: float = 8.0,
) -> StepReport:
    return StepReport(
        state=TrainState(step=step, cursor=16 * step, clock=step + 7),
        signals=StepSignals(loss_nats=loss, grad_norm=1.0, is_vetoed=is_vetoed),
        lr=1e-3,
        num_samples=16,
        num_tokens=2048,
        step_seconds=0.1,
        data_seconds=0.0,
        finished_unix_seconds=0.0,
        verdict=Verdict(
            kind=kind, step=step, onset_step=step if onset is None else onset, deviation=9.0
        ),
    )


def schedule_of(config: RunConfig) -> Schedule:
    return Schedule(config.schedule, peak_lr=1.0, num_steps=config.run.steps)


def recovery(config: RunConfig, process: Process) -> SpikeRecovery:
    return SpikeRecovery(
        config.recovery, process.tiers, schedule_of(config), process.history, sequence_length=128
    )


SPIKE = report(95, VerdictKind.SPIKE, onset=93)


# Recovery: falcon and palm.


def test_spike_goes_back_to_a_good_checkpoint_and_skips_from_there(
    compose_config: ComposeConfig, process: Process
) -> None:
    config, _ = compose_config(
        ["recovery=falcon", "recovery.token_scale=1e-6", "recovery.step_scale=1.0"]
    )
    target = process.save(80, Health.GOOD)
    process.save(90, Health.CANDIDATE)
    action = recovery(config, process).after_update(SPIKE)
    assert isinstance(action, Rewind)
    assert (action.target, action.target_step, action.skip_from) == (target, 80, 1280)
    assert action.skip_amount == 8  # 1,000 tokens of 128 a sample
    assert (action.onset_step, action.detected_step, action.verdict) == (93, 95, "spike")
    assert (action.rule, action.rung) == ("falcon", Rung.SKIP)
    assert (action.incident, action.attempt) == (1, 1)


def test_palm_skips_batches_of_the_size_at_its_target(
    compose_config: ComposeConfig, process: Process
) -> None:
    config, _ = compose_config(
        ["recovery=palm", "recovery.skip=10 batches", "recovery.step_scale=1.0"]
    )
    process.save(0, Health.GOOD)
    action = recovery(config, process).after_update(SPIKE)
    assert isinstance(action, Rewind)
    schedule = schedule_of(config)
    assert action.skip_amount == schedule.samples_between(0, 10)
    assert action.skip_amount < 10 * config.schedule.batch_samples
    assert action.margin == schedule.samples_between(95, 105)


@pytest.mark.parametrize("kind", [VerdictKind.OK, VerdictKind.OUTLIER, VerdictKind.LEVEL_SHIFT])
def test_step_that_needs_no_rollback_is_left_alone(
    kind: VerdictKind, compose_config: ComposeConfig, process: Process
) -> None:
    config, _ = compose_config()
    process.save(0, Health.GOOD)
    assert recovery(config, process).after_update(report(95, kind)) is None


def test_step_without_a_verdict_is_left_alone(
    compose_config: ComposeConfig, process: Process
) -> None:
    config, _ = compose_config()
    assert recovery(config, process).after_update(replace(SPIKE, verdict=None)) is None


def test_used_up_budget_stops_the_run_as_a_failure(
    compose_config: ComposeConfig, process: Process
) -> None:
    config, _ = compose_config(["recovery=falcon", "recovery.max_rewinds=1"])
    process.save(40, Health.GOOD)
    process.rewinder.rewind(rewind_to(40), at(61))
    action = recovery(config, process).after_update(SPIKE)
    assert isinstance(action, Stop)
    assert action.is_failure
    assert not action.needs_save
    assert (action.code, action.rule, action.verdict) == ("rewinds_used_up", "falcon", "spike")
    assert (action.incident, action.onset_step, action.detected_step) == (1, 93, 95)


def test_rewinds_that_a_person_asked_for_use_up_nothing(
    compose_config: ComposeConfig, process: Process
) -> None:
    config, _ = compose_config(["recovery=falcon", "recovery.max_rewinds=1"])
    process.save(40, Health.GOOD)
    process.rewinder.rewind(rewind_to(40, rung=Rung.REWIND, request="r"), at(61))
    assert isinstance(recovery(config, process).after_update(SPIKE), Rewind)


def test_quarantined_checkpoint_is_no_target(
    compose_config: ComposeConfig, process: Process
) -> None:
    config, _ = compose_config()
    process.store.quarantine(process.save(80, Health.GOOD), "corrupt")
    action = recovery(config, process).after_update(SPIKE)
    assert isinstance(action, Stop)
    assert "no good checkpoint" in action.reason


def test_state_in_memory_alone_is_a_target(compose_config: ComposeConfig, process: Process) -> None:
    config, _ = compose_config()
    process.save(40, Health.GOOD)
    target = process.save(90, Health.GOOD, to_disk=False, to_memory=True)
    action = recovery(config, process).after_update(SPIKE)
    assert isinstance(action, Rewind)
    assert action.target == target


# Recovery: the ladder over a run.


def test_ladder_is_climbed_over_rewinds_and_restarts(
    compose_config: ComposeConfig, tmp_path: Path
) -> None:
    """The same trouble comes again and again; what was tried is read off the journal."""
    config, _ = compose_config([*UNSCALED, "recovery.rewind_steps=20", "recovery.skip=5 batches"])
    process = Process(tmp_path)
    for step in range(0, 91, 10):
        process.store.save(
            process.engine, at(step), {"ledger": [], "callbacks": {}}, health=Health.GOOD
        )
    tried = []
    present = at(96, clock=96)
    while isinstance(action := recovery(config, process).after_update(SPIKE), Rewind):
        state, _ = process.rewinder.rewind(action, present)
        tried.append((action.rung, action.attempt, action.target_step, action.lr_scale))
        present = TrainState(step=96, cursor=state.cursor + 5000, clock=state.clock + 30)
        process = Process(tmp_path)
        process.rewinder.resume()
    assert [entry[:2] for entry in tried] == [
        (Rung.REPLAY, 1),
        (Rung.SKIP, 2),
        (Rung.SKIP_FURTHER, 3),
        (Rung.SKIP_FURTHER, 4),
        (Rung.COOL, 5),
    ]
    # Only five good ones are kept, and what lies after a target is quarantined.
    assert [entry[2] for entry in tried] == [90, 90, 70, 50, 50]
    assert [entry[3] for entry in tried] == [1.0, 1.0, 1.0, 1.0, 0.5]
    assert isinstance(action, Stop)
    assert action.code == "ladder_exhausted"


def test_replay_skips_nothing_and_later_attempts_more(
    compose_config: ComposeConfig, process: Process
) -> None:
    config, _ = compose_config([*UNSCALED, "recovery.skip=10 batches"])
    process.save(80, Health.GOOD)
    amounts = []
    present = at(96, clock=96)
    for _ in range(3):
        action = recovery(config, process).after_update(SPIKE)
        assert isinstance(action, Rewind)
        amounts.append(action.skip_amount)
        state, _ = process.rewinder.rewind(action, present)
        present = at(96, clock=state.clock + 16)
    assert amounts == [0, 160, 320]


def test_cooled_rate_is_held_and_returns_in_as_many_steps(
    compose_config: ComposeConfig, process: Process
) -> None:
    config, _ = compose_config(
        ["recovery.step_scale=0.5", "recovery.cool_steps=100", "recovery.ladder=[cool]"]
    )
    process.save(80, Health.GOOD)
    action = recovery(config, process).after_update(SPIKE)
    assert isinstance(action, Rewind)
    assert (action.rung, action.lr_scale) == (Rung.COOL, 0.5)
    assert (action.lr_until_step, action.lr_return_step) == (145, 195)
    process.rewinder.rewind(action, at(96))
    factors = [process.history.lr_factor_at(step) for step in (79, 80, 144, 145, 170, 195)]
    assert factors == pytest.approx([1.0, 0.5, 0.5, 0.5, 0.75, 1.0])


def test_steps_of_the_rule_are_scaled_to_the_size_of_the_run(
    compose_config: ComposeConfig, process: Process
) -> None:
    ladder = "recovery.ladder=[skip_further]"
    config, _ = compose_config(["recovery.step_scale=0.5", "recovery.rewind_steps=40", ladder])
    for step in range(0, 100, 10):
        process.save(step, Health.GOOD)
    action = recovery(config, process).after_update(SPIKE)
    assert isinstance(action, Rewind)
    assert action.target_step == 70, "20 steps before the onset at 93, not 40"


@pytest.mark.parametrize(("onset", "incident", "attempt"), [(110, 1, 2), (111, 2, 1)])
def test_cooldown_is_scaled_to_the_size_of_the_run(
    onset: int, incident: int, attempt: int, compose_config: ComposeConfig, process: Process
) -> None:
    config, _ = compose_config(["recovery.step_scale=0.5", "recovery.cooldown_steps=100"])
    process.save(40, Health.GOOD)
    process.rewinder.rewind(rewind_to(40, rung=Rung.REPLAY, amount=0), at(61))
    found = report(onset + 1, VerdictKind.SPIKE, onset=onset)
    action = recovery(config, process).after_update(found)
    assert isinstance(action, Rewind)
    assert (action.incident, action.attempt) == (incident, attempt)


def test_refused_update_is_noted(compose_config: ComposeConfig, process: Process) -> None:
    config, _ = compose_config()
    refused = report(95, VerdictKind.OUTLIER, is_vetoed=True)
    note = recovery(config, process).after_update(refused)
    assert isinstance(note, Note)
    assert (note.rung, note.incident, note.is_observed) == (Rung.VETO, 0, False)
    assert (note.rule, note.verdict, note.clock) == ("ladder", "outlier", 102)
    assert (note.onset_step, note.detected_step) == (95, 95)
    assert note.reason.startswith("outlier at step 95, found at step 95, 9.0 sigma")
    assert note.reason.endswith("; its update was refused")
    assert (note.target, note.target_step) == ("", 0)


def test_budget_of_refused_updates_survives_a_restart(
    compose_config: ComposeConfig, tmp_path: Path
) -> None:
    config, _ = compose_config(["recovery.max_vetoes=3"])
    process = Process(tmp_path)
    process.save(0, Health.GOOD)
    refused = [report(step, VerdictKind.NONFINITE, is_vetoed=True) for step in (50, 60, 70, 80)]
    for step_report in refused[:3]:
        note = recovery(config, process).after_update(step_report)
        assert isinstance(note, Note)
        process.rewinder.note(note)
        process = Process(tmp_path)
        process.rewinder.resume()
    assert isinstance(recovery(config, process).after_update(refused[3]), Rewind)


def test_observe_notes_what_it_would_do_once_and_does_nothing(
    compose_config: ComposeConfig, process: Process
) -> None:
    config, _ = compose_config(["recovery=observe"])
    target = process.save(80, Health.GOOD)
    watch = recovery(config, process)
    note = watch.after_update(SPIKE)
    assert isinstance(note, Note)
    assert (note.rung, note.incident, note.attempt) == (Rung.REPLAY, 1, 1)
    assert (note.is_observed, note.rule) == (True, "observe")
    assert (note.target, note.target_step) == (target, 80)
    assert note.reason.endswith("; would replay from step 80")
    process.rewinder.note(note)
    for step in range(96, 110):
        again = watch.after_update(report(step, VerdictKind.SPIKE, onset=93))
        assert again is None


def test_observe_notes_once_that_it_would_give_up(
    compose_config: ComposeConfig, process: Process
) -> None:
    config, _ = compose_config(["recovery=observe"])
    watch = recovery(config, process)
    notes = []
    for step in range(95, 110):
        note = watch.after_update(report(step, VerdictKind.SPIKE, onset=93))
        if isinstance(note, Note):
            notes.append(note)
            process.rewinder.note(note)
    assert [(note.rung, note.incident) for note in notes] == [(Rung.STOP, 1)]
    assert "no good checkpoint" in notes[0].reason


def test_skip_step_bears_notes_and_stops_but_never_goes_back(
    compose_config: ComposeConfig, process: Process
) -> None:
    config, _ = compose_config(["recovery=skip_step"])
    process.save(0, Health.GOOD)
    callback = recovery(config, process)
    assert callback.after_update(SPIKE) is None
    answers = [
        callback.after_update(report(step, VerdictKind.NONFINITE, onset=50, is_vetoed=True))
        for step in range(50, 54)
    ]
    assert [type(answer) for answer in answers] == [Note, Note, Note, Stop]
    assert isinstance(answers[-1], Stop)
    assert answers[-1].code == "nonfinite_in_a_row"


# Detection.


def detection(config: RunConfig, history: RecoveryHistory | None = None) -> SpikeDetection:
    return SpikeDetection(config.recovery, schedule_of(config), history or RecoveryHistory())


@pytest.mark.parametrize(
    "arguments",
    [
        ["recovery=none"],
        ["recovery=falcon"],
        ["recovery=palm"],
        ["recovery=observe"],
        ["recovery=observe", "recovery.veto=outlier"],
        ["recovery.veto=off"],
        ["recovery.veto=nonfinite"],
    ],
)
def test_rule_that_does_not_refuse_outliers_sets_no_gate(
    arguments: list[str], compose_config: ComposeConfig
) -> None:
    config, _ = compose_config(arguments)
    judge = detection(config)
    for step in range(1, 60):
        judge.after_update(report(step, VerdictKind.OK))
    assert judge.gate() is None


@pytest.mark.parametrize(
    "arguments", [[], ["recovery=skip_step"], ["recovery=falcon", "recovery.veto=outlier"]]
)
def test_outliers_are_refused_on_the_device_where_the_rule_says_so(
    arguments: list[str], compose_config: ComposeConfig
) -> None:
    config, _ = compose_config(arguments)
    judge = detection(config)
    assert judge.gate() == Gate(), "nothing is known yet"
    for step in range(1, 60):
        judge.after_update(report(step, VerdictKind.OK, loss=8.0 + 0.01 * (step % 5)))
    gate = judge.gate()
    assert gate is not None
    assert 8.0 < gate.max_loss_nats < 20.0
    assert 1.0 < gate.max_grad_norm < 20.0


def test_gate_opens_when_the_refused_updates_of_the_run_are_used_up(
    compose_config: ComposeConfig, process: Process
) -> None:
    config, _ = compose_config(["recovery.max_vetoes=2"])
    judge = detection(config, process.history)
    for step in (50, 51):
        assert judge.gate() is not None
        note = recovery(config, process).after_update(
            report(step, VerdictKind.OUTLIER, is_vetoed=True)
        )
        assert isinstance(note, Note)
        process.rewinder.note(note)
    assert judge.gate() is None


def start_of_run(state: TrainState, *, is_resumed: bool = False, is_sound: bool = True) -> RunStart:
    return RunStart(
        name="r",
        state=state,
        last_step=100,
        num_parameters=1,
        is_resumed=is_resumed,
        is_sound=is_sound,
    )


class Spy:
    """Stands in for the detector, and writes down what it is told."""

    def __init__(self) -> None:
        self.step = 0
        self.announced: list[tuple[int, int]] = []
        """Each with the step before it that was judged last."""
        self.num_resumes = 0
        self.told: list[dict[str, object]] = []

    def announce(self, step: int, num_steps: int | None = None) -> None:
        self.announced.append((self.step, step))

    def resumed(self) -> None:
        self.num_resumes += 1

    def update(self, step: int, *values: object, **more: object) -> Verdict:
        self.step = step
        self.told.append({"step": step, "values": values, **more})
        return QUIET


def spied(judge: SpikeDetection) -> Spy:
    spy = Spy()
    judge._detector = spy  # type: ignore[assignment]
    return spy


def test_changes_that_are_known_are_announced_before_their_gate_is_set(
    compose_config: ComposeConfig,
) -> None:
    """When the report of a step is read, the next update is under way, behind its own gate."""
    config, _ = compose_config(
        [
            "recovery.announced=[2,33]",
            "schedule.batch_ramp_start_samples=4",
            "schedule.batch_ramp_increment_samples=4",
            "schedule.batch_ramp_steps=12",
        ]
    )
    judge = detection(config)
    spy = spied(judge)
    judge.on_run_start(start_of_run(at(0)))
    for step in range(1, 50):
        judge.after_update(report(step, VerdictKind.OK))
    # The report of step n is that of the update that follows n - 1 finished ones.
    schedule = schedule_of(config)
    ramp = [step for step in range(1, 50) if schedule.is_change_at(step - 1)]
    assert len(ramp) == 3
    assert {step for _, step in spy.announced} == {2, *ramp, 33}
    for change in (*ramp, 33):
        assert change - 2 in {judged for judged, step in spy.announced if step == change}
    assert (0, 2) in spy.announced


@pytest.mark.parametrize("is_restarted", [False, True])
def test_cooled_rate_and_its_return_are_announced(
    is_restarted: bool, compose_config: ComposeConfig, process: Process, tmp_path: Path
) -> None:
    config, _ = compose_config(["schedule.batch_ramp_steps=0"])
    process.save(40, Health.GOOD)
    cooling = rewind_to(40, rung=Rung.COOL, lr_scale=0.5, lr_until_step=60, lr_return_step=80)
    judge = detection(config, process.history)
    spy = spied(judge)
    state, incident = process.rewinder.rewind(cooling, at(50))
    if is_restarted:
        process = Process(tmp_path)
        process.rewinder.resume()
        judge = detection(config, process.history)
        spy = spied(judge)
        judge.on_run_start(start_of_run(state, is_resumed=True))
    else:
        judge.on_rewind(incident, state, 0.0)
    for step in range(41, 100):
        judge.after_update(report(step, VerdictKind.OK))
    assert {step for _, step in spy.announced} == {41, 61}
    assert (0, 41) in spy.announced


def test_level_that_was_let_in_is_announced_where_it_begins(
    compose_config: ComposeConfig, process: Process
) -> None:
    config, _ = compose_config(["schedule.batch_ramp_steps=0"])
    process.save(40, Health.GOOD)
    state, incident = process.rewinder.rewind(rewind_to(40, rung=Rung.ACCEPT, amount=0), at(50))
    judge = detection(config, process.history)
    spy = spied(judge)
    judge.on_rewind(incident, state, 0.0)
    for step in range(41, 100):
        judge.after_update(report(step, VerdictKind.OK))
    assert {step for _, step in spy.announced} == {41}
    assert process.history.lr_factor_at(45) == 1.0


def test_detector_is_told_every_signal(compose_config: ComposeConfig) -> None:
    config, _ = compose_config()
    judge = detection(config)
    spy = spied(judge)
    signals = StepSignals(
        loss_nats=2.0,
        grad_norm=0.5,
        is_vetoed=False,
        update_norm=0.1,
        nonfinite_share=0.0,
        group_norms=(0.3, 0.4),
    )
    assert judge.after_update(replace(SPIKE, signals=signals)) is QUIET
    assert spy.told == [
        {
            "step": 95,
            "values": (2.0, 0.5),
            "update_norm": 0.1,
            "group_norms": (0.3, 0.4),
            "nonfinite_share": 0.0,
        }
    ]


@pytest.mark.parametrize(
    ("is_resumed", "is_sound", "expected"), [(True, True, 1), (True, False, 0), (False, True, 0)]
)
def test_only_a_sound_resume_must_continue_the_loss(
    is_resumed: bool, is_sound: bool, expected: int, compose_config: ComposeConfig
) -> None:
    config, _ = compose_config()
    judge = detection(config)
    spy = spied(judge)
    judge.on_run_start(start_of_run(at(5), is_resumed=is_resumed, is_sound=is_sound))
    assert spy.num_resumes == expected


# Checkpointing.


@pytest.fixture
def checkpointing(compose_config: ComposeConfig, process: Process) -> Checkpointing:
    config, _ = compose_config(["checkpoint.interval_steps=10", "checkpoint.good_after_steps=3"])
    return Checkpointing(config.checkpoint, process.tiers)


def saves(
    checkpointing: Checkpointing, steps: range, kind: VerdictKind = VerdictKind.OK
) -> dict[int, tuple[bool, bool]]:
    """Return which steps asked for a save, to disk and to memory."""
    asked = {}
    for step in steps:
        action = checkpointing.after_update(report(step, kind))
        if isinstance(action, Save):
            asked[step] = (action.to_disk, action.to_memory)
    return asked


def health_at(process: Process, step: int) -> Health:
    return process.entry(step).health


def test_save_is_asked_for_at_each_interval_and_needs_its_own_report(
    checkpointing: Checkpointing,
) -> None:
    asked = saves(checkpointing, range(1, 31))
    assert asked == {10: (True, True), 20: (True, True), 30: (True, True)}
    assert [step for step in range(1, 31) if checkpointing.needs_current(step)] == list(asked)


def test_memory_has_an_interval_of_its_own(compose_config: ComposeConfig, process: Process) -> None:
    config, _ = compose_config(
        ["checkpoint.interval_steps=10", "checkpoint.snapshot_interval_steps=4"]
    )
    asked = saves(Checkpointing(config.checkpoint, process.tiers), range(1, 21))
    disk, memory, both = (True, False), (False, True), (True, True)
    assert asked == {4: memory, 8: memory, 10: disk, 12: memory, 16: memory, 20: both}


def test_without_snapshots_only_the_disk_is_asked_for(
    compose_config: ComposeConfig, process: Process
) -> None:
    config, _ = compose_config(
        [
            "checkpoint.interval_steps=10",
            "checkpoint.snapshot_interval_steps=4",
            "checkpoint.keep_snapshots=0",
        ]
    )
    callback = Checkpointing(config.checkpoint, process.tiers)
    assert saves(callback, range(1, 21)) == {10: (True, False), 20: (True, False)}
    assert not callback.needs_current(4)


@pytest.mark.parametrize("kind", [VerdictKind.SPIKE, VerdictKind.OUTLIER, VerdictKind.NONFINITE])
def test_state_amid_trouble_pushes_none_out_of_memory(
    kind: VerdictKind, checkpointing: Checkpointing
) -> None:
    assert saves(checkpointing, range(10, 11), kind) == {10: (True, False)}


def test_checkpoint_is_good_after_enough_calm_steps(
    checkpointing: Checkpointing, process: Process
) -> None:
    for step in range(5, 11):
        checkpointing.after_update(report(step, VerdictKind.OK))
    process.save(10, Health.CANDIDATE, to_memory=True)
    for step, expected in [(11, Health.CANDIDATE), (12, Health.CANDIDATE), (13, Health.GOOD)]:
        checkpointing.after_update(report(step, VerdictKind.OK))
        assert health_at(process, 10) is expected, step
        assert process.ring.entries()[0].health is expected, step


def test_step_that_is_not_calm_starts_the_count_again(
    checkpointing: Checkpointing, process: Process
) -> None:
    process.save(10, Health.CANDIDATE)
    kinds = [VerdictKind.OK, VerdictKind.OK, VerdictKind.OUTLIER, VerdictKind.OK, VerdictKind.OK]
    for step, kind in enumerate(kinds, start=11):
        checkpointing.after_update(report(step, kind))
        assert health_at(process, 10) is Health.CANDIDATE, step
    checkpointing.after_update(report(16, VerdictKind.OK))
    assert health_at(process, 10) is Health.GOOD


def test_calm_steps_before_the_save_do_not_count(
    checkpointing: Checkpointing, process: Process
) -> None:
    for step in range(1, 11):
        checkpointing.after_update(report(step, VerdictKind.OK))
    process.save(10, Health.CANDIDATE)
    checkpointing.after_update(report(11, VerdictKind.OK))
    assert health_at(process, 10) is Health.CANDIDATE


def test_quarantined_checkpoint_is_never_promoted(
    checkpointing: Checkpointing, process: Process
) -> None:
    process.store.quarantine(process.save(1, Health.CANDIDATE), "bad")
    for step in range(2, 20):
        checkpointing.after_update(report(step, VerdictKind.OK))
    assert health_at(process, 1) is Health.QUARANTINED


def test_count_of_calm_steps_goes_back_with_the_run(checkpointing: Checkpointing) -> None:
    for step in range(1, 3):
        checkpointing.after_update(report(step, VerdictKind.OK))
    then = checkpointing.state_dict()
    checkpointing.after_update(report(3, VerdictKind.SPIKE))
    assert checkpointing.state_dict() == {"calm_steps": 0}
    checkpointing.load_state_dict(then)
    assert checkpointing.state_dict() == {"calm_steps": 2}


def test_name_of_a_saved_state_is_the_same_in_memory_and_on_disk(process: Process) -> None:
    name = process.save(10, Health.GOOD, to_memory=True)
    assert name == snapshot_name(at(10))
    assert process.store.entries()[0].name == process.ring.entries()[0].name == name
