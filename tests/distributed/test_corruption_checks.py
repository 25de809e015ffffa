"""Checks that disturb nothing, and name the rank whose bits are wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from engine_names import kind_and_stage

Ask = Callable[..., list[dict[str, Any]]]

TENSOR = "blocks.1.mlp.down.weight/parameter"
TOP_OF_EXPONENT, LOWEST = 30, 0


@pytest.mark.parametrize(
    ("engine", "num_ranks", "precision"),
    [
        ("single", 1, "bf16"),
        ("ddp", 2, "fp32"),
        ("ddp", 2, "bf16"),
        ("fsdp", 2, "fp32"),
        ("fsdp", 2, "bf16"),
        ("deepspeed-zero1", 2, "bf16"),
        ("deepspeed-zero3", 2, "fp32"),
    ],
)
def test_checks_at_each_step_change_nothing_and_raise_no_alarm(
    engine: str, num_ranks: int, precision: str, ask: Ask
) -> None:
    name = f"undisturbed-{engine}-{num_ranks}-{precision}"
    arguments = (*kind_and_stage(engine), precision)
    for rank in ask("integrity_tasks:undisturbed", name, num_ranks, *arguments):
        assert set(rank["checked"]["answers"]) == {"Continue"}, rank["checked"]["reasons"]
        assert rank["checked"] == rank["plain"]


def test_rank_of_three_that_holds_another_bit_is_named_with_the_tensor(ask: Ask) -> None:
    ranks = ask("integrity_tasks:replicas", "replicas-3", 3, 1, LOWEST, False)
    assert ranks[0]["answers"] == ranks[1]["answers"] == ranks[2]["answers"]
    assert set(ranks[0]["answers"][:-1]) == {"Continue"}
    reason = ranks[0]["reasons"][-1]
    assert "silent corruption: rank 1 (" in reason
    assert TENSOR in reason and "seen at step 8, equal at step 4" in reason
    assert ranks[0]["suspects"] == 1


def test_two_ranks_are_both_named_if_nothing_speaks_for_one(ask: Ask) -> None:
    ranks = ask("integrity_tasks:replicas", "replicas-2", 2, 1, LOWEST, True)
    reason = ranks[0]["reasons"][-1]
    assert "ranks 0 (" in reason and ", 1 (" in reason and TENSOR in reason
    assert "which of them is not known" in reason


def test_of_two_ranks_the_one_is_named_whose_weight_has_jumped(ask: Ask) -> None:
    ranks = ask("integrity_tasks:replicas", "replicas-2-jump", 2, 1, TOP_OF_EXPONENT, True)
    for rank in ranks:
        assert rank["answers"][-1] == "Rewind"
        assert "silent corruption: rank 1 (" in rank["reasons"][-1]
        assert "it is the likelier one: since step 0" in rank["reasons"][-1]
        assert rank["suspects"] == 1


@pytest.mark.parametrize(("engine", "num_ranks"), [("single", 1), ("ddp", 2), ("fsdp", 2)])
def test_rank_that_computes_otherwise_is_named_with_what_it_was(
    engine: str, num_ranks: int, ask: Ask
) -> None:
    wrong = num_ranks - 1
    for rank in ask("integrity_tasks:wrong_once", f"wrong-{engine}", num_ranks, engine, wrong):
        reasons = {step: why for step, why in enumerate(rank["reasons"], start=1) if why}
        assert all(f"silent corruption: rank {wrong} (" in why for why in reasons.values())
        assert list(reasons) == [4, 6, 8]
        expected = [
            "other losses of its samples and other gradients (",
            "other gradients (",
            "another state after the update (",
        ]
        for (step, why), words in zip(reasons.items(), expected, strict=True):
            assert f"step {step} came out otherwise when it was executed again: {words}" in why
