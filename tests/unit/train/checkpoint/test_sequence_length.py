"""A run that is taken up with samples of another length: cursor and skips hold by tokens."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import WORLD, NumberEngine

from train.checkpoint.info import Health
from train.checkpoint.store import CheckpointStore
from train.errors import JournalError
from train.recovery.journal import Incident, Journal, Phase
from train.recovery.policy import Rung
from train.state import TrainState

pytestmark = pytest.mark.usefixtures("fast_disk")

STATE = TrainState(step=10, cursor=101, clock=12, tokens_seen=10_000)
EXTRA: dict[str, object] = {
    "ledger": [[7, 9], [40, 60]],
    "callbacks": {},
    "last_samples": {"indices": [100], "sha256": "a" * 64},
}
SKIP = Incident(
    incident=1,
    phase=Phase.DONE,
    time="2026-01-01T00:00:00.000+00:00",
    rule="falcon",
    reason="spike",
    verdict="spike",
    onset_step=50,
    detected_step=52,
    clock=53,
    target_checkpoint="step-00000040-clock-00000040",
    target_step=40,
    skip=(7, 9),
    quarantine=(),
)


def store(folder: Path, sequence_length: int) -> CheckpointStore:
    made = CheckpointStore(folder, WORLD, keep_good=2, sequence_length=sequence_length)
    made.open()
    return made


@pytest.mark.parametrize(
    ("length", "cursor", "ledger"),
    [
        (100, 101, [[7, 9], [40, 60]]),
        (200, 51, [[3, 5], [20, 30]]),
        (50, 202, [[14, 18], [80, 120]]),
        (300, 34, [[2, 3], [13, 20]]),
    ],
)
def test_cursor_and_ledger_of_a_checkpoint_are_mapped(
    tmp_path: Path, length: int, cursor: int, ledger: list[list[int]]
) -> None:
    engine = NumberEngine()
    store(tmp_path, 100).save(engine, STATE, EXTRA, health=Health.GOOD)
    reopened = store(tmp_path, length)
    (info,) = reopened.entries()
    assert info.cursor == cursor
    state = reopened.load(engine, info)
    assert state["train_state"] == {**STATE.as_dict(), "cursor": cursor}
    assert [list(entry) for entry in state["ledger"]] == ledger
    assert ("last_samples" in state) == (length == 100), "it is of samples that are no more"


def test_a_checkpoint_that_does_not_know_its_length_is_taken_as_it_is(tmp_path: Path) -> None:
    engine = NumberEngine()
    store(tmp_path, 0).save(engine, STATE, EXTRA, health=Health.GOOD)
    reopened = store(tmp_path, 300)
    assert reopened.entries()[0].cursor == STATE.cursor
    assert reopened.load(engine, reopened.entries()[0])["ledger"] == EXTRA["ledger"]


def test_skips_of_the_journal_are_mapped_outward(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path, sequence_length=100).append(SKIP)
    assert json.loads(path.read_text())["sequence_length"] == 100
    (same,) = Journal(path, sequence_length=100).read()
    assert same.skip == (7, 9)
    (mapped,) = Journal(path, sequence_length=200).read()
    assert mapped.skip == (3, 5)
    # What is written now is of the new length; what was written before stays as it was.
    Journal(path, sequence_length=200).append(replace(SKIP, incident=2, skip=(3, 5)))
    assert [record.skip for record in Journal(path, sequence_length=100).read()] == [
        (7, 9),
        (6, 10),
    ]


def test_samples_that_were_put_back_bind_a_run_to_their_length(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    returned = replace(SKIP, rung=Rung.UNSKIP, target_checkpoint="", returned=(900, 7, 9))
    Journal(path, sequence_length=100).append(returned)
    with pytest.raises(JournalError, match=r"with data.sequence_length=100"):
        Journal(path, sequence_length=200).read()
