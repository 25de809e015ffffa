"""Saves beside training: what they hold, what they wait for, and what becomes of those that fail.

A `Held` engine's writes wait until they are let go, so nothing here depends on how fast a disk is.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import NumberEngine, NumberWrite, Process, at, rewind_to

import train.checkpoint.writing as writing
from train.actions import Save
from train.checkpoint.info import CheckpointInfo, Health
from train.checkpoint.saver import SAVES_FAILED
from train.checkpoint.snapshots import snapshot_name
from train.checkpoint.store import CheckpointStore
from train.distributed import World
from train.engines.snapshot import HostSnapshot
from train.events import Callback
from train.loop import train
from train.signals import StepReport
from train.state import TrainState

pytestmark = pytest.mark.usefixtures("fast_disk")

GOOD, CANDIDATE, QUARANTINED = Health.GOOD, Health.CANDIDATE, Health.QUARANTINED
DEADLINE_SECONDS = 10.0


class HeldWrite(NumberWrite):
    """Waits until `engine.may_write`; fails as often as `engine.num_failures` says."""

    def __init__(self, tensor: torch.Tensor, engine: Held) -> None:
        super().__init__(tensor)
        self._engine = engine

    def write(self, folder: Path, world: World) -> None:
        engine = self._engine
        with engine.lock:
            engine.num_writing += 1
            engine.most_writing = max(engine.most_writing, engine.num_writing)
            engine.threads.append(threading.current_thread().name)
        try:
            assert engine.may_write.wait(DEADLINE_SECONDS), "nobody let it go"
            if engine.num_failures:
                engine.num_failures -= 1
                raise OSError(28, "No space left on device")
            super().write(folder, world)
        finally:
            with engine.lock:
                engine.num_writing -= 1

    def is_finite(self) -> bool:
        return self._engine.is_finite


class Held(NumberEngine):
    """An engine whose writes can be held up, fail, and find numbers that are not finite."""

    def __init__(self) -> None:
        super().__init__()
        self.may_write = threading.Event()
        self.is_finite = True
        self.num_failures = 0
        self.num_writing = self.most_writing = 0
        self.num_copies = 0
        self.threads: list[str] = []
        self.lock = threading.Lock()

    def begin_save(self, staged: HostSnapshot | None = None) -> HeldWrite:
        return HeldWrite(self._tensor if staged is None else staged.tensor(staged.slots[0]), self)

    def snapshot(self, reuse: HostSnapshot | None = None) -> HostSnapshot:
        self.num_copies += 1
        return super().snapshot(reuse)


class Log(Callback):
    """Keeps what it is told of saves."""

    def __init__(self) -> None:
        self.saved: list[CheckpointInfo] = []
        self.seconds: list[tuple[float, float]] = []
        self.failed: list[tuple[int, str]] = []

    def on_checkpoint_saved(
        self, info: CheckpointInfo, seconds: float, background_seconds: float
    ) -> None:
        self.saved.append(info)
        self.seconds.append((seconds, background_seconds))

    def on_checkpoint_failed(self, step: int, reason: str, seconds: float) -> None:
        self.failed.append((step, reason))


class Beside:
    """A process that saves beside training, and a short way to ask it to."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.engine, self.log = Held(), Log()
        self.folder = folder
        settings = {"engine": self.engine, "callbacks": [self.log], "is_async": True, **settings}
        self.process = Process(folder, **settings)
        self.store, self.ring = self.process.store, self.process.ring
        self.saver = self.process.saver

    def save(self, step: int, *, to_memory: bool = False, waits: bool = False) -> str:
        self.engine.number = step
        action = Save(reason="", to_memory=to_memory)
        extra = {"ledger": [], "callbacks": self.process.events.state_dict()}
        self.saver.save(at(step), extra, action, CANDIDATE, waits=waits)
        return snapshot_name(at(step))

    def land(self) -> None:
        self.engine.may_write.set()
        self.saver.settle(waits=True)
        self.engine.may_write.clear()

    def on_disk(self) -> dict[str, str]:
        """Return the health of each checkpoint, as a restart reads it."""
        again = CheckpointStore(self.store.folder, self.process.world, keep_good=2)
        again.open()
        return {info.name: str(info.health) for info in again.entries()}


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Beside]]:
    made: list[Beside] = []

    def make_it(**settings: Any) -> Beside:
        made.append(Beside(tmp_path, **settings))
        return made[-1]

    yield make_it
    for beside in made:
        beside.engine.may_write.set()
        beside.saver.close()


@pytest.fixture
def beside(make: Callable[..., Beside]) -> Beside:
    return make()


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.001)


