"""Every signal of a step, provoked on one rank and told to all, whatever spreads the model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from engine_names import kind_and_stage

ENGINES = (
    ("single", 1),
    ("ddp", 2),
    ("fsdp", 1),
    ("fsdp", 2),
    ("deepspeed-zero1", 2),
    ("deepspeed-zero2", 2),
    ("deepspeed-zero3", 2),
)
TORCH_ENGINES = ENGINES[:4]

Ask = Callable[..., list[dict[str, Any]]]
every_engine = pytest.mark.parametrize(("engine", "num_ranks"), ENGINES)
every_torch_engine = pytest.mark.parametrize(("engine", "num_ranks"), TORCH_ENGINES)


def answers(ask: Ask, engine: str, num_ranks: int) -> list[dict[str, Any]]:
    kind, stage = kind_and_stage(engine)
    return ask("signal_tasks:signals", f"signals-{engine}-{num_ranks}", num_ranks, kind, stage)


def sizes(ask: Ask, engine: str, num_ranks: int) -> list[dict[str, Any]]:
    name = f"update-norms-{engine}-{num_ranks}"
    return ask("signal_tasks:update_norms", name, num_ranks, engine)


@every_engine
def test_step_makes_one_reduce_of_its_own(engine: str, num_ranks: int, ask: Ask) -> None:
    for rank in answers(ask, engine, num_ranks):
        assert rank["num_reduces"] == (1 if num_ranks > 1 else 0)


@every_engine
def test_clean_step_raises_no_alarm(engine: str, num_ranks: int, ask: Ask) -> None:
    for rank in answers(ask, engine, num_ranks):
        for step in ("clean", "after"):
            found = rank[step]
            assert math.isfinite(found["loss_nats"]) and math.isfinite(found["grad_norm"])
            assert found["num_bad_ranks"] == 0 and found["bad_rank"] is None
            assert not found["is_flagged"] and not found["is_vetoed"]


@every_engine
def test_flag_of_one_rank_is_seen_by_all_for_one_step(
    engine: str, num_ranks: int, ask: Ask
) -> None:
    for rank in answers(ask, engine, num_ranks):
        assert rank["flagged"]["is_flagged"]
        assert not rank["flagged"]["is_vetoed"]
        assert not rank["unflagged"]["is_flagged"]


@every_engine
def test_nan_loss_on_one_rank_names_that_rank(engine: str, num_ranks: int, ask: Ask) -> None:
    found = [rank["bad_rank"] for rank in answers(ask, engine, num_ranks)]
    for rank in found:
        assert rank["num_bad_ranks"] == 1
        assert rank["bad_rank"] == num_ranks - 1
        assert math.isnan(rank["loss_nats"])
        assert rank["is_vetoed"], "refused by us or, under DeepSpeed, by itself"


@every_engine
def test_nan_loss_on_all_ranks_names_none_of_several(engine: str, num_ranks: int, ask: Ask) -> None:
    for rank in answers(ask, engine, num_ranks):
        assert rank["bad_ranks"]["num_bad_ranks"] == num_ranks
        assert rank["bad_ranks"]["bad_rank"] == (0 if num_ranks == 1 else None)


@every_torch_engine
def test_nonfinite_share_is_that_of_the_poisoned_tensor(
    engine: str, num_ranks: int, ask: Ask
) -> None:
    for rank in answers(ask, engine, num_ranks):
        assert rank["clean"]["nonfinite_share"] == 0.0
        assert rank["bad_gradient"]["nonfinite_share"] == pytest.approx(rank["share"], rel=1e-12)
        assert rank["bad_rank"]["nonfinite_share"] == 1.0, "a NaN loss spoils every gradient"
        assert rank["bad_gradient"]["num_bad_ranks"] == 0, "the losses were numbers"
        assert math.isfinite(rank["bad_gradient"]["loss_nats"])


@every_torch_engine
def test_norm_of_a_poisoned_group_leaves_those_of_the_others(
    engine: str, num_ranks: int, ask: Ask
) -> None:
    for rank in answers(ask, engine, num_ranks):
        norms = rank["bad_gradient"]["group_norms"]
        bad = [number for number, norm in enumerate(norms) if not math.isfinite(norm)]
        assert bad == [rank["group"]]
        clean = rank["after"]
        squares = sum(norm**2 for norm in clean["group_norms"])
        assert math.sqrt(squares) == pytest.approx(clean["grad_norm"], rel=1e-12)


@pytest.mark.parametrize(("engine", "num_ranks"), ENGINES[4:])
def test_deepspeed_says_what_it_does_not_know(engine: str, num_ranks: int, ask: Ask) -> None:
    for rank in answers(ask, engine, num_ranks):
        for step in ("clean", "flagged", "after"):
            assert rank[step]["update_norm"] is None
            assert rank[step]["nonfinite_share"] is None
            assert rank[step]["group_norms"] == []
        assert not math.isfinite(rank["bad_rank"]["grad_norm"]), "not that of the step before"


@every_engine
def test_sample_losses_average_to_the_reported_loss(engine: str, num_ranks: int, ask: Ask) -> None:
    ranks = [rank["sample_losses"] for rank in answers(ask, engine, num_ranks)]
    for step, loss in enumerate(ranks[0]["losses"]):
        samples = [sample for rank in ranks for sample in rank["recent"][step]]
        assert len(samples) == 8
        assert sum(samples) / 8 == pytest.approx(loss, rel=1e-6)


@every_engine
def test_sample_losses_come_in_row_order(engine: str, num_ranks: int, ask: Ask) -> None:
    for rank in answers(ask, engine, num_ranks):
        found = rank["sample_losses"]
        for recent, alone in zip(found["recent"], found["alone"], strict=True):
            assert recent == pytest.approx(alone, rel=1e-5)


@every_engine
def test_sample_losses_of_the_last_32_steps_are_kept(engine: str, num_ranks: int, ask: Ask) -> None:
    ranks = [rank["sample_losses"] for rank in answers(ask, engine, num_ranks)]
    assert all(rank["num_kept"] == 32 for rank in ranks)
    last = [sample for rank in ranks for sample in rank["last_kept"]]
    assert sum(last) / 8 == pytest.approx(ranks[0]["last_loss"], rel=1e-6)


@every_torch_engine
def test_update_norm_is_the_measured_change_of_the_step_before(
    engine: str, num_ranks: int, ask: Ask
) -> None:
    for rank in sizes(ask, engine, num_ranks):
        assert rank["reported"][0] == 0.0, "there was no update yet"
        assert rank["reported"][1:] == pytest.approx(rank["measured"][:-1], rel=1e-5)
        assert rank["uninterrupted"] == pytest.approx(rank["measured"][-1], rel=1e-5)


@every_torch_engine
def test_update_norm_does_not_depend_on_the_number_of_ranks(
    engine: str, num_ranks: int, ask: Ask
) -> None:
    (single,) = sizes(ask, "single", 1)
    for rank in sizes(ask, engine, num_ranks):
        # Adam's first updates follow the signs of gradients, some of which are next to nothing.
        assert rank["reported"] == pytest.approx(single["reported"], rel=1e-4)


@every_torch_engine
def test_update_norm_after_a_load_is_bit_for_bit_that_of_the_uninterrupted_run(
    engine: str, num_ranks: int, ask: Ask
) -> None:
    for rank in sizes(ask, engine, num_ranks):
        assert rank["loaded"] == rank["uninterrupted"]
        assert rank["num_kept_by_load"] == 0


@every_torch_engine
def test_vetoed_step_leaves_the_last_applied_update_the_last(
    engine: str, num_ranks: int, ask: Ask
) -> None:
    """Its moments are; the learning rate is that of the vetoed step, a tenth higher per step."""
    for rank in sizes(ask, engine, num_ranks):
        assert rank["is_vetoed"]
        assert rank["after_veto"] / rank["uninterrupted"] == pytest.approx(16 / 15, rel=1e-6)


@every_torch_engine
def test_nan_in_a_moment_makes_the_update_norm_infinite(
    engine: str, num_ranks: int, ask: Ask
) -> None:
    for rank in sizes(ask, engine, num_ranks):
        assert rank["broken"] == math.inf
