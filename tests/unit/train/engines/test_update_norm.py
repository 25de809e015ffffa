"""The size of AdamW's last step, from its state."""

from __future__ import annotations

import math

import pytest
import torch

from train.engines import update_norm as update_norm_module
from train.engines.optimizer import materialise_state
from train.engines.update_norm import UpdateNorm

SHAPES = ((5, 7), (3,), (0, 4), (64, 33), (1,))


def optimizer_of(weight_decay: float = 0.0) -> torch.optim.AdamW:
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(*s, generator=generator)) for s in SHAPES]
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    vectors = [parameter for parameter in parameters if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, eps=1e-3, weight_decay=0.0, fused=True)
    materialise_state(optimizer, parameters)
    return optimizer


def step(optimizer: torch.optim.AdamW, seed: int, *, lr: float) -> float:
    """Take one step and return the size of the change."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    before = [parameter.detach().clone() for parameter in parameters]
    for group in optimizer.param_groups:
        group["lr"] = lr
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator) * 1e-3
    optimizer.step()
    changes = [(new.detach() - old).double() for new, old in zip(parameters, before, strict=True)]
    return math.sqrt(sum(float(change.square().sum()) for change in changes))


def read(optimizer: torch.optim.AdamW) -> float:
    return math.sqrt(UpdateNorm(optimizer).local_square().item())


def test_fresh_optimizer_has_made_no_update() -> None:
    assert read(optimizer_of()) == 0.0


def test_norm_is_that_of_the_last_change() -> None:
    optimizer = optimizer_of()
    for number in range(5):
        # Small gradients beside epsilon, so that epsilon and both corrections matter.
        assert read(optimizer) != (changed := step(optimizer, number, lr=1e-2 * (number + 1)))
        assert read(optimizer) == pytest.approx(changed, rel=1e-4)


def test_weight_decay_is_left_out() -> None:
    plain, decaying = optimizer_of(), optimizer_of(weight_decay=0.5)
    plain_change, decaying_change = step(plain, 0, lr=0.1), step(decaying, 0, lr=0.1)
    assert decaying_change > 1.5 * plain_change
    assert read(decaying) == read(plain)


def test_one_reader_follows_the_optimizer_from_step_to_step() -> None:
    optimizer = optimizer_of()
    reader = UpdateNorm(optimizer)
    for number in range(3):
        changed = step(optimizer, number, lr=0.1)
        assert math.sqrt(reader.local_square().item()) == pytest.approx(changed, rel=1e-4)


@pytest.mark.parametrize("numel", [1, 10, 100, 1000])
def test_chunks_change_nothing_but_the_rounding(
    numel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = optimizer_of()
    step(optimizer, 0, lr=0.1)
    whole = read(optimizer)
    monkeypatch.setattr(update_norm_module, "_CHUNK_NUMEL_CPU", numel)
    reader = UpdateNorm(optimizer)
    assert max(sum(len(piece) for piece in firsts) for firsts, _ in reader._chunks) <= numel
    assert math.sqrt(reader.local_square().item()) == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("moment", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_moment_makes_no_sane_number(moment: str, value: float) -> None:
    optimizer = optimizer_of()
    step(optimizer, 0, lr=0.1)
    first = optimizer.param_groups[0]["params"][0]
    optimizer.state[first][moment][0, 0] = value
    found = read(optimizer)
    if moment == "exp_avg" or math.isnan(value):
        assert found == math.inf
    else:
        assert math.isfinite(found), "an infinite second moment stops its weight: a step of 0"
