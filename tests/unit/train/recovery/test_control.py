"""What operators ask of a run: taken, refused, carried out once, answered."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import BATCH_SAMPLES, SEQUENCE_LENGTH, Killed, Process, at, rewind_to

from train.actions import Action, Rewind, Skip, Unskip
from train.checkpoint.info import Health
from train.checkpoint.snapshots import snapshot_name
from train.events import Callback
from train.loop import train
from train.recovery import control
from train.recovery.journal import Phase
from train.recovery.policy import Rung
from train.signals import StepReport
from train.state import BatchRange, TrainState

pytestmark = pytest.mark.usefixtures("fast_disk")

DEADLINE_SECONDS = 20


@pytest.fixture
def process(tmp_path: Path) -> Process:
    """A run at step 61: good states of 0, 20 and 40 on disk, of 50 in memory."""
    made = Process(tmp_path)
    made.save(0, Health.GOOD)
    made.save(20, Health.GOOD)
    made.save(40, Health.GOOD)
    made.save(50, Health.GOOD, to_disk=False, to_memory=True)
    made.save(60, Health.CANDIDATE)
    return made


def asked(process: Process, state: TrainState | None = None) -> Action | None:
    """Return the first action that is asked for and can be done."""
    request = process.inbox.next_request(state or at(61))
    return None if request is None else request.action


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def waits_for(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.002)
    return condition()


# Requests that are taken.


def test_no_request_is_no_action(process: Process) -> None:
    assert asked(process) is None
    process.ask("a", kind="skip", amount="1 steps").unlink()
    assert asked(process) is None


def test_rewind_goes_to_the_youngest_good_state_at_or_before_its_step(process: Process) -> None:
    process.ask("a", kind="rewind", to_step=45, amount=None, operator="ada@host")
    action = asked(process)
    assert isinstance(action, Rewind)
    assert (action.target, action.target_step) == (snapshot_name(at(40)), 40)
    assert (action.skip_from, action.skip_amount) == (640, 0)
    assert (action.rule, action.rung, action.request) == ("operator", Rung.REWIND, "a")
    assert (action.onset_step, action.detected_step, action.incident) == (61, 61, 1)
    assert action.reason == (
        "rewind to step 45 asked for by ada@host, the last good state before it is of step 40"
    )


@pytest.mark.parametrize(
    ("to_step", "step"), [(0, 0), (19, 0), (20, 20), (49, 40), (50, 50), (61, 50)]
)
def test_states_in_memory_can_be_asked_for_too(to_step: int, step: int, process: Process) -> None:
    process.ask("a", kind="rewind", to_step=to_step)
    action = asked(process)
    assert isinstance(action, Rewind)
    assert action.target_step == step


def test_incident_of_a_person_has_the_next_number(process: Process) -> None:
    process.rewinder.rewind(rewind_to(40, incident=6), at(61))
    process.ask("a", kind="rewind", to_step=20)
    action = asked(process, at(45, clock=66))
    assert isinstance(action, Rewind)
    assert action.incident == 7


AMOUNTS = pytest.mark.parametrize(
    ("amount", "samples"),
    [
        (f"{5 * SEQUENCE_LENGTH} tokens", 5),
        (f"{5 * SEQUENCE_LENGTH + 1} tokens", 6),
        ("3 batches", 3 * BATCH_SAMPLES),
        ("4 steps", 4 * BATCH_SAMPLES),
        ("0 tokens", 0),
        ("1B tokens", 10**9 // SEQUENCE_LENGTH),
    ],
)


@AMOUNTS
def test_rewind_skips_exactly_its_amount(amount: str, samples: int, process: Process) -> None:
    process.ask("a", kind="rewind", to_step=40, amount=amount)
    action = asked(process)
    assert isinstance(action, Rewind)
    assert action.skip_range(present_cursor=976) == BatchRange(start=640, stop=640 + samples)


@AMOUNTS
def test_skip_has_its_amount_in_samples(amount: str, samples: int, process: Process) -> None:
    process.ask("a", kind="skip", amount=amount)
    action = asked(process)
    if samples == 0:
        assert action is None, "nothing is asked for"
        return
    assert isinstance(action, Skip)
    assert (action.amount, action.request) == (samples, "a")


def test_seen_is_everything_from_the_target_to_here(process: Process) -> None:
    process.ask("a", kind="rewind", to_step=40, amount="seen")
    action = asked(process)
    assert isinstance(action, Rewind)
    assert action.skip_range(present_cursor=976) == BatchRange(start=640, stop=976)


def test_seen_is_nothing_where_nothing_was_seen(process: Process) -> None:
    state = at(40)
    process.ask("a", kind="rewind", to_step=40, amount="seen")
    action = asked(process, state)
    assert isinstance(action, Rewind)
    _, incident = process.rewinder.rewind(action, state)
    assert len(incident.skip_range) == 0


def test_unskip_names_what_an_incident_skipped(process: Process) -> None:
    process.rewinder.rewind(rewind_to(40, amount=100), at(61))
    process.ask("a", kind="unskip", incident=1, operator="ada@host")
    action = asked(process, at(40))
    assert isinstance(action, Unskip)
    assert (action.skipped, action.request) == ((BatchRange(start=640, stop=976),), "a")
    assert action.reason == "incident 1: unskip asked for by ada@host"


def test_unskip_covers_all_attempts_at_an_incident(process: Process) -> None:
    process.rewinder.rewind(rewind_to(40, amount=0, rung=Rung.REPLAY), at(61))
    process.rewinder.rewind(rewind_to(40, amount=100, attempt=2), at(61, clock=82))
    process.rewinder.rewind(rewind_to(20, amount=2000, attempt=3), at(62, clock=104))
    process.ask("a", kind="unskip", incident=1)
    action = asked(process, at(20))
    assert isinstance(action, Unskip)
    assert action.skipped == (BatchRange(start=320, stop=2656),)


def test_unskip_leaves_out_what_is_back_already(process: Process) -> None:
    state, _ = process.rewinder.rewind(rewind_to(40, amount=100), at(61))
    part = Unskip(skipped=(BatchRange(start=700, stop=800),), reason="", request="u")
    process.rewinder.unskip(part, state, end_cursor=5000)
    process.ask("a", kind="unskip", incident=1)
    action = asked(process, state)
    assert isinstance(action, Unskip)
    left = (BatchRange(start=640, stop=700), BatchRange(start=800, stop=976))
    assert action.skipped == left


def test_unskip_cut_short_puts_back_the_rest_after_a_restart(
    process: Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, _ = process.rewinder.rewind(rewind_to(40, amount=100), at(61))
    part = Unskip(skipped=(BatchRange(start=700, stop=800),), reason="", request="u")
    process.rewinder.unskip(part, state, end_cursor=5000)
    process.ask("a", kind="unskip", incident=1)
    append = process.journal.append

    def append_then_kill(incident: Any) -> None:
        append(incident)
        raise Killed

    monkeypatch.setattr(process.journal, "append", append_then_kill)
    with pytest.raises(Killed):
        train(process.run(last_step=40), state)
    restarted = Process(tmp_path)
    resumed = restarted.rewinder.resume()
    assert resumed is not None
    train(restarted.run(last_step=40), resumed.state)
    assert restarted.answer("a")["is_accepted"] is True
    back = sorted((start, stop) for _, start, stop in restarted.returns.entries())
    assert back == [(640, 700), (700, 800), (800, 976)]


@pytest.mark.parametrize(
    ("returns", "left"),
    [
        ([], [(10, 50)]),
        ([(900, 10, 50)], []),
        ([(900, 0, 100)], []),
        ([(900, 0, 10), (950, 50, 60)], [(10, 50)]),
        ([(900, 0, 20)], [(20, 50)]),
        ([(900, 40, 60)], [(10, 40)]),
        ([(900, 20, 30)], [(10, 20), (30, 50)]),
        ([(900, 20, 30), (950, 10, 15)], [(15, 20), (30, 50)]),
    ],
)
def test_what_is_left_of_a_range_is_what_was_not_put_back(
    returns: list[tuple[int, int, int]], left: list[tuple[int, int]]
) -> None:
    pieces = control.without(BatchRange(start=10, stop=50), returns)
    assert [(piece.start, piece.stop) for piece in pieces] == left


@pytest.mark.parametrize(
    ("pieces", "union"),
    [
        ([], []),
        ([(1, 3)], [(1, 3)]),
        ([(1, 3), (3, 5)], [(1, 5)]),
        ([(1, 9), (2, 4), (8, 10)], [(1, 10)]),
        ([(1, 3), (4, 5)], [(1, 3), (4, 5)]),
    ],
)
def test_ranges_that_touch_become_one(
    pieces: list[tuple[int, int]], union: list[tuple[int, int]]
) -> None:
    found = control.merged(BatchRange(start=start, stop=stop) for start, stop in pieces)
    assert [(piece.start, piece.stop) for piece in found] == union


def test_requests_are_met_in_the_order_of_their_names(process: Process) -> None:
    for name in ("c", "a", "b"):
        process.ask(name, kind="skip", amount="1 steps")
    train(process.run(last_step=61), at(61))
    assert [record.request for record in process.history.done] == ["a", "b", "c"]


def test_other_files_are_left_alone(process: Process) -> None:
    folder = process.ask("a", kind="skip", amount="1 steps").parent
    (folder / ".b.json.17.tmp").write_text("{")
    (folder / "notes.txt").write_text("mine")
    assert isinstance(asked(process), Skip)
    assert names(folder) == [".b.json.17.tmp", "a.json", "notes.txt"]


# Requests that are refused.


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "unknown request None; use rewind, skip or unskip"),
        ({"kind": "stop"}, "unknown request 'stop'; use rewind, skip or unskip"),
        ({"kind": ["rewind"]}, r"unknown request \['rewind'\]"),
        ({"kind": "rewind"}, "to_step=None is not a step"),
        ({"kind": "rewind", "to_step": "40"}, "to_step='40' is not a step"),
        ({"kind": "rewind", "to_step": 40.5}, "to_step=40.5 is not a step"),
        ({"kind": "rewind", "to_step": 62}, "step 62 lies ahead: the run is at step 61"),
        (
            {"kind": "rewind", "to_step": -1},
            "no good checkpoint at or before step -1; good ones are of steps 0, 20, 40, 50",
        ),
        (
            {"kind": "rewind", "to_step": 40, "amount": "lots"},
            "amount 'lots': expected an amount such as",
        ),
        ({"kind": "skip"}, "amount None: expected an amount such as"),
        ({"kind": "skip", "amount": "seen"}, "amount 'seen': expected an amount such as"),
        ({"kind": "skip", "amount": 5}, "amount 5: expected an amount such as"),
        ({"kind": "skip", "amount": "9999T tokens"}, "expected at most 1,000,000,000,000,000"),
        ({"kind": "unskip"}, "incident None is not the number of an incident"),
        ({"kind": "unskip", "incident": 3}, "incident 3 skipped nothing"),
        ({"kind": "unskip", "incident": "1"}, "incident '1' is not the number of an incident"),
    ],
)
def test_request_that_makes_no_sense_is_refused_with_its_reason(
    fields: dict[str, object], message: str, process: Process, caplog: pytest.LogCaptureFixture
) -> None:
    path = process.ask("a", **fields)
    assert asked(process) is None
    assert process.answer("a")["is_accepted"] is False
    assert re.search(message, process.answer("a")["message"])
    assert not path.exists()
    assert "request a refused" in caplog.text


@pytest.mark.parametrize("content", [b"", b'{"kind": "skip", "amou', b"[1]", b"5", b"\xff\xfe"])
def test_torn_request_is_refused_and_taken_off_the_list(content: bytes, process: Process) -> None:
    path = process.ask("a")
    path.write_bytes(content)
    assert asked(process) is None
    assert "cannot be read; give it again" in process.answer("a")["message"]
    assert not path.exists()


def test_run_without_a_good_state_says_so(tmp_path: Path) -> None:
    process = Process(tmp_path)
    process.save(0, Health.CANDIDATE)
    process.ask("a", kind="rewind", to_step=5)
    assert asked(process, at(10)) is None
    assert process.answer("a")["message"].endswith("good ones are of steps none")


def test_unskip_names_the_incidents_that_skipped(process: Process) -> None:
    process.rewinder.rewind(rewind_to(40, amount=100, incident=2), at(61))
    process.rewinder.rewind(rewind_to(40, amount=0, incident=3), at(61, clock=82))
    process.ask("a", kind="unskip", incident=3)
    assert asked(process, at(40)) is None
    assert process.answer("a")["message"] == "incident 3 skipped nothing; incidents that did: [2]"


def test_what_is_back_already_is_not_put_back_again(process: Process) -> None:
    process.rewinder.rewind(rewind_to(40, amount=100), at(61))
    for name, expected in (("a", True), ("b", False)):
        process.ask(name, kind="unskip", incident=1)
        state = train(process.run(last_step=40), at(40, clock=61)).state
        assert state.step == 40
        assert process.answer(name)["is_accepted"] is expected
    assert "is put back already" in process.answer("b")["message"]
    assert len(process.returns.entries()) == 1


def test_one_bad_request_does_not_keep_the_others_out(process: Process) -> None:
    process.ask("a", kind="nonsense")
    process.ask("b", kind="skip", amount="1 steps")
    process.ask("c").write_text("{")
    train(process.run(last_step=61), at(61))
    assert [process.answer(name)["is_accepted"] for name in "abc"] == [False, True, False]


# Once.


def test_request_that_was_done_before_a_restart_is_not_done_again(
    process: Process, tmp_path: Path
) -> None:
    process.ask("a", kind="skip", amount="3 batches")
    action = asked(process)
    assert isinstance(action, Skip)
    process.rewinder.skip(action, at(61))
    # Killed here: the journal has it, the answer is missing, the request still waits.
    restarted = Process(tmp_path)
    resumed = restarted.rewinder.resume()
    assert resumed is not None
    assert restarted.inbox.next_request(resumed.state) is None
    assert restarted.answer("a")["is_accepted"] is True
    assert "before a restart" in restarted.answer("a")["message"]
    assert restarted.ledger.num_samples() == 3 * BATCH_SAMPLES
    assert names(restarted.control / "requests") == []


def test_rewind_cut_short_is_finished_and_its_request_not_done_again(
    process: Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*args: object) -> None:
        raise Killed

    process.ask("a", kind="rewind", to_step=40, amount="3 batches")
    monkeypatch.setattr(process.engine, "load", die)
    with pytest.raises(Killed):
        train(process.run(last_step=70), at(61))
    assert [record.phase for record in process.journal.read()] == [Phase.INTENT]
    restarted = Process(tmp_path)
    resumed = restarted.rewinder.resume()
    assert resumed is not None
    assert train(restarted.run(last_step=50), resumed.state).state.step == 50
    assert restarted.answer("a")["is_accepted"] is True
    assert restarted.history.num_rewinds == 1
    assert restarted.ledger.ranges() == [(640, 640 + 3 * BATCH_SAMPLES)]


def test_request_whose_file_cannot_be_removed_is_answered_once(
    process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kept(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied")

    process.ask("a", kind="skip", amount="2 batches")
    unlink = Path.unlink
    monkeypatch.setattr(
        Path, "unlink", lambda path, **kw: (kept if path.name == "a.json" else unlink)(path, **kw)
    )
    train(process.run(last_step=61), at(61))
    assert process.inbox.next_request(at(61)) is None
    assert len(process.history.done) == 1
    assert "the run goes on" in process.answer("a")["message"]


def test_answer_that_cannot_be_written_does_not_end_the_run(
    process: Process, caplog: pytest.LogCaptureFixture
) -> None:
    process.control.mkdir()
    (process.control / "answers").write_text("a file in its place")
    process.ask("a", kind="nonsense")
    assert asked(process) is None
    assert "the answer to request a could not be written" in caplog.text


# In the loop.


def test_waiting_requests_are_met_when_the_run_starts(process: Process) -> None:
    process.ask("a", kind="rewind", to_step=40, amount="2 batches")
    process.ask("b", kind="skip", amount="1 batches")
    ending = train(process.run(last_step=45), at(44))
    assert process.source.taken == list(range(640 + 48, 640 + 48 + 5 * BATCH_SAMPLES))
    assert (ending.state.step, ending.state.clock, ending.state.rewinds) == (45, 49, 1)
    assert process.engine.number == 45
    for name in ("a", "b"):
        assert process.answer(name)["is_accepted"] is True
    assert "the run goes on at step 40, sample 640" in process.answer("a")["message"]
    assert names(process.control / "requests") == []


def test_second_rewind_is_judged_by_where_the_first_has_led(process: Process) -> None:
    """Once the run is back at step 20, step 40 lies ahead, on what was rewound."""
    process.ask("a", kind="rewind", to_step=20)
    process.ask("b", kind="rewind", to_step=40)
    ending = train(process.run(last_step=22), at(61))
    assert process.answer("a")["is_accepted"] is True
    assert process.answer("b")["is_accepted"] is False
    assert ending.state.step == 22
    assert process.history.num_rewinds == 1


def test_second_rewind_to_what_was_in_memory_alone_is_refused(process: Process) -> None:
    process.ask("a", kind="rewind", to_step=20)
    process.ask("b", kind="rewind", to_step=50)
    assert train(process.run(last_step=21), at(61)).state.step == 21
    assert process.answer("b")["is_accepted"] is False


def test_same_unskip_twice_at_once_is_done_once(process: Process, tmp_path: Path) -> None:
    state, _ = process.rewinder.rewind(rewind_to(40, amount=100), at(61))
    process.ask("a", kind="unskip", incident=1)
    process.ask("b", kind="unskip", incident=1)
    train(process.run(last_step=40), state)
    assert [process.answer(name)["is_accepted"] for name in "ab"] == [True, False]
    assert Process(tmp_path).rewinder.resume() is not None


def test_acts_at_once_have_numbers_of_their_own(process: Process) -> None:
    process.ask("a", kind="skip", amount="1 batches")
    process.ask("b", kind="rewind", to_step=40)
    process.ask("c", kind="skip", amount="1 batches")
    train(process.run(last_step=40), at(61))
    done = process.history.done
    assert [(record.incident, record.request) for record in done] == [(1, "a"), (2, "b"), (3, "c")]


class AsksAt(Callback):
    """Leaves a request once, and waits until the inbox has seen it."""

    def __init__(self) -> None:
        self.process: Process | None = None

    def after_update(self, report: StepReport) -> None:
        process = self.process
        if process is not None and report.state.step == 62 and not process.history.records:
            process.ask("live", kind="rewind", to_step=40)
            assert waits_for(process.inbox.is_waiting)


def test_live_run_meets_a_request_within_two_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "POLL_SECONDS", 0.005)
    asks = AsksAt()
    process = Process(tmp_path, callbacks=[asks])
    asks.process = process
    process.save(40, Health.GOOD)
    process.inbox.start()
    try:
        ending = train(process.run(last_step=66), at(61))
    finally:
        process.inbox.close()
    assert process.answer("live")["is_accepted"] is True
    (done,) = process.history.done
    assert 63 <= done.detected_step <= 65
    assert ending.state.step == 66
    assert ending.state.clock == done.clock + 26


# Looking for requests.


def test_waiting_costs_no_look_at_the_disk(
    process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    def touched(*args: object, **kwargs: object) -> None:
        raise AssertionError("the disk was touched")

    process.ask("a", kind="skip", amount="1 steps")
    for method in ("iterdir", "exists", "stat", "open", "read_text", "glob"):
        monkeypatch.setattr(Path, method, touched)
    assert not process.inbox.is_waiting()
    process.inbox._has_request.set()
    assert process.inbox.is_waiting()


def test_request_is_seen_and_no_longer_waits_once_it_is_read(
    process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "POLL_SECONDS", 0.005)
    process.inbox.start()
    assert not process.inbox.is_waiting()
    process.ask("a", kind="nonsense")
    assert waits_for(process.inbox.is_waiting)
    process.inbox.close()
    assert process.inbox.next_request(at(61)) is None
    assert not process.inbox.is_waiting()


def test_closing_ends_the_look_and_can_be_done_without_a_start(process: Process) -> None:
    process.inbox.close()
    other = Process(process.control.parent)
    other.inbox.start()
    other.inbox.close()
    assert other.inbox._thread is not None
    assert not other.inbox._thread.is_alive()


def test_rewind_that_would_go_far_back_is_refused_unless_it_may(process: Process) -> None:
    process.inbox._near_steps = 8
    process.ask("a", kind="rewind", to_step=59)
    assert asked(process) is None
    message = process.answer("a")["message"]
    assert "the last good state up to step 59 is of step 50, 9 steps before it" in message
    assert "add --far" in message
    process.ask("b", kind="rewind", to_step=59, is_far=True)
    action = asked(process)
    assert isinstance(action, Rewind) and action.target_step == 50


def test_skip_ahead_counts_fresh_samples_alone(process: Process) -> None:
    process.ledger.add(BatchRange(start=650, stop=700))
    process.ask("a", kind="skip", amount="2 batches")
    action = asked(process)
    assert isinstance(action, Skip)
    record = process.rewinder.skip(action, at(40))
    assert record.skip == (640, 640 + action.amount + 50)
