"""The account of samples counts what it should, and can find fault."""

from __future__ import annotations

from typing import Any

from chaos.samples import Account, account, lineage, skipped_ranges

SIZES = dict.fromkeys(range(1, 20), 4)


def step(step: int, cursor: int, attempt: int = 0) -> dict[str, Any]:
    return {"step": step, "cursor": cursor, "batch_samples": 4, "attempt": attempt}


def skip(start: int, stop: int, phase: str = "done") -> dict[str, Any]:
    return {"phase": phase, "skip": [start, stop]}


def test_plain_run_has_each_sample_once() -> None:
    assert account([step(1, 4), step(2, 8)], [], SIZES) == Account(
        trained=8, twice=0, skipped=0, in_ledger=0
    )


def test_steps_that_a_restart_takes_again_count_once() -> None:
    metrics = [step(1, 4), step(2, 8), step(3, 12), step(2, 8, 1), step(3, 12, 1)]
    assert [record["attempt"] for record in lineage(metrics)] == [0, 1, 1]
    assert account(metrics, [], SIZES) == Account(trained=12, twice=0, skipped=0, in_ledger=0)


def test_what_the_ledger_skips_is_not_missing() -> None:
    metrics = [step(1, 4), step(2, 8), step(2, 18), step(3, 22)]
    journal = [skip(4, 14, "intent"), skip(4, 14), skip(16, 18, "observed"), skip(0, 0)]
    assert skipped_ranges(journal) == [(4, 14)]
    assert account(metrics, journal, SIZES) == Account(trained=12, twice=0, skipped=0, in_ledger=10)


def test_jump_without_ledger_is_found() -> None:
    assert account([step(1, 4), step(2, 11)], [], SIZES).skipped == 3


def test_step_back_without_rewind_is_found() -> None:
    assert account([step(1, 4), step(2, 6)], [], SIZES).twice == 2


def test_steps_without_a_record_are_taken_from_the_undisturbed_run() -> None:
    assert account([step(1, 4), step(4, 16)], [], SIZES) == Account(
        trained=16, twice=0, skipped=0, in_ledger=0
    )
