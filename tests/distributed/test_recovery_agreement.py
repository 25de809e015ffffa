"""Two ranks come to the same decision, whichever of them alone knows the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from recovery_tasks import LAST_STEP, OLDER_STEP, TARGET_STEP

Ask = Callable[..., list[dict[str, Any]]]
every_engine = pytest.mark.parametrize("engine", ["ddp", "fsdp"])
BATCH_SAMPLES = 16


def fallback(ask: Ask, engine: str, bad_rank: int, *, is_on_disk: bool) -> list[dict[str, Any]]:
    name = f"fallback-{engine}-{bad_rank}-{is_on_disk}"
    return ask("recovery_tasks:fallback", name, 2, engine, bad_rank, is_on_disk)


def requests(ask: Ask, engine: str) -> list[dict[str, Any]]:
    return ask("recovery_tasks:requests", f"requests-{engine}", 2, engine)


def same(ranks: list[dict[str, Any]], *keys: str) -> Any:
    """Return what all ranks found alike."""
    first, *others = [[rank[key] for key in keys] for rank in ranks]
    for other in others:
        assert other == first
    return first[0] if len(keys) == 1 else first


# Back from memory, and to disk when one rank cannot.


@every_engine
def test_whole_snapshots_are_taken_by_all_ranks(engine: str, ask: Ask) -> None:
    ranks = fallback(ask, engine, -1, is_on_disk=True)
    after = same(ranks, "after")
    assert after["state"]["step"] == TARGET_STEP
    assert after["in_memory"] == [TARGET_STEP]
    assert all(rank["is_as_saved"] for rank in ranks)


@every_engine
@pytest.mark.parametrize("bad_rank", [0, 1])
def test_snapshot_spoilt_on_one_rank_sends_all_ranks_to_the_same_state_on_disk(
    bad_rank: int, engine: str, ask: Ask
) -> None:
    ranks = fallback(ask, engine, bad_rank, is_on_disk=True)
    after = same(ranks, "after")
    assert after["state"]["step"] == TARGET_STEP
    assert after["in_memory"] == [], "given up on all ranks"
    assert [TARGET_STEP, "good"] in after["on_disk"]
    assert all(rank["is_as_saved"] for rank in ranks)


@every_engine
@pytest.mark.parametrize("bad_rank", [0, 1])
def test_snapshot_spoilt_on_one_rank_and_nowhere_else_sends_all_ranks_to_an_older_state(
    bad_rank: int, engine: str, ask: Ask
) -> None:
    ranks = fallback(ask, engine, bad_rank, is_on_disk=False)
    after = same(ranks, "after")
    assert after["state"]["step"] == OLDER_STEP
    assert after["state"]["cursor"] == BATCH_SAMPLES * OLDER_STEP
    assert after["in_memory"] == []
    assert all(rank["is_as_saved"] for rank in ranks)


@every_engine
@pytest.mark.parametrize(
    ("bad_rank", "is_on_disk"), [(-1, True), (0, True), (1, True), (0, False), (1, False)]
)
def test_replay_is_bit_for_bit_what_was_before_from_wherever_it_starts(
    bad_rank: int, is_on_disk: bool, engine: str, ask: Ask
) -> None:
    ranks = fallback(ask, engine, bad_rank, is_on_disk=is_on_disk)
    pairs = same(ranks, "replayed")
    assert len(pairs) == LAST_STEP - same(ranks, "after")["state"]["step"]
    assert all(first == again for first, again in pairs)


@every_engine
def test_records_are_the_same_to_the_millisecond(engine: str, ask: Ask) -> None:
    records = same(fallback(ask, engine, 1, is_on_disk=True), "records")
    assert [record[:2] for record in records] == [["replay", "intent"], ["replay", "done"]]


# What only rank 0 can see.


@every_engine
def test_flag_of_rank_0_reaches_all_ranks_in_the_same_step(engine: str, ask: Ask) -> None:
    flagged = same(requests(ask, engine), "flagged")
    assert flagged == [7], "the first step after the request was seen"


@every_engine
def test_all_ranks_do_what_rank_0_was_asked_for(engine: str, ask: Ask) -> None:
    ranks = requests(ask, engine)
    records = same(ranks, "records")
    skipped, intent, done = records
    assert skipped[:3] == ["skip_ahead", "done", [0, 2 * BATCH_SAMPLES]]
    start = BATCH_SAMPLES * (2 + TARGET_STEP)
    assert intent[:4] == ["rewind", "intent", [start, start + BATCH_SAMPLES], TARGET_STEP]
    assert done[:4] == ["rewind", "done", [start, start + BATCH_SAMPLES], TARGET_STEP]
    after = same(ranks, "after")
    assert after["state"]["step"] == LAST_STEP
    assert after["state"]["rewinds"] == 1
    assert after["ledger"] == [[0, 2 * BATCH_SAMPLES], [start, start + BATCH_SAMPLES]]


@every_engine
def test_all_ranks_share_the_samples_and_agree_on_the_losses(engine: str, ask: Ask) -> None:
    ranks = requests(ask, engine)
    losses = same(ranks, "losses")
    assert [clock for clock, _ in losses] == list(range(1, 12))
    first, second = [rank["taken"] for rank in ranks]
    assert len(first) == len(second) == 11 * BATCH_SAMPLES // 2
    assert set(first).isdisjoint(second)
    assert set(range(2 * BATCH_SAMPLES)).isdisjoint({*first, *second})


@every_engine
def test_only_rank_0_answers(engine: str, ask: Ask) -> None:
    main, other = requests(ask, engine)
    assert main["answers"] == ["a.json", "b.json", "live.json"]
    assert main["waiting"] == other["waiting"] == other["answers"] == []


@every_engine
def test_journal_that_rank_0_cannot_write_ends_all_ranks_before_anything_is_done(
    engine: str, ask: Ask
) -> None:
    name = f"unwritable-{engine}"
    for rank in ask("recovery_tasks:unwritable_journal", name, 2, engine):
        assert "cannot be written (No space left on device)" in rank["error"]
        assert rank["is_untouched"]
        assert rank["records"] == []
