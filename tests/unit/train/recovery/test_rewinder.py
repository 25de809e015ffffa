"""Going back and taking up again, with a kill between any two of its durable parts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from train.actions import Rewind
from train.checkpoint.info import Health
from train.checkpoint.store import CheckpointStore
from train.data.ledger import SkipLedger
from train.distributed import World
from train.errors import CorruptCheckpointError, JournalError
from train.events import Callback, Events
from train.recovery.journal import Journal, Phase
from train.recovery.rewind import Rewinder
from train.state import TrainState

WORLD = World(rank=0, size=1, device=torch.device("cpu"))


class Killed(BaseException):
    """Stands for a SIGKILL: nothing catches it."""


class NumberEngine:
    """Its whole model is one number."""

    name = "number"
    can_veto = True
    checkpoint_format = "number"
    num_parameters = 1
    group_names = ()

    def __init__(self) -> None:
        self.number = 0

    def step(self, *args: object, **kwargs: object) -> Any:
        raise NotImplementedError

    def evaluate(self, rows: object) -> float:
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        (folder / "number.bin").write_text(str(self.number))

    def load(self, folder: Path) -> None:
        self.number = int((folder / "number.bin").read_text())


class Counter(Callback):
    """A callback with state."""

    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, object]:
        return {"count": self.count}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        self.count = int(str(state["count"]))


class Process:
    """All that one process of a run holds; a new one over the same folder is a restart."""

    def __init__(self, folder: Path) -> None:
        self.engine, self.counter, self.ledger = NumberEngine(), Counter(), SkipLedger()
        self.store = CheckpointStore(folder / "checkpoints", WORLD, keep_good=5)
        self.store.open()
        self.journal = Journal(folder / "journal.jsonl")
        self.rewinder = Rewinder(
            store=self.store,
            journal=self.journal,
            ledger=self.ledger,
            engine=self.engine,
            events=Events([self.counter], is_main=True),
            world=WORLD,
        )

    def save(self, step: int, health: Health) -> None:
        self.engine.number = self.counter.count = step
        extra = {
            "ledger": self.ledger.ranges(),
            "callbacks": {"Counter": self.counter.state_dict()},
        }
        self.store.save(self.engine, at(step), extra, health=health)


def at(step: int, *, rewinds: int = 0) -> TrainState:
    return TrainState(step=step, cursor=16 * step, clock=step, tokens_seen=step, rewinds=rewinds)


def action(target_step: int = 40, *, amount: int = 100) -> Rewind:
    return Rewind(
        target=f"step-{target_step:08d}-clock-{target_step:08d}",
        target_step=target_step,
        skip_from=16 * target_step,
        skip_amount=amount,
        rule="falcon",
        verdict="spike",
        onset_step=58,
        detected_step=60,
        reason="spike",
    )


AFTER = TrainState(step=40, cursor=640, clock=61, tokens_seen=40, rewinds=1)
SKIPPED = [(640, 16 * 61)]


@pytest.fixture
def process(tmp_path: Path) -> Process:
    made = Process(tmp_path)
    made.save(0, Health.GOOD)
    made.save(20, Health.GOOD)
    made.save(40, Health.GOOD)
    made.save(60, Health.CANDIDATE)
    return made


def health_of(process: Process, step: int) -> Health:
    return next(info.health for info in process.store.entries() if info.step == step)


def test_rewind_restores_model_callbacks_and_state_but_not_the_history(process: Process) -> None:
    state, incident = process.rewinder.rewind(action(), at(61))
    assert state == AFTER
    assert process.engine.number == process.counter.count == 40
    assert process.ledger.ranges() == SKIPPED
    assert health_of(process, 60) is Health.QUARANTINED
    assert incident.phase is Phase.DONE
    assert incident.quarantine == ("step-00000060-clock-00000060",)
    assert [record.phase for record in process.journal.read()] == [Phase.INTENT, Phase.DONE]


def test_second_rewind_has_the_next_number_and_adds_to_the_skips(process: Process) -> None:
    process.rewinder.rewind(action(), at(61))
    state, incident = process.rewinder.rewind(
        action(20), TrainState(step=45, cursor=1200, clock=66, rewinds=1)
    )
    assert (incident.incident, state.rewinds) == (2, 2)
    assert (state.step, state.clock) == (20, 66)
    assert process.ledger.ranges() == [(320, 1200)]
    assert health_of(process, 40) is Health.QUARANTINED


def test_fresh_folder_has_nothing_to_take_up(tmp_path: Path) -> None:
    assert Process(tmp_path).rewinder.resume() is None


def test_restart_takes_up_the_youngest_checkpoint(process: Process, tmp_path: Path) -> None:
    restarted = Process(tmp_path)
    resumed = restarted.rewinder.resume()
    assert resumed is not None
    assert resumed.state == at(60)
    assert resumed.finished_incident is None
    assert restarted.engine.number == restarted.counter.count == 60


def test_restart_after_a_rewind_keeps_skips_clock_and_count(
    process: Process, tmp_path: Path
) -> None:
    process.rewinder.rewind(action(), at(61))
    restarted = Process(tmp_path)
    resumed = restarted.rewinder.resume()
    assert resumed is not None
    assert resumed.state == AFTER
    assert resumed.finished_incident is None
    assert restarted.ledger.ranges() == SKIPPED


@pytest.mark.parametrize("phase", ["intent", "load", "quarantine", "done"])
def test_kill_at_any_phase_of_a_rewind_ends_in_the_same_decision(
    phase: str, process: Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(*args: object) -> None:
        raise Killed

    def append_then_kill(incident: Any) -> None:
        Journal.append(process.journal, incident)
        if incident.phase is Phase(phase):
            raise Killed

    if phase in ("intent", "done"):
        monkeypatch.setattr(process.journal, "append", append_then_kill)
    elif phase == "load":
        monkeypatch.setattr(process.engine, "load", kill)
    else:
        monkeypatch.setattr(process.store, "quarantine", kill)
    with pytest.raises(Killed):
        process.rewinder.rewind(action(), at(61))

    for _ in range(2):  # a second restart changes nothing
        restarted = Process(tmp_path)
        resumed = restarted.rewinder.resume()
        assert resumed is not None
        assert resumed.state == AFTER
        assert restarted.engine.number == restarted.counter.count == 40
        assert restarted.ledger.ranges() == SKIPPED
        assert health_of(restarted, 60) is Health.QUARANTINED
        phases = [record.phase for record in restarted.journal.read()]
        assert phases == [Phase.INTENT, Phase.DONE]


def test_corrupt_youngest_checkpoint_is_quarantined_and_the_one_before_taken(
    process: Process, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (process.store.entries()[-1].path / "number.bin").write_text("61")
    restarted = Process(tmp_path)
    resumed = restarted.rewinder.resume()
    assert resumed is not None
    assert resumed.state.step == 40
    assert health_of(restarted, 60) is Health.QUARANTINED
    assert "is corrupt" in caplog.text


def test_corrupt_target_falls_back_to_the_good_one_before(process: Process) -> None:
    (process.store.entries()[2].path / "number.bin").write_text("41")
    state, incident = process.rewinder.rewind(action(), at(61))
    assert (state.step, state.cursor) == (20, 320)
    assert (incident.target_step, incident.target_checkpoint) == (
        20,
        "step-00000020-clock-00000020",
    )
    assert process.ledger.ranges() == SKIPPED
    assert health_of(process, 40) is Health.QUARANTINED


def test_no_readable_checkpoint_is_an_error_with_the_way_out(
    process: Process, tmp_path: Path
) -> None:
    for info in process.store.entries():
        (info.path / "number.bin").write_text("x")
    with pytest.raises(CorruptCheckpointError, match=r"none of 4 checkpoints .* can be read"):
        Process(tmp_path).rewinder.resume()


def test_intent_to_a_checkpoint_that_is_gone_is_an_error_with_the_way_out(
    process: Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(*args: object) -> None:
        raise Killed

    monkeypatch.setattr(process.engine, "load", kill)
    with pytest.raises(Killed):
        process.rewinder.rewind(action(), at(61))
    gone = next(info.path for info in process.store.entries() if info.step == 40)
    gone.rename(tmp_path / "elsewhere")
    with pytest.raises(JournalError, match=r"put it back, or start over with run\.overwrite=true"):
        Process(tmp_path).rewinder.resume()


def test_second_rewind_to_the_same_target_skips_its_amount_anew(process: Process) -> None:
    amount = 5000
    process.rewinder.rewind(action(amount=amount), at(61))
    assert process.ledger.num_samples() == amount
    # Two steps after the first skip, the data is still bad.
    again = TrainState(step=42, cursor=640 + amount + 32, clock=63, rewinds=1)
    process.rewinder.rewind(action(amount=amount), again)
    assert process.ledger.num_samples() == 2 * amount
