"""Faults of steps that are executed twice: what failing hardware does, it does once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from train.amounts import Amount, AmountUnit
from train.chaos import BitFlip, inject_into_engine
from train.distributed import World
from train.engines.build import build_engine
from train.settings import ChaosKind, RunConfig
from train.signals import Gate

ALONE = World(rank=0, size=1, device=torch.device("cpu"))
STRIKES_AT = 2
ComposeConfig = Callable[..., tuple[RunConfig, dict[str, Any]]]


def step(engine: Any, number: int) -> list[str]:
    rows = np.random.default_rng(number).integers(0, 257, (4, 9)).astype(np.uint16)
    vector = engine.step(rows, num_tokens=4 * 8, lr=1e-3, gate=Gate())
    return [repr(value) for value in vector.tolist()]


@pytest.mark.parametrize("kind", [ChaosKind.QUIET_BIT_FLIP, ChaosKind.NAN_ON_ONE_RANK])
def test_fault_strikes_the_first_execution_alone_and_no_later_step(
    kind: ChaosKind, compose_config: ComposeConfig
) -> None:
    config, _ = compose_config(["model.hidden_size=16", "model.num_layers=2", "model.num_heads=2"])
    start, length = Amount(STRIKES_AT, AmountUnit.STEPS), Amount(1, AmountUnit.STEPS)
    config = replace(config, chaos=replace(config.chaos, kind=kind, start=start, length=length))
    plain = build_engine(config, ALONE)
    expected = [step(plain, number) for number in range(5)]
    engine = inject_into_engine(build_engine(config, ALONE), config, ALONE)
    for number in range(5):
        before = engine.snapshot()
        first = step(engine, number)
        engine.undo(before)
        assert (first == expected[number]) is (number != STRIKES_AT)
        assert step(engine, number) == expected[number]
    assert engine.state_digest() == plain.state_digest()
    assert engine.recent_sample_losses() == plain.recent_sample_losses()


def test_quiet_flip_changes_one_weight_by_less_than_its_own_size() -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        model = torch.nn.Linear(8, 8, bias=False)
        before = model.weight.detach().clone()
        BitFlip(model, at_clock=0, seed=seed, is_quiet=True)(0)
        is_changed = model.weight.detach() != before
        assert is_changed.sum() == 1
        change = (model.weight.detach() - before)[is_changed].abs() / before[is_changed].abs()
        assert 0.2 < float(change) < 0.6


def test_quiet_flip_of_half_precision_is_as_quiet() -> None:
    model = torch.nn.Linear(4, 4, bias=False, dtype=torch.bfloat16)
    before = bits_of_half(model)
    BitFlip(model, at_clock=0, seed=0, is_quiet=True)(0)
    assert (bits_of_half(model) ^ before).max() == 1 << 6


def bits_of_half(model: torch.nn.Linear) -> Tensor:
    return model.weight.detach().clone().view(torch.int16)
