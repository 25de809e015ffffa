"""Memory and disk as one catalogue: what a rewind may go to, and the fall from one to the next."""

from __future__ import annotations

from pathlib import Path

import pytest
from fakes import Process, at, corrupt_snapshot

from train.checkpoint.info import Health
from train.checkpoint.snapshots import snapshot_name
from train.errors import CorruptCheckpointError

pytestmark = pytest.mark.usefixtures("fast_disk")

GOOD, CANDIDATE = Health.GOOD, Health.CANDIDATE


@pytest.fixture
def process(tmp_path: Path) -> Process:
    """Step 10 on disk, 20 in both, 30 in memory alone: all good; 40 in both: a candidate."""
    made = Process(tmp_path)
    made.save(10, GOOD)
    made.save(20, GOOD, to_memory=True)
    made.save(30, GOOD, to_disk=False, to_memory=True)
    made.save(40, CANDIDATE, to_memory=True)
    return made


def good_steps(process: Process) -> list[int]:
    return [info.step for info in process.tiers.good()]


def spoil_on_disk(process: Process, step: int) -> None:
    (process.entry(step).path / "number.bin").write_text("x")


def load(process: Process, *steps: int) -> int:
    """Load the first of these that is whole, and return its step."""
    found = [process.tiers.find(snapshot_name(at(step))) for step in steps]
    info, extra = process.tiers.load_first(process.engine, [f for f in found if f is not None])
    assert extra["train_state"]["step"] == info.step == process.engine.number
    return info.step


def test_good_states_of_both_are_listed_once_oldest_clock_first(process: Process) -> None:
    assert good_steps(process) == [10, 20, 30]


def test_what_is_on_disk_is_shown_as_it_is_on_disk(process: Process) -> None:
    formats = {info.step: info.format for info in process.tiers.good()}
    assert formats == {10: "number", 20: "number", 30: "memory"}
    found = process.tiers.find(snapshot_name(at(20)))
    assert found is not None
    assert found.format == "number"


def test_name_that_no_tier_has_is_not_found(process: Process) -> None:
    assert process.tiers.find(snapshot_name(at(99))) is None


def test_calm_steps_promote_in_both_tiers(process: Process) -> None:
    process.tiers.promote_before(39)
    assert good_steps(process) == [10, 20, 30]
    process.tiers.promote_before(40)
    assert good_steps(process) == [10, 20, 30, 40]
    assert [info.step for info in process.ring.trusted(GOOD)] == [20, 30, 40]
    assert [info.step for info in process.store.trusted(GOOD)] == [10, 20, 40]


def test_quarantined_state_is_never_promoted(process: Process, tmp_path: Path) -> None:
    process.store.quarantine(snapshot_name(at(40)), "bad")
    process.ring.forget_after(30)
    process.tiers.promote_before(1000)
    assert good_steps(process) == [10, 20, 30]


def test_memory_is_read_before_disk(process: Process) -> None:
    assert load(process, 20) == 20
    assert (process.engine.num_restores, process.engine.num_loads) == (1, 0)


def test_state_that_is_on_disk_alone_is_read_there(process: Process) -> None:
    assert load(process, 10) == 10
    assert (process.engine.num_restores, process.engine.num_loads) == (0, 1)


def test_spoilt_snapshot_falls_to_the_same_state_on_disk(process: Process) -> None:
    corrupt_snapshot(process.ring, snapshot_name(at(20)))
    assert load(process, 20, 10) == 20
    assert process.engine.num_loads == 1
    assert good_steps(process) == [10, 20, 30]


def test_spoilt_snapshot_that_is_nowhere_else_falls_to_the_next_candidate(
    process: Process,
) -> None:
    corrupt_snapshot(process.ring, snapshot_name(at(30)))
    assert load(process, 30, 20, 10) == 20
    assert process.engine.num_loads == 0


def test_spoilt_checkpoint_is_quarantined_and_the_next_is_read(process: Process) -> None:
    spoil_on_disk(process, 10)
    assert load(process, 10, 20) == 20
    assert process.entry(10).health is Health.QUARANTINED
    assert good_steps(process) == [20, 30]


def test_state_spoilt_in_both_is_no_target_any_more(
    process: Process, caplog: pytest.LogCaptureFixture
) -> None:
    corrupt_snapshot(process.ring, snapshot_name(at(20)))
    spoil_on_disk(process, 20)
    assert load(process, 20, 10) == 10
    assert good_steps(process) == [10, 30]
    assert "falling back to disk" in caplog.text
    assert "falling back to the one before" in caplog.text


def test_nothing_that_can_be_read_is_an_error_with_the_way_out(process: Process) -> None:
    corrupt_snapshot(process.ring, snapshot_name(at(20)))
    spoil_on_disk(process, 20)
    spoil_on_disk(process, 10)
    with pytest.raises(CorruptCheckpointError, match=r"none of 2 .* run\.overwrite=true"):
        load(process, 20, 10)


def test_spoilt_disk_is_not_noticed_while_memory_is_whole(process: Process) -> None:
    spoil_on_disk(process, 20)
    assert load(process, 20) == 20
    assert process.entry(20).health is GOOD
