"""The ring of states in host memory: what it holds, gives up, brings back; how large it may be."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from fakes import WORLD, NumberEngine, at, corrupt_snapshot

from train.checkpoint.info import Health
from train.checkpoint.snapshots import (
    SnapshotRing,
    affordable_size,
    available_memory,
    snapshot_name,
)
from train.engines.snapshot import HostSnapshot
from train.errors import CorruptCheckpointError

GIB = 2**30
GOOD, CANDIDATE = Health.GOOD, Health.CANDIDATE


class CountingEngine(NumberEngine):
    """Remembers which buffers it was handed, and which it made."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[int] = []

    def snapshot(self, reuse: HostSnapshot | None = None) -> HostSnapshot:
        made = super().snapshot(reuse)
        self.buffers.append(made.slabs[0].data_ptr())
        return made


@pytest.fixture
def engine() -> CountingEngine:
    return CountingEngine()


def ring_of(engine: NumberEngine, size: int) -> SnapshotRing:
    return SnapshotRing(engine, WORLD, size=size)


def take(
    ring: SnapshotRing, engine: NumberEngine, step: int, health: Health = CANDIDATE
) -> dict[str, object]:
    engine.number = step
    extra: dict[str, object] = {"ledger": [], "callbacks": {"a": {"values": [step]}}}
    ring.take(at(step), extra, health=health)
    return extra


def held(ring: SnapshotRing) -> list[int]:
    return [info.step for info in ring.entries()]


# What it brings back.


def test_state_comes_back_with_everything_that_was_given(engine: CountingEngine) -> None:
    ring = ring_of(engine, 2)
    take(ring, engine, 3)
    engine.number = 9
    extra = ring.restore(snapshot_name(at(3)))
    assert engine.number == 3
    assert extra["train_state"] == at(3).as_dict()
    assert extra["callbacks"] == {"a": {"values": [3]}}


def test_entry_says_what_is_known_of_it(engine: CountingEngine) -> None:
    ring = ring_of(engine, 2)
    take(ring, engine, 3)
    (info,) = ring.entries()
    assert (info.name, info.step, info.cursor, info.clock) == (snapshot_name(at(3)), 3, 48, 3)
    assert (info.health, info.format, info.world_size) == (CANDIDATE, "memory", 1)
    assert info.num_bytes == engine.state_bytes
    assert snapshot_name(at(3)) == "step-00000003-clock-00000003"


def test_later_changes_reach_neither_what_is_held_nor_what_was_brought_back(
    engine: CountingEngine,
) -> None:
    ring = ring_of(engine, 2)
    given: Any = take(ring, engine, 3)
    given["callbacks"]["a"]["values"].append("later")
    first = ring.restore(snapshot_name(at(3)))
    first["callbacks"]["a"]["values"].append("later still")
    assert ring.restore(snapshot_name(at(3)))["callbacks"] == {"a": {"values": [3]}}


def test_changed_snapshot_is_refused_given_up_and_names_the_rank(engine: CountingEngine) -> None:
    ring = ring_of(engine, 2)
    take(ring, engine, 3)
    take(ring, engine, 4)
    corrupt_snapshot(ring, snapshot_name(at(3)))
    engine.number = 9
    with pytest.raises(CorruptCheckpointError, match=r"in memory: rank 0: number changed"):
        ring.restore(snapshot_name(at(3)))
    assert engine.number == 9
    assert held(ring) == [4]


# What it holds.


def test_ring_of_no_size_takes_nothing(engine: CountingEngine) -> None:
    ring = ring_of(engine, 0)
    assert ring.take(at(1), {}, health=GOOD) is None
    assert ring.entries() == []
    assert engine.buffers == []


def test_oldest_is_given_up_for_a_new_one(engine: CountingEngine) -> None:
    ring = ring_of(engine, 3)
    for step in range(1, 6):
        take(ring, engine, step, GOOD)
    assert held(ring) == [3, 4, 5]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_youngest_good_one_and_the_next_to_be_good_are_never_given_up(
    size: int, engine: CountingEngine
) -> None:
    ring = ring_of(engine, size)
    take(ring, engine, 0, GOOD)
    take(ring, engine, 1, GOOD)
    for step in range(2, 9):
        take(ring, engine, step)
        assert {1, 2} <= set(held(ring))
        assert len(held(ring)) <= size
    if size > 2:
        assert 8 in held(ring), "the youngest candidate gives way to a younger one"


@pytest.mark.parametrize(("size", "wait"), [(2, 1), (2, 2), (2, 7), (3, 4), (4, 50)])
def test_however_long_the_wait_for_calm_something_young_becomes_good(
    size: int, wait: int, engine: CountingEngine
) -> None:
    """Candidates are good after `wait` more of them; none is pushed out by those that follow."""
    ring = ring_of(engine, size)
    take(ring, engine, 0, GOOD)
    for step in range(1, 8 * wait):
        for info in ring.trusted(CANDIDATE):
            if info.step <= step - wait:
                ring.promote(info)
        take(ring, engine, step)
    (*_, youngest) = ring.trusted(GOOD)
    assert youngest.step >= 8 * wait - 3 * wait - 1


def test_older_good_one_makes_room_once_a_younger_is_good(engine: CountingEngine) -> None:
    ring = ring_of(engine, 2)
    take(ring, engine, 0, GOOD)
    take(ring, engine, 10)
    ring.promote(ring.entries()[1])
    take(ring, engine, 20)
    assert [(info.step, info.health) for info in ring.entries()] == [(10, GOOD), (20, CANDIDATE)]