# What is written.


def test_steps_taken_while_the_write_is_held_up_do_not_change_it(beside: Beside) -> None:
    name = beside.save(3)
    beside.engine.step(None)
    beside.engine.number = 77
    beside.land()
    assert (beside.store.folder / name / "number.bin").read_text() == "3"
    beside.store.load(beside.engine, beside.process.entry(3))
    assert beside.engine.number == 3


def test_save_beside_training_writes_what_a_save_at_once_writes(
    beside: Beside, tmp_path: Path
) -> None:
    at_once = Beside(tmp_path / "other", is_async=False)
    at_once.engine.may_write.set()
    at_once.save(3)
    name = beside.save(3)
    beside.land()
    ours, theirs = beside.store.folder / name, at_once.store.folder / name
    names = sorted(path.name for path in ours.iterdir())
    assert names == sorted(path.name for path in theirs.iterdir())
    for file in set(names) - {"manifest.json"}:
        assert (ours / file).read_bytes() == (theirs / file).read_bytes()
    manifests = [json.loads((path / "manifest.json").read_text()) for path in (ours, theirs)]
    for manifest in manifests:
        del manifest["saved_unix_seconds"], manifest["digest"]
    assert manifests[0] == manifests[1]
    assert set(beside.engine.threads) == {"checkpoint"}
    assert "checkpoint" not in at_once.engine.threads


def test_folder_gets_its_name_when_it_is_whole(beside: Beside) -> None:
    beside.save(3)
    until(lambda: beside.engine.num_writing == 1)
    assert [path.name for path in beside.store.folder.iterdir()] == [f".saving-{name_of(3)}"]
    assert beside.on_disk() == {}
    assert not list(beside.store.folder.iterdir()), "and a restart clears it away"


def name_of(step: int) -> str:
    return snapshot_name(at(step))


def test_one_copy_serves_memory_and_disk(beside: Beside) -> None:
    name = beside.save(3, to_memory=True)
    assert beside.engine.num_copies == 1
    assert beside.ring.holds(name)
    beside.land()
    beside.engine.number = 9
    beside.ring.restore(name)
    assert beside.engine.number == 3


def test_copy_that_is_written_stays_when_the_ring_gives_it_up(make: Callable[..., Beside]) -> None:
    beside = make(keep_snapshots=2)
    name = beside.save(3, to_memory=True)
    beside.ring.forget(name)
    for step in (4, 5, 6):
        beside.engine.number = step
        beside.ring.take(at(step), {}, health=GOOD)
    beside.land()
    assert (beside.store.folder / name / "number.bin").read_text() == "3"


@pytest.mark.parametrize("keep_snapshots", [0, 2])
def test_buffers_are_used_again(make: Callable[..., Beside], keep_snapshots: int) -> None:
    beside = make(keep_snapshots=keep_snapshots)
    pointers = set()
    for step in range(1, 8):
        beside.engine.number = step
        beside.save(step)
        lent = beside.ring._lent
        assert lent is not None
        pointers.add(lent.slabs[0].data_ptr())
        beside.land()
    assert len(pointers) == 1


# What waits.


def test_never_two_in_flight(beside: Beside) -> None:
    beside.save(3)
    letting_go = threading.Timer(0.05, beside.engine.may_write.set)
    letting_go.start()
    beside.save(4)
    assert beside.log.saved[0].step == 3, "the second began when the first had landed"
    beside.land()
    assert [info.step for info in beside.log.saved] == [3, 4]
    assert beside.engine.most_writing == 1


def test_save_returns_while_it_is_written_and_settles_without_waiting(beside: Beside) -> None:
    beside.save(3)
    assert not beside.saver.has_news()
    beside.saver.settle(waits=False)
    assert beside.log.saved == []
    beside.engine.may_write.set()
    until(beside.saver.has_news)
    beside.saver.settle(waits=False)
    assert [info.step for info in beside.log.saved] == [3]
    assert not beside.saver.has_news()
    ((stall, background),) = beside.log.seconds
    assert 0 <= stall < DEADLINE_SECONDS
    assert background > 0


def test_save_that_waits_is_durable_when_it_returns(beside: Beside) -> None:
    beside.engine.may_write.set()
    name = beside.save(3, waits=True)
    assert beside.on_disk() == {name: "candidate"}
    assert beside.engine.num_copies == 0, "straight from the engine"


def test_process_that_ends_does_not_wait_for_a_disk_for_ever(
    beside: Beside, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "_CLOSE_SECONDS", 0.05)
    beside.save(3)
    beside.saver.close()
    (thread,) = (t for t in threading.enumerate() if t.name == "checkpoint")
    assert thread.daemon


