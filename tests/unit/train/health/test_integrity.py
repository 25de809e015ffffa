"""When bits are compared, and what is done about those that are wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import NumberEngine, Process, at, rewind_to
from torch import nn

from train.actions import Continue, Rewind, Save, Stop
from train.checkpoint.info import Health
from train.checkpoint.snapshots import snapshot_name
from train.events import Callback
from train.health.corruption import Check, Corruption
from train.loop import train
from train.recovery.policy import Rung
from train.settings import OnMismatch
from train.state import TrainState

pytestmark = pytest.mark.usefixtures("fast_disk")

LAST_STEP = 1000


class Ranks:
    """A world of ranks that all say what this one says, except where `answers` say otherwise."""

    rank = 0
    is_main = True
    device = torch.device("cpu")

    def __init__(self, size: int) -> None:
        self.size = size
        self.answers: dict[int, Callable[[Any], Any]] = {}

    def gather(self, value: Any) -> list[Any]:
        return [self.answers.get(rank, lambda own: own)(value) for rank in range(self.size)]

    def broadcast(self, value: Any) -> Any:
        return value

    def barrier(self) -> None:
        pass


class Watcher(Callback):
    """Keeps in mind what was checked."""

    def __init__(self) -> None:
        self.seen: list[tuple[Check, Corruption | None]] = []

    def on_integrity_check(
        self, check: Check, found: Corruption | None, state: TrainState, seconds: float
    ) -> None:
        self.seen.append((check, found))


class Replica(NumberEngine):
    """An engine whose ranks hold whole copies; its losses are its number."""

    has_replicas = True

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(1, 1)

    def recent_sample_losses(self) -> list[list[float]]:
        return [[float(self.number)]]


def wrong(own: Any) -> Any:
    """Return what a rank with another number says of itself."""
    if isinstance(own, dict):
        return {name: total + 1 for name, total in own.items()}
    return own if "," in own else "another digest"


def process_of(folder: Path, num_ranks: int) -> tuple[Process, Ranks, Watcher]:
    ranks, watcher = Ranks(num_ranks), Watcher()
    world: Any = ranks
    process = Process(folder, engine=Replica(), callbacks=[watcher])
    process.world = world
    for step in (0, 20, 40):
        process.save(step, Health.GOOD)
    process.engine.number = 60
    return process, ranks, watcher


def begin(integrity: Any, engine: Any, step: int) -> None:
    """Take the first step of a process, which is never executed twice."""
    integrity.execute(engine, lambda: torch.zeros(1), at(step))


@pytest.mark.parametrize(
    ("step", "winner", "is_due"),
    [
        (50, Continue(), True),
        (51, Continue(), False),
        (51, Save(reason="due"), True),
        (51, Save(reason="due", to_disk=False, to_memory=True), False),
        (51, rewind_to(40), True),
        (50, Stop(reason="enough", needs_save=False), False),
        (51, Stop(reason="preempted", needs_save=True), True),
        (LAST_STEP, Continue(), True),
    ],
)
def test_replicas_are_compared_when_due_and_before_a_checkpoint_or_a_rewind(
    step: int, winner: Any, is_due: bool, tmp_path: Path
) -> None:
    process, _, watcher = process_of(tmp_path, 3)
    integrity = process.integrity(last_step=LAST_STEP, replica_check_interval_steps=25)
    begin(integrity, process.engine, step - 1)
    assert integrity.reviewed([winner], process.engine, at(step)) == [winner]
    assert watcher.seen == ([(Check.REPLICAS, None)] if is_due else [])


@pytest.mark.parametrize("case", ["alone", "sharded", "off"])
def test_without_replicas_nothing_is_compared(case: str, tmp_path: Path) -> None:
    process, _, watcher = process_of(tmp_path, 1 if case == "alone" else 2)
    process.engine.has_replicas = case != "sharded"
    interval = None if case == "off" else 1
    integrity = process.integrity(last_step=LAST_STEP, replica_check_interval_steps=interval)
    begin(integrity, process.engine, 49)
    integrity.reviewed([Save(reason="due")], process.engine, at(50))
    assert watcher.seen == []


def found_at(process: Process, step: int, *, sound: int = 45, **settings: Any) -> Any:
    """Compare at `sound`, when all is well, and return the answer at `step`, when it is not."""
    settings = {"replica_check_interval_steps": 1, **settings}
    integrity = process.integrity(last_step=LAST_STEP, **settings)
    ranks: Any = process.world
    begin(integrity, process.engine, sound - 1)
    answers, ranks.answers = ranks.answers, {}
    assert integrity.reviewed([Continue()], process.engine, at(sound)) == [Continue()]
    ranks.answers = answers
    (answer,) = integrity.reviewed([Save(reason="due")], process.engine, at(step))
    return answer


def test_rank_that_differs_is_named_and_all_go_back_and_skip_nothing(tmp_path: Path) -> None:
    process, ranks, watcher = process_of(tmp_path, 3)
    ranks.answers = {2: wrong}
    answer = found_at(process, 60)
    assert isinstance(answer, Rewind)
    assert (answer.target_step, answer.skip_amount, answer.rung) == (40, 0, Rung.REPLAY)
    assert (answer.rule, answer.onset_step, answer.detected_step) == ("integrity", 46, 60)
    assert "rank 2 (" in answer.reason
    assert "another state than the other ranks in 1 of 1 tensors (number)" in answer.reason
    assert len(answer.suspects) == 1
    _, found = watcher.seen[-1]
    assert found is not None and found.vote.ranks == (2,) and found.tensors == ("number",)


def test_no_state_is_trusted_that_was_saved_since_replicas_were_equal(tmp_path: Path) -> None:
    process, ranks, _ = process_of(tmp_path, 3)
    process.save(50, Health.GOOD)
    ranks.answers = {2: wrong}
    assert found_at(process, 60, sound=45).target_step == 40


def test_two_ranks_are_both_named(tmp_path: Path) -> None:
    process, ranks, _ = process_of(tmp_path, 2)
    ranks.answers = {1: wrong}
    answer = found_at(process, 60)
    assert "ranks 0 (" in answer.reason and "which of them is not known" in answer.reason
    assert len(answer.suspects) == 2


def test_finding_wins_over_the_rewind_that_a_spike_asks_for(tmp_path: Path) -> None:
    process, ranks, _ = process_of(tmp_path, 3)
    integrity = process.integrity(last_step=LAST_STEP, replica_check_interval_steps=25)
    begin(integrity, process.engine, 50)
    ranks.answers = {1: wrong}
    (answer,) = integrity.reviewed([rewind_to(40)], process.engine, at(58))
    assert answer.rule == "integrity" and answer.skip_amount == 0


def test_stop_for_another_reason_does_not_save_what_is_wrong(tmp_path: Path) -> None:
    process, ranks, _ = process_of(tmp_path, 3)
    integrity = process.integrity(last_step=LAST_STEP, replica_check_interval_steps=25)
    begin(integrity, process.engine, 50)
    ranks.answers = {1: wrong}
    stop = Stop(reason="preempted", needs_save=True)
    (answer,) = integrity.reviewed([stop], process.engine, at(58))
    assert answer == replace(stop, needs_save=False)


def test_place_that_was_named_before_stops_the_run(tmp_path: Path) -> None:
    process, ranks, _ = process_of(tmp_path, 3)
    ranks.answers = {2: wrong}
    first = found_at(process, 60)
    state, _ = process.rewinder.rewind(first, at(60))
    assert state.step == 40
    second = found_at(process, 80, sound=70)
    assert isinstance(second, Stop) and second.is_failure and not second.needs_save
    assert second.code == "silent_corruption"
    assert "was named before; take " in second.reason
    process.rewinder.stopped(second, at(80))
    assert process.journal.read()[-1].suspects == first.suspects


def test_stop_is_the_answer_where_it_is_asked_for_or_nothing_else_is_left(tmp_path: Path) -> None:
    process, ranks, _ = process_of(tmp_path, 3)
    ranks.answers = {2: wrong}
    asked = found_at(process, 60, on_mismatch=OnMismatch.STOP)
    assert isinstance(asked, Stop) and "integrity.on_mismatch=stop" in asked.reason
    used_up = found_at(process, 60, max_rewinds=0)
    assert isinstance(used_up, Stop) and "recovery.max_rewinds are used up" in used_up.reason
    empty, ranks, _ = process_of(tmp_path / "empty", 3)
    for info in empty.store.entries():
        empty.store.quarantine(info.name, "for the test")
    ranks.answers = {2: wrong}
    assert "no good state from before it is left" in found_at(empty, 60).reason


# A step that is executed twice.


def twice(process: Process, step: Callable[[], torch.Tensor]) -> Any:
    """Execute `step` twice, and return what is to be done then."""
    integrity = process.integrity(last_step=LAST_STEP, reexecution_interval_steps=1)
    begin(integrity, process.engine, 59)
    signals = integrity.execute(process.engine, step, at(60))
    assert signals.shape == (8,)
    (answer,) = integrity.reviewed([Continue()], process.engine, at(61))
    return answer


def test_step_that_repeats_changes_nothing(tmp_path: Path) -> None:
    process, _, watcher = process_of(tmp_path, 2)
    assert twice(process, partial(process.engine.step, None)) == Continue()
    assert process.engine.number == 61
    assert watcher.seen == [(Check.REEXECUTION, None)]


def test_first_step_of_a_process_is_executed_once(tmp_path: Path) -> None:
    process, _, watcher = process_of(tmp_path, 1)
    integrity = process.integrity(last_step=LAST_STEP, reexecution_interval_steps=1)
    integrity.execute(process.engine, partial(process.engine.step, None), at(60))
    assert watcher.seen == [] and process.engine.number == 61


def test_step_that_does_not_repeat_names_the_rank_and_goes_back(tmp_path: Path) -> None:
    process, _, watcher = process_of(tmp_path, 1)
    extra = iter([1, 0])

    def step() -> torch.Tensor:
        signals = process.engine.step(None)
        process.engine.number += next(extra)
        return signals

    answer = twice(process, step)
    assert isinstance(answer, Rewind) and answer.target_step == 40
    assert (answer.onset_step, answer.detected_step) == (61, 61)
    assert "step 61 came out otherwise when it was executed again: other losses" in answer.reason
    assert [check for check, _ in watcher.seen] == [Check.REEXECUTION]


def test_state_that_cannot_be_put_back_is_a_finding(tmp_path: Path) -> None:
    process, _, _ = process_of(tmp_path, 1)

    def step() -> torch.Tensor:
        before = snapshots[-1]
        before.wait()
        before.slabs[0][0] ^= 1
        signals: torch.Tensor = process.engine.step(None)
        return signals

    snapshots: list[Any] = []
    take = process.engine.snapshot
    process.engine.snapshot = lambda reuse=None: snapshots.append(take(reuse)) or snapshots[-1]
    answer = twice(process, step)
    assert isinstance(answer, Rewind) and "number changed in host memory" in answer.reason


# In the loop.


def test_loop_goes_back_when_replicas_differ_and_comes_to_its_end(tmp_path: Path) -> None:
    process, ranks, watcher = process_of(tmp_path, 3)
    process.engine.number = 40
    run = replace(
        process.run(last_step=60),
        integrity=process.integrity(last_step=60, replica_check_interval_steps=4),
    )
    checks = []

    def once(own: Any) -> Any:
        checks.append(own)
        return wrong(own) if 2 <= len(checks) <= 4 else own

    ranks.answers = {1: once}
    ending = train(run, at(40))
    assert ending.stop is None and ending.state.step == 60 and ending.state.rewinds == 1
    assert process.engine.number == 60
    assert ending.state.clock == 68, "from 48 back to 40"
    (done,) = [record for record in process.history.done if record.rule == "integrity"]
    assert done.target_checkpoint == snapshot_name(at(40)) and done.suspects
    assert len([found for _, found in watcher.seen if found is not None]) == 1
