"""A vetoed update leaves parameters, moments and step counters as they were, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Ask = Callable[..., list[dict[str, Any]]]
every_engine = pytest.mark.parametrize(
    ("engine", "num_ranks"), [("single", 1), ("ddp", 2), ("fsdp", 2)]
)


def answers(ask: Ask, engine: str, num_ranks: int) -> list[dict[str, Any]]:
    return ask("veto", f"veto-{engine}", num_ranks, engine)


@every_engine
@pytest.mark.parametrize("gate", ["loss_gate", "norm_gate"])
def test_step_over_the_gate_changes_nothing_on_any_rank(
    gate: str, engine: str, num_ranks: int, ask: Ask
) -> None:
    found = [rank[gate] for rank in answers(ask, engine, num_ranks)]
    for rank in found:
        assert rank["is_vetoed"] and rank["is_finite"]
        assert rank["changed"] == []
        assert rank == found[0], "all ranks are told the same"


@every_engine
def test_nan_gradient_of_one_parameter_on_one_rank_changes_nothing_on_any_rank(
    engine: str, num_ranks: int, ask: Ask
) -> None:
    for rank in answers(ask, engine, num_ranks):
        found = rank["nan"]
        assert found["is_vetoed"] and not found["is_finite"]
        assert found["loss"] == found["loss"], "the loss itself is a number"
        assert found["grad_norm"] != found["grad_norm"]
        assert found["changed"] == []


@every_engine
def test_step_after_a_veto_is_as_if_the_vetoed_ones_had_never_been(
    engine: str, num_ranks: int, ask: Ask
) -> None:
    for rank in answers(ask, engine, num_ranks):
        clean = rank["clean"]
        assert not clean["is_vetoed"] and clean["is_finite"]
        assert clean["is_as_control"]
        assert clean["num_changed"] == clean["num_tensors"], "the clean step does update"


@every_engine
def test_without_the_veto_the_same_poison_reaches_the_parameters(
    engine: str, num_ranks: int, ask: Ask
) -> None:
    for rank in answers(ask, engine, num_ranks):
        assert not rank["unguarded"]["is_vetoed"]
        assert rank["unguarded"]["is_nan"]


@every_engine
def test_clipping_in_the_fused_step_is_torchs_clipping_and_plain_adamw(
    engine: str, num_ranks: int, ask: Ask
) -> None:
    for rank in ask("clipping", f"clipping-{engine}", num_ranks, engine):
        assert rank["num_clipped"] >= 5, "the limit is reached"
        assert rank["worst_norm"] < 1e-5
        assert rank["worst"] < 1e-6