def test_taking_says_what_it_took_and_when_it_took_nothing(engine: CountingEngine) -> None:
    ring = ring_of(engine, 2)
    engine.number = 1
    seconds = ring.take(at(1), {}, health=GOOD)
    assert seconds is not None
    assert seconds >= 0.0
    assert ring.take(at(2), {}, health=CANDIDATE) is not None
    assert ring.take(at(3), {}, health=CANDIDATE) is None, "there is room for none but these"
    assert held(ring) == [1, 2]


def test_ring_without_a_good_one_keeps_the_next_to_be_good(engine: CountingEngine) -> None:
    ring = ring_of(engine, 2)
    for step in (1, 2, 3):
        take(ring, engine, step)
    assert held(ring) == [1, 3]


def test_ring_never_holds_more_than_its_size(engine: CountingEngine) -> None:
    ring = ring_of(engine, 2)
    for step in range(40):
        take(ring, engine, step, GOOD if step % 3 == 0 else CANDIDATE)
        assert len(ring.entries()) <= 2


def test_same_state_taken_twice_is_held_once(engine: CountingEngine) -> None:
    ring = ring_of(engine, 3)
    take(ring, engine, 3)
    take(ring, engine, 4)
    take(ring, engine, 3, GOOD)
    assert held(ring) == [4, 3]
    assert [info.step for info in ring.trusted(GOOD)] == [3]


def test_promotion_changes_one_and_keeps_what_it_holds(engine: CountingEngine) -> None:
    ring = ring_of(engine, 3)
    take(ring, engine, 3)
    take(ring, engine, 4)
    ring.promote(ring.entries()[0])
    assert [info.step for info in ring.trusted(GOOD)] == [3]
    assert [info.step for info in ring.trusted(CANDIDATE)] == [4]
    ring.restore(snapshot_name(at(3)))
    assert engine.number == 3


def test_promotion_of_what_it_no_longer_holds_is_harmless(engine: CountingEngine) -> None:
    ring = ring_of(engine, 2)
    take(ring, engine, 3)
    (gone,) = ring.entries()
    ring.forget_after(0)
    ring.promote(gone)
    assert ring.entries() == []


def test_what_is_younger_than_a_clock_is_forgotten(engine: CountingEngine) -> None:
    ring = ring_of(engine, 4)
    for step in (1, 2, 3, 4):
        take(ring, engine, step)
    ring.forget_after(2)
    assert held(ring) == [1, 2]
    assert ring.holds(snapshot_name(at(2)))
    assert not ring.holds(snapshot_name(at(3)))


# Its buffers.


def test_buffers_are_written_again_and_no_more_are_made_than_there_are_places(
    engine: CountingEngine,
) -> None:
    ring = ring_of(engine, 2)
    for step in range(12):
        take(ring, engine, step, GOOD)
    assert len(set(engine.buffers)) == 2
    engine.number = 99
    for step in (10, 11):
        ring.restore(snapshot_name(at(step)))
        assert engine.number == step


def test_buffers_of_what_was_forgotten_are_used_for_what_comes(engine: CountingEngine) -> None:
    ring = ring_of(engine, 3)
    for step in (1, 2, 3):
        take(ring, engine, step)
    ring.forget_after(1)
    for step in (4, 5):
        take(ring, engine, step)
    assert len(set(engine.buffers)) == 3
    for step in (1, 4, 5):
        ring.restore(snapshot_name(at(step)))
        assert engine.number == step


# How large it may be.


@pytest.mark.parametrize(
    ("available_gib", "expected"), [(80, 4), (64, 4), (63, 3), (48, 3), (47, 2), (32, 2)]
)
def test_ring_fills_at_most_half_of_the_free_memory(available_gib: int, expected: int) -> None:
    size = affordable_size(
        4, state_bytes=4 * GIB, ranks_on_host=2, available_bytes=available_gib * GIB
    )
    assert size == expected


@pytest.mark.parametrize("available_gib", [0, 8, 16, 31])
def test_room_for_less_than_two_is_room_for_none(
    available_gib: int, caplog: pytest.LogCaptureFixture
) -> None:
    size = affordable_size(
        4, state_bytes=4 * GIB, ranks_on_host=2, available_bytes=available_gib * GIB
    )
    assert size == 0
    assert "rewinds go to checkpoints on disk" in caplog.text


def test_ring_that_is_made_smaller_says_so_with_its_numbers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    affordable_size(4, state_bytes=4 * GIB, ranks_on_host=2, available_bytes=50 * GIB)
    assert (
        "checkpoint.keep_snapshots=4 needs 16.0 GiB of host memory for each of 2 ranks, and half "
        "of what is free is 25.0 GiB: keeping 3; set checkpoint.keep_snapshots=0" in caplog.text
    )


def test_ring_that_fits_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    assert affordable_size(2, state_bytes=GIB, ranks_on_host=1, available_bytes=8 * GIB) == 2
    assert caplog.text == ""


@pytest.mark.parametrize(("state_bytes", "available"), [(GIB, None), (0, 0), (0, None)])
def test_what_cannot_be_known_takes_nothing_away(state_bytes: int, available: int | None) -> None:
    size = affordable_size(3, state_bytes=state_bytes, ranks_on_host=1, available_bytes=available)
    assert size == 3


def test_free_memory_of_this_machine_is_known() -> None:
    found = available_memory()
    assert found is not None
    assert found > 2**20