# Its health, and what is decided meanwhile.


def test_promotion_before_it_has_landed_holds_on_disk_too(beside: Beside) -> None:
    name = beside.save(3)
    beside.process.tiers.promote_before(3)
    assert [info.name for info in beside.process.tiers.good()] == [name]
    beside.land()
    assert beside.on_disk() == {name: "good"}
    assert beside.process.entry(3).health is GOOD


def test_quarantine_before_it_has_landed_holds_on_disk_too(beside: Beside) -> None:
    name = beside.save(3)
    beside.store.quarantine(name, "made after the target of incident 1")
    beside.process.tiers.promote_before(3)
    beside.land()
    assert beside.on_disk() == {name: "quarantined"}
    health = json.loads((beside.store.folder / name / "health.json").read_text())
    assert health["reason"] == "made after the target of incident 1"


def test_numbers_that_are_not_finite_are_never_good(beside: Beside) -> None:
    beside.engine.is_finite = False
    name = beside.save(3, to_memory=True)
    beside.process.tiers.promote_before(3)
    beside.land()
    beside.process.tiers.promote_before(3)
    assert beside.process.tiers.good() == []
    assert beside.on_disk() == {name: "quarantined"}
    assert not beside.ring.holds(name)
    health = json.loads((beside.store.folder / name / "health.json").read_text())
    assert health["reason"] == "numbers of rank 0 are not finite"


def test_nothing_old_goes_before_the_next_one_is_whole(make: Callable[..., Beside]) -> None:
    beside = make()
    store = CheckpointStore(
        beside.store.folder, beside.process.world, keep_good=2, beside=beside.process.world
    )
    store.open()
    for step in (1, 2, 3):
        beside.engine.number = step
        staged = beside.engine.snapshot()
        state, extra = at(step), {"ledger": []}
        store.begin(beside.engine, state, extra, health=GOOD, staged=staged)
        assert len(list(store.folder.glob("step-*"))) == step - 1
        beside.engine.may_write.set()
        store.settle(waits=True)
        beside.engine.may_write.clear()
    assert len(store.entries()) == 3, "what is too much goes when the next one begins"
    store.begin(beside.engine, at(4), {}, health=GOOD, staged=beside.engine.snapshot())
    assert [info.step for info in store.trusted(GOOD)] == [2, 3, 4]
    assert [path.name for path in sorted(store.folder.glob("step-*"))] == [name_of(2), name_of(3)]
    beside.engine.may_write.set()
    store.settle(waits=True)
    assert not list(store.folder.glob(".saving*")), "and is deleted by who writes"


# A rewind.


def test_rewind_does_not_wait_for_a_save_that_it_quarantines(beside: Beside) -> None:
    beside.engine.may_write.set()
    beside.save(40, waits=True)
    beside.process.tiers.promote_before(40)
    beside.engine.may_write.clear()
    younger = beside.save(60)
    beside.saver.make_ready(name_of(40))
    state, incident = beside.process.rewinder.rewind(rewind_to(40), at(61))
    assert (state.step, incident.quarantine) == (40, (younger,))
    assert beside.store.in_flight == younger
    beside.land()
    assert beside.on_disk() == {name_of(40): "good", younger: "quarantined"}


def test_restart_quarantines_what_landed_after_its_rewind(beside: Beside, tmp_path: Path) -> None:
    """Killed between the end of the write and the end of the wait for it."""
    beside.engine.may_write.set()
    beside.save(40, waits=True)
    beside.process.tiers.promote_before(40)
    beside.engine.may_write.clear()
    younger = beside.save(60)
    beside.process.rewinder.rewind(rewind_to(40), at(61))
    beside.engine.may_write.set()
    until(beside.saver.has_news)
    again = Process(tmp_path)
    resumed = again.rewinder.resume()
    assert resumed is not None
    assert resumed.checkpoint.step == 40
    assert again.entry(60).health is QUARANTINED
    assert younger == again.entry(60).name


def test_rewind_to_a_state_that_is_still_being_written_waits_for_it(
    make: Callable[..., Beside],
) -> None:
    beside = make(keep_snapshots=0)
    name = beside.save(40)
    beside.process.tiers.promote_before(40)
    threading.Timer(0.05, beside.engine.may_write.set).start()
    beside.saver.make_ready(name)
    beside.engine.number = 61
    state, _ = beside.process.rewinder.rewind(rewind_to(40), at(61))
    assert (state.step, beside.engine.number) == (40, 40)


