"""A snapshot in host memory that is put back gives the same training, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from engine_names import kind_and_stage

ENGINES = (
    ("single", 1),
    ("ddp", 2),
    ("fsdp", 1),
    ("fsdp", 2),
    ("deepspeed-zero1", 1),
    ("deepspeed-zero1", 2),
    ("deepspeed-zero2", 2),
    ("deepspeed-zero3", 1),
    ("deepspeed-zero3", 2),
)
TORCH_ENGINES = ENGINES[:4]

Ask = Callable[..., list[dict[str, Any]]]
every_engine = pytest.mark.parametrize(("engine", "num_ranks"), ENGINES)
every_torch_engine = pytest.mark.parametrize(("engine", "num_ranks"), TORCH_ENGINES)
every_precision = pytest.mark.parametrize("precision", ["fp32", "bf16"])


def answers(ask: Ask, engine: str, num_ranks: int, precision: str) -> list[dict[str, Any]]:
    name = f"snapshots-{engine}-{num_ranks}-{precision}"
    arguments = (*kind_and_stage(engine), precision)
    return ask("snapshot_tasks:snapshots", name, num_ranks, *arguments)


@every_precision
@every_engine
def test_same_steps_after_a_restore_are_bit_equal(
    engine: str, num_ranks: int, precision: str, ask: Ask
) -> None:
    for rank in answers(ask, engine, num_ranks, precision):
        for label in ("once", "twice"):
            assert rank[label]["digest"], "the state is that of the snapshot"
            assert rank[label]["steps"], "losses, norms and the state after them"


@every_precision
@every_engine
def test_one_rank_alone_can_take_and_restore_a_snapshot(
    engine: str, num_ranks: int, precision: str, ask: Ask
) -> None:
    for rank in answers(ask, engine, num_ranks, precision):
        assert rank["last"], "the ranks are still in step, and where they were"


@every_precision
@every_engine
def test_snapshot_before_the_first_step_restores_the_start(
    engine: str, num_ranks: int, precision: str, ask: Ask
) -> None:
    for rank in answers(ask, engine, num_ranks, precision):
        assert rank["fresh"]


@every_precision
@every_engine
def test_evaluation_after_a_restore_sees_the_restored_parameters(
    engine: str, num_ranks: int, precision: str, ask: Ask
) -> None:
    for rank in answers(ask, engine, num_ranks, precision):
        assert rank["evaluation_differs"] and rank["evaluation_is_same"]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_fsdp_holds_no_whole_parameters_after_an_evaluation(num_ranks: int, ask: Ask) -> None:
    for rank in answers(ask, "fsdp", num_ranks, "fp32"):
        assert rank["holds_parts"]


@every_precision
@every_engine
def test_restore_forgets_the_sample_losses(
    engine: str, num_ranks: int, precision: str, ask: Ask
) -> None:
    for rank in answers(ask, engine, num_ranks, precision):
        assert rank["once"]["kept"] == []


@every_precision
@every_engine
def test_ring_writes_again_into_the_buffers_it_has(
    engine: str, num_ranks: int, precision: str, ask: Ask
) -> None:
    for rank in answers(ask, engine, num_ranks, precision):
        assert rank["reuses"] and rank["is_sized"]


@every_precision
@every_engine
def test_restore_heals_a_state_of_nothing_but_nan(
    engine: str, num_ranks: int, precision: str, ask: Ask
) -> None:
    for rank in answers(ask, engine, num_ranks, precision):
        assert rank["healed"] == [True, True, True]


@every_precision
@every_engine
def test_flipped_bit_is_refused_before_anything_changes(
    engine: str, num_ranks: int, precision: str, ask: Ask
) -> None:
    for rank in answers(ask, engine, num_ranks, precision):
        refused = rank["refused"]
        assert len(refused["messages"]) == refused["num_flipped"]
        for tensor, message in refused["messages"].items():
            assert message.startswith(f"{tensor} changed in host memory: its checksum is ")
            assert "go back to another snapshot or to a checkpoint" in message
        assert refused["is_untouched"]
        assert refused["then_restores"], "the bit is back: so is the snapshot"


@every_precision
def test_zero3_that_keeps_no_parameter_gathered_goes_back_bit_for_bit(
    precision: str, ask: Ask
) -> None:
    """At this size all parameters would stay gathered between steps, at a real one few do."""
    settings = json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}})
    arguments = (*kind_and_stage("deepspeed-zero3"), precision, settings)
    for rank in ask("snapshot_tasks:snapshots", f"released-{precision}", 2, *arguments):
        assert rank["once"] == rank["twice"] == {"digest": True, "kept": [], "steps": True}
        assert rank["evaluation_differs"] and rank["evaluation_is_same"]
        assert rank["fresh"] and rank["reuses"] and rank["last"]
        assert rank["healed"] == [True, True, True]


@pytest.mark.parametrize(
    ("settings", "obstacle"),
    [
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            "engine.deepspeed.zero_optimization.offload_optimizer",
        ),
        ({"data_types": {"grad_accum_dtype": "fp32"}}, "DeepSpeed's optimizer BF16_Optimizer"),
    ],
    ids=["offload", "another_optimizer"],
)
def test_deepspeed_says_what_rules_snapshots_out(
    settings: dict[str, Any], obstacle: str, ask: Ask
) -> None:
    kind_and_stage("deepspeed-zero1")
    name = f"unsupported-{next(iter(settings))}"
    for rank in ask("snapshot_tasks:unsupported", name, 1, json.dumps(settings)):
        assert rank["can_snapshot"] is False and rank["state_bytes"] == 0
        expected = f"{obstacle}: it keeps state where a snapshot in host memory would miss it"
        assert expected in rank["error"]


@every_torch_engine
def test_restore_heals_a_nan_update(engine: str, num_ranks: int, ask: Ask) -> None:
    name = f"nan-update-{engine}-{num_ranks}"
    for rank in ask("snapshot_tasks:nan_update", name, num_ranks, engine):
        assert rank["is_broken"] and rank["is_healed"]


@every_torch_engine
def test_digest_tells_executions_that_differ_in_one_bit_of_one_rank(
    engine: str, num_ranks: int, ask: Ask
) -> None:
    ranks = ask("snapshot_tasks:digests", f"digests-{engine}-{num_ranks}", num_ranks, engine)
    for rank in ranks:
        assert rank["digests"][0] == rank["digests"][1]
    assert ranks[-1]["digests"][0] != ranks[-1]["digests"][2]


@every_torch_engine
def test_snapshot_of_another_model_is_refused(engine: str, num_ranks: int, ask: Ask) -> None:
    name = f"digests-{engine}-{num_ranks}"
    for rank in ask("snapshot_tasks:digests", name, num_ranks, engine):
        assert "not the state of this engine; restore it in the engine that" in rank["error"]
        assert rank["is_untouched"]
