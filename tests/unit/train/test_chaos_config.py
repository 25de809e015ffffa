"""What a fault may be asked to do: each refusal names its key, and the defaults hold everywhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from train.amounts import AmountUnit
from train.config import parse_config
from train.errors import ConfigError
from train.settings import ChaosKind, RunConfig

CONF = Path(__file__).resolve().parents[3] / "conf"
SIZES = sorted(path.stem for path in (CONF / "model" / "size").glob("*.yaml"))
KINDS = [kind for kind in ChaosKind if kind is not ChaosKind.NONE]
FAULTS_OF_STEPS = [kind for kind in KINDS if kind not in ("bad_data", "level_shift")]
ComposeNode = Callable[..., dict[str, Any]]
ComposeConfig = Callable[..., tuple[RunConfig, dict[str, Any]]]


def problems(node: dict[str, Any], world_size: int = 1) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        parse_config(node, world_size=world_size)
    return caught.value.problems


def test_there_is_a_file_for_each_kind_of_fault() -> None:
    files = {path.stem for path in (CONF / "chaos").glob("*.yaml")}
    assert files == {str(kind) for kind in ChaosKind}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_fault_strikes_within_the_run_at_each_size(
    kind: ChaosKind, size: str, compose_config: ComposeConfig
) -> None:
    config, _ = compose_config(["+exp=falcon_like", f"model/size={size}", f"chaos={kind}"])
    chaos = config.chaos
    assert chaos.kind is kind
    assert chaos.start.unit is not AmountUnit.TOKENS
    assert config.checkpoint.interval_steps < chaos.start.value < config.run.steps
    assert chaos.start.value + chaos.length.value <= config.run.steps


def test_nan_lasts_no_longer_than_one_attempt_unless_asked_for(
    compose_config: ComposeConfig,
) -> None:
    """The size's length is meant for data; as many steps of NaN would wear the ladder out."""
    config, _ = compose_config(["chaos=nan_on_one_rank"])
    assert config.chaos.length.value <= config.recovery.max_vetoes_in_a_row
    config, _ = compose_config(["chaos=nan_on_one_rank", "chaos.length=9 steps"])
    assert config.chaos.length.value == 9


@pytest.mark.parametrize("kind", FAULTS_OF_STEPS)
@pytest.mark.parametrize("key", ["chaos.start", "chaos.length"])
def test_fault_of_steps_takes_no_tokens(
    key: str, kind: ChaosKind, compose_node: ComposeNode
) -> None:
    node = compose_node([f"chaos={kind}", f"{key}=5k tokens"])
    assert problems(node) == (
        f'{key}=5,000 tokens: chaos={kind} strikes at a step, not at data; give "100 steps"',
    )


@pytest.mark.parametrize("kind", ["bad_data", "level_shift"])
def test_fault_of_the_data_takes_tokens(kind: str, compose_config: ComposeConfig) -> None:
    config, _ = compose_config([f"chaos={kind}", "chaos.start=5k tokens"])
    assert config.chaos.start.unit is AmountUnit.TOKENS


@pytest.mark.parametrize("kind", FAULTS_OF_STEPS)
def test_fault_behind_the_end_of_the_run_is_refused(
    kind: ChaosKind, compose_node: ComposeNode
) -> None:
    node = compose_node([f"chaos={kind}", "chaos.start=400 steps"])
    assert problems(node) == (
        "chaos.start=400 steps lies behind the last step, run.steps=400: it would never strike; "
        "set it earlier",
    )


@pytest.mark.parametrize("kind", ["bit_flip", "nan_on_one_rank"])
def test_rank_of_a_fault_must_exist(kind: str, compose_node: ComposeNode) -> None:
    node = compose_node([f"chaos={kind}", "chaos.rank=2"])
    assert problems(node, world_size=2) == (
        "chaos.rank=2 is no rank of 2; use 0 to 1, or start more processes",
    )


def test_bit_of_a_weight_that_deepspeed_keeps_twice_cannot_be_flipped(
    compose_node: ComposeNode,
) -> None:
    node = compose_node(["chaos=bit_flip", "engine=deepspeed", "recovery.veto=off"])
    assert any("bit_flip is impossible with engine=deepspeed" in line for line in problems(node))


@pytest.mark.parametrize("kind", ["lr_shock", "slow_divergence"])
def test_factor_that_changes_nothing_is_refused(kind: str, compose_node: ComposeNode) -> None:
    node = compose_node([f"chaos={kind}", "chaos.factor=1"])
    assert problems(node) == (
        f"chaos.factor=1 changes no learning rate, and chaos.kind={kind} is nothing else; set a "
        "factor, or chaos=none",
    )