@pytest.mark.parametrize("is_finite", [True, False])
def test_rewind_to_a_state_that_did_not_come_out_goes_to_the_one_before(
    make: Callable[..., Beside], is_finite: bool
) -> None:
    """It failed, or its numbers are not finite."""
    beside = make(keep_snapshots=0)
    beside.engine.may_write.set()
    beside.save(20, waits=True)
    beside.engine.is_finite = is_finite
    beside.engine.num_failures = int(is_finite)
    beside.save(40)
    beside.process.tiers.promote_before(40)
    beside.saver.make_ready(name_of(40))
    state, incident = beside.process.rewinder.rewind(rewind_to(40), at(61))
    assert (state.step, beside.engine.number) == (20, 20)
    assert incident.skip[0] == 16 * 40, "what was decided stands"


# Failures.


def test_failed_attempt_is_made_again(
    make: Callable[..., Beside], caplog: pytest.LogCaptureFixture
) -> None:
    beside = make(retry_seconds=(0.001, 0.001))
    beside.engine.num_failures = 2
    beside.engine.may_write.set()
    name = beside.save(3)
    beside.engine.number = 9
    until(beside.saver.has_news)
    beside.saver.settle(waits=False)
    assert beside.on_disk() == {name: "candidate"}
    assert (beside.store.folder / name / "number.bin").read_text() == "3", "of the same copy"
    assert beside.log.failed == []
    assert "attempt 2 of 3, the next in 0.001 s" in caplog.text
    assert "No space left on device" in caplog.text


def test_who_waits_for_a_save_cuts_its_patience_short(make: Callable[..., Beside]) -> None:
    beside = make(retry_seconds=(3600.0,))
    beside.engine.num_failures = 1
    beside.engine.may_write.set()
    beside.save(3)
    until(lambda: beside.engine.num_failures == 0)
    beside.saver.settle(waits=True)
    assert [step for step, _ in beside.log.failed] == [3]
    assert beside.store.entries() == []
    assert not list(beside.store.folder.iterdir())


def test_save_that_failed_is_no_state_to_go_back_to(beside: Beside) -> None:
    beside.engine.num_failures = 1
    beside.engine.may_write.set()
    beside.save(3)
    beside.process.tiers.promote_before(3)
    beside.saver.settle(waits=True)
    assert beside.process.tiers.good() == []


class SaveEachStep(Callback):
    """Asks for a save to disk after each step."""

    def needs_current(self, step: int) -> bool:
        return True

    def after_update(self, report: StepReport) -> Save:
        return Save(reason="each step")


@pytest.mark.parametrize("is_async", [True, False])
def test_so_many_failures_in_a_row_end_the_run(make: Callable[..., Beside], is_async: bool) -> None:
    log = Log()
    beside = make(callbacks=[log, SaveEachStep()], is_async=is_async, max_failures=3)
    beside.engine.num_failures = 100
    beside.engine.may_write.set()
    ending = train(beside.process.run(last_step=20), TrainState())
    assert [step for step, _ in log.failed] == [1, 2, 3]
    assert ending.stop is not None
    assert (ending.stop.code, ending.stop.is_failure) == (SAVES_FAILED, True)
    assert "checkpoint.max_failures=3" in ending.stop.reason
    assert "No space left on device" in ending.stop.reason
    (record,) = beside.process.history.records
    assert record.code == SAVES_FAILED


def test_failures_that_are_not_in_a_row_do_not_end_it(make: Callable[..., Beside]) -> None:
    log = Log()
    beside = make(callbacks=[log, SaveEachStep()], max_failures=3)
    beside.engine.may_write.set()

    class Flaky(Callback):
        def after_update(self, report: StepReport) -> None:
            while beside.store.in_flight is not None and not beside.store.has_landed():
                time.sleep(0.001)  # the failure is meant for the next one
            beside.engine.num_failures = int(report.state.step % 3 != 0)

    beside.process.events._callbacks.insert(0, Flaky())
    ending = train(beside.process.run(last_step=12), TrainState())
    assert ending.stop is None
    assert len(log.failed) > 3


def test_run_whose_disk_takes_no_record_either_still_says_why_it_ends(
    make: Callable[..., Beside], monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = make(callbacks=[SaveEachStep()], max_failures=1)
    beside.engine.num_failures = 100
    beside.engine.may_write.set()

    def full(record: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(beside.process.journal, "append", full)
    ending = train(beside.process.run(last_step=20), TrainState())
    assert ending.stop is not None
    assert ending.stop.code == SAVES_FAILED
