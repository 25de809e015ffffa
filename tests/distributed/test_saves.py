"""Saves beside training, on real ranks: the same bytes, whoever is slow, whoever fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Ask = Callable[..., list[dict[str, Any]]]
ENGINES = (("single", 1), ("fsdp", 1), ("ddp", 2), ("fsdp", 2))


@pytest.mark.parametrize(("engine", "num_ranks"), ENGINES)
def test_copy_is_written_to_the_same_bytes_while_training_goes_on(
    engine: str, num_ranks: int, ask: Ask
) -> None:
    for rank in ask("save_tasks:both_ways", f"both-ways-{engine}-{num_ranks}", num_ranks, engine):
        at_once, staged = rank["files"]
        assert staged == at_once
        assert any(name.endswith(".distcp") for name in staged)
        assert rank["has_moved"]
        assert rank["is_as_before"]
        assert rank["is_finite"]


@pytest.mark.parametrize(("engine", "num_ranks"), [("single", 1), ("fsdp", 2)])
def test_tensor_that_lies_in_several_slabs_is_put_together(
    engine: str, num_ranks: int, ask: Ask
) -> None:
    name = f"split-{engine}-{num_ranks}"
    for rank in ask("save_tasks:both_ways", name, num_ranks, engine, 1 << 12):
        assert rank["num_split"] > 0
        at_once, staged = rank["files"]
        assert staged == at_once
        assert rank["is_as_before"]


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_rank_that_is_slow_to_write_holds_no_one_up(engine: str, ask: Ask) -> None:
    for rank in ask("save_tasks:held_up", f"held-up-{engine}", 2, engine):
        assert not rank["settled_early"]
        assert rank["problem"] == ""
        assert rank["is_as_before"]


@pytest.mark.parametrize("failing_rank", [0, 1])
def test_write_that_fails_on_one_rank_is_tried_again_and_given_up_by_all(
    failing_rank: int, ask: Ask
) -> None:
    for rank in ask("save_tasks:failing_beside", f"failing-beside-{failing_rank}", 2, failing_rank):
        assert rank["1"] == ""
        assert "No space left on device" in rank["2"]
        assert rank["steps"] == [1]
        assert rank["left"] == ["step-00000001-clock-00000001"]


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_numbers_that_are_not_finite_on_one_rank_are_quarantined_on_all(
    engine: str, ask: Ask
) -> None:
    for rank in ask("save_tasks:broken", f"broken-{engine}", 2, engine):
        assert rank["health"] == "quarantined"
