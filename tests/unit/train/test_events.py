"""Dispatch to callbacks: order, verdicts, failures, gates, state."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest

from train import signals
from train.actions import Action, Note, Rewind, Save, Stop
from train.checkpoint.info import CheckpointInfo, Health
from train.events import Callback, CallbackPhase, Events, RunStart
from train.recovery.detector import Verdict, VerdictKind
from train.recovery.journal import Incident, Phase
from train.recovery.policy import Rung
from train.signals import Gate, StepReport, StepSignals, Update
from train.state import TrainState

STATE = TrainState(step=3, cursor=48, clock=3)
REPORT = StepReport(
    state=STATE,
    signals=StepSignals(loss_nats=2.0, grad_norm=1.0, is_vetoed=False),
    lr=1e-3,
    num_samples=16,
    num_tokens=2048,
    step_seconds=0.1,
    data_seconds=0.0,
    finished_unix_seconds=0.0,
)
START = RunStart(name="r", state=STATE, last_step=10, num_parameters=5, is_resumed=False)
SPIKE = Verdict(kind=VerdictKind.SPIKE, step=3, onset_step=2)
INFO = CheckpointInfo(
    name="step-00000003-clock-00000003",
    path=Path("checkpoints"),
    step=3,
    cursor=48,
    clock=3,
    num_bytes=1,
    digest="",
    world_size=1,
    format="dcp",
    health=Health.CANDIDATE,
)
INCIDENT = Incident(
    incident=1,
    phase=Phase.DONE,
    time="",
    rule="falcon",
    reason="spike",
    verdict="spike",
    onset_step=2,
    detected_step=3,
    clock=3,
    target_checkpoint="step-00000000-clock-00000000",
    target_step=0,
    skip=(0, 48),
    quarantine=(),
)
NOTE = Note(
    rule="observe",
    rung=Rung.SKIP,
    incident=1,
    attempt=1,
    is_observed=True,
    verdict="spike",
    onset_step=2,
    detected_step=3,
    clock=3,
    reason="spike",
)


class Recorder(Callback):
    """Writes down what it is told; answers and fails as it was made to."""

    def __init__(
        self,
        name: str,
        phase: CallbackPhase,
        diary: list[str],
        *,
        answer: Action | Verdict | None = None,
        fails: bool = False,
        limits: Gate | None = None,
        is_main_only: bool = False,
    ) -> None:
        self.phase = phase
        self.is_main_only = is_main_only
        self.seen: list[StepReport] = []
        self.loaded: list[Mapping[str, object]] = []
        self._name, self._diary, self._answer = name, diary, answer
        self._fails, self._limits = fails, limits

    @property
    def name(self) -> str:
        return self._name

    def _note(self, event: str) -> None:
        self._diary.append(f"{self._name} {event}")
        if self._fails:
            raise RuntimeError("broken")

    def on_run_start(self, start: RunStart) -> None:
        self._note("start")

    def gate(self) -> Gate | None:
        return self._limits

    def needs_current(self, step: int) -> bool:
        return self._name == "impatient" and step == 7

    def after_update(self, report: StepReport) -> Action | Verdict | None:
        self.seen.append(report)
        self._note("update")
        return self._answer

    def on_note(self, note: Note, state: TrainState) -> None:
        self._note("noted")

    def on_snapshot_taken(self, state: TrainState, seconds: float) -> None:
        self._note("snapshot")

    def on_ledger_change(self, incident: Incident, state: TrainState) -> None:
        self._note("ledger")

    def on_checkpoint_saved(
        self, info: CheckpointInfo, seconds: float, background_seconds: float
    ) -> None:
        self._note("saved")

    def on_checkpoint_failed(self, step: int, reason: str, seconds: float) -> None:
        self._note("failed")

    def on_rewind(self, incident: Incident, state: TrainState, seconds: float) -> None:
        self._note("rewind")

    def on_run_end(self, summary: Mapping[str, object]) -> None:
        self._note("end")

    def close(self) -> None:
        self._note("close")

    def state_dict(self) -> dict[str, object]:
        return {} if self._name == "stateless" else {"of": self._name}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        self.loaded.append(state)


OBSERVE, DECIDE = CallbackPhase.OBSERVE, CallbackPhase.DECIDE
PERSIST, REPORTING = CallbackPhase.PERSIST, CallbackPhase.REPORT


def four(diary: list[str]) -> list[Callback]:
    return [
        Recorder("a", REPORTING, diary),
        Recorder("z", OBSERVE, diary),
        Recorder("c", PERSIST, diary),
        Recorder("b", OBSERVE, diary),
        Recorder("d", DECIDE, diary),
    ]


ORDER = ["b", "z", "d", "c", "a"]


@pytest.mark.parametrize("shift", range(5))
def test_order_is_by_phase_then_name_however_they_were_listed(shift: int) -> None:
    diary: list[str] = []
    callbacks = four(diary)
    events = Events(callbacks[shift:] + callbacks[:shift], is_main=True)
    events.after_update(REPORT)
    assert diary == [f"{name} update" for name in ORDER]
    assert events.describe() == "observe:b, observe:z, decide:d, persist:c, report:a"


def test_everyone_is_told_in_order_and_ends_run_in_reverse() -> None:
    diary: list[str] = []
    events = Events(four(diary), is_main=True)
    events.run_start(START)
    events.noted(NOTE, STATE)
    events.snapshot_taken(STATE, 0.1)
    events.checkpoint_saved(INFO, 0.1)
    events.checkpoint_failed(3, "full disk", 0.5)
    events.rewound(INCIDENT, STATE, 0.1)
    events.ledger_changed(INCIDENT, STATE)
    told = ("start", "noted", "snapshot", "saved", "failed", "rewind", "ledger")
    assert diary == [f"{name} {event}" for event in told for name in ORDER]
    diary.clear()
    events.run_end({})
    events.close()
    assert diary == [f"{name} {event}" for event in ("end", "close") for name in ORDER[::-1]]


def test_verdict_is_on_the_report_of_every_later_phase() -> None:
    diary: list[str] = []
    judge = Recorder("judge", OBSERVE, diary, answer=SPIKE)
    later = [Recorder(phase.name, phase, diary) for phase in (DECIDE, PERSIST, REPORTING)]
    Events([*later, judge], is_main=True).after_update(REPORT)
    assert judge.seen[0].verdict is None
    assert [callback.seen[0].verdict for callback in later] == [SPIKE] * 3
    assert REPORT.verdict is None


def test_everything_that_is_asked_for_is_returned_in_order() -> None:
    stop, save = Stop(reason="enough", needs_save=False), Save(reason="due")
    events = Events(
        [
            Recorder("b", PERSIST, [], answer=save),
            Recorder("c", PERSIST, [], answer=stop),
            Recorder("judge", OBSERVE, [], answer=SPIKE),
            Recorder("silent", DECIDE, []),
            Recorder("a", DECIDE, [], answer=NOTE),
        ],
        is_main=True,
    )
    assert events.after_update(REPORT) == [NOTE, save, stop]


def test_no_callback_asks_for_nothing() -> None:
    assert Events([], is_main=True).after_update(REPORT) == []


def test_failure_of_reporting_is_logged_and_training_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    diary: list[str] = []
    broken = Recorder("a", REPORTING, diary, fails=True)
    events = Events([broken, Recorder("b", REPORTING, diary)], is_main=True)
    events.run_start(START)
    assert events.after_update(REPORT) == []
    events.rewound(INCIDENT, STATE, 0.1)
    events.noted(NOTE, STATE)
    events.ledger_changed(INCIDENT, STATE)
    events.snapshot_taken(STATE, 0.1)
    events.run_end({})
    assert diary[-2:] == ["b end", "a end"]
    assert "a failed; training goes on" in caplog.text


@pytest.mark.parametrize("phase", [OBSERVE, DECIDE, PERSIST])
def test_failure_of_any_other_phase_stops_the_run(phase: CallbackPhase) -> None:
    events = Events([Recorder("a", phase, [], fails=True)], is_main=True)
    with pytest.raises(RuntimeError, match="broken"):
        events.after_update(REPORT)
    with pytest.raises(RuntimeError, match="broken"):
        events.run_start(START)


def test_one_that_cannot_close_does_not_keep_the_others_open(
    caplog: pytest.LogCaptureFixture,
) -> None:
    diary: list[str] = []
    callbacks = [Recorder(name, OBSERVE, diary, fails=name == "b") for name in "abc"]
    Events(callbacks, is_main=True).close()
    assert diary == ["c close", "b close", "a close"]
    assert "b could not be closed" in caplog.text


def test_main_only_callback_runs_on_rank_0_alone() -> None:
    diary: list[str] = []
    callbacks = [Recorder("a", OBSERVE, diary), Recorder("b", REPORTING, diary, is_main_only=True)]
    Events(callbacks, is_main=False).after_update(REPORT)
    assert diary == ["a update"]
    Events(callbacks, is_main=True).after_update(REPORT)
    assert diary == ["a update", "a update", "b update"]


def test_tightest_gate_holds() -> None:
    limits = [None, Gate(max_loss_nats=3.0), Gate(max_loss_nats=9.0, max_grad_norm=2.0)]
    callbacks = [Recorder(str(i), OBSERVE, [], limits=gate) for i, gate in enumerate(limits)]
    assert Events(callbacks, is_main=True).gate() == Gate(max_loss_nats=3.0, max_grad_norm=2.0)
    assert Events([], is_main=True).gate() == Gate()


def test_report_is_needed_now_if_anyone_needs_it() -> None:
    events = Events([Recorder("impatient", PERSIST, []), *four([])], is_main=True)
    assert events.needs_current(7)
    assert not events.needs_current(8)


def test_state_is_that_of_all_ranks_and_of_those_that_have_some() -> None:
    callbacks = [
        Recorder("a", OBSERVE, []),
        Recorder("stateless", DECIDE, []),
        Recorder("main", REPORTING, [], is_main_only=True),
    ]
    for is_main in (True, False):
        assert Events(callbacks, is_main=is_main).state_dict() == {"a": {"of": "a"}}


def test_state_goes_back_to_the_callback_it_came_from() -> None:
    first, second = Recorder("a", OBSERVE, []), Recorder("new", OBSERVE, [])
    Events([first, second], is_main=True).load_state_dict({"a": {"x": 1}, "gone": {"y": 2}})
    assert first.loaded == [{"x": 1}]
    assert second.loaded == []


def test_base_callback_does_nothing_and_keeps_nothing() -> None:
    events = Events([Callback()], is_main=True)
    events.run_start(START)
    assert events.gate() == Gate()
    assert not events.needs_current(1)
    assert events.after_update(REPORT) == []
    events.checkpoint_saved(INFO, 0.0)
    events.checkpoint_failed(1, "", 0.0)
    events.rewound(INCIDENT, STATE, 0.0)
    events.noted(NOTE, STATE)
    events.ledger_changed(INCIDENT, STATE)
    events.snapshot_taken(STATE, 0.0)
    events.run_end({})
    events.close()
    assert json.dumps(events.state_dict()) == "{}"


# What callbacks see.


def vector(*group_norms: float, **slots: float) -> list[float]:
    values = [2.5, 0.5, 0.1, 0.0, 0.0, 0.0, 0.0, 0.0, *group_norms]
    for name, value in slots.items():
        values[getattr(signals, name)] = value
    return values


def test_signals_are_read_off_the_vector_of_the_device() -> None:
    assert StepSignals.from_vector(vector(0.3, 0.4, IS_VETOED=1.0)) == StepSignals(
        loss_nats=2.5,
        grad_norm=0.5,
        is_vetoed=True,
        update_norm=0.1,
        nonfinite_share=0.0,
        group_norms=(0.3, 0.4),
    )
    assert len(vector()) == signals.NUM_FIXED_SIGNALS


def test_slot_that_an_engine_cannot_fill_is_not_known() -> None:
    found = StepSignals.from_vector(vector(UPDATE_NORM=math.nan, NONFINITE_SHARE=math.nan))
    assert found.update_norm is None
    assert found.nonfinite_share is None
    assert found.is_finite


@pytest.mark.parametrize(
    ("num_bad", "sum_of_ranks", "bad_rank"), [(0, 0, None), (1, 0, 0), (1, 5, 5), (2, 5, None)]
)
def test_bad_rank_is_named_if_it_was_alone(
    num_bad: int, sum_of_ranks: int, bad_rank: int | None
) -> None:
    found = StepSignals.from_vector(vector(NUM_BAD_RANKS=num_bad, BAD_RANK_SUM=sum_of_ranks))
    assert (found.num_bad_ranks, found.bad_rank) == (num_bad, bad_rank)


@pytest.mark.parametrize(("summed", "is_flagged"), [(0.0, False), (1.0, True), (3.0, True)])
def test_flag_of_any_rank_is_a_flag(summed: float, is_flagged: bool) -> None:
    assert StepSignals.from_vector(vector(IS_FLAGGED=summed)).is_flagged is is_flagged


@pytest.mark.parametrize(
    ("loss", "norm", "is_finite"),
    [(1.0, 1.0, True), (math.nan, 1.0, False), (1.0, math.inf, False)],
)
def test_signals_are_finite_if_both_are(loss: float, norm: float, is_finite: bool) -> None:
    found = StepSignals(loss_nats=loss, grad_norm=norm, is_vetoed=False)
    assert found.is_finite is is_finite


def test_report_tells_what_became_of_the_update() -> None:
    assert REPORT.update is Update.APPLIED


def test_facts_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        REPORT.lr = 1.0  # type: ignore[misc]
    rewind = Rewind(
        target="t",
        target_step=0,
        skip_from=0,
        skip_amount=1,
        rule="falcon",
        verdict="spike",
        onset_step=1,
        detected_step=2,
        reason="",
        incident=1,
    )
    with pytest.raises(AttributeError):
        rewind.target = "other"  # type: ignore[misc]
