"""Initialisation that does not depend on how a model is spread."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from train.models.decoder import Decoder
from train.models.init import _fill_rows, initialise
from train.settings import Activation, ModelSettings, Norm

SETTINGS = ModelSettings(
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=1,
    mlp_multiple=4.0,
    vocab_size=700,
    activation=Activation.GELU,
    norm=Norm.LAYERNORM,
    norm_epsilon=1e-5,
    num_block_norms=1,
    is_parallel=True,
    has_bias=True,
    has_tied_embeddings=True,
    rope_theta=10000.0,
    init_std=0.02,
)


def parameters(seed: int, settings: ModelSettings = SETTINGS) -> dict[str, torch.Tensor]:
    model = Decoder(settings)
    initialise(model, settings, seed=seed)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def rows(first: int, stop: int, *, seed: int = 7) -> torch.Tensor:
    local = torch.empty(stop - first, 16)
    _fill_rows(local, first, name="x.weight", std=0.02, seed=seed)
    return local


@pytest.mark.parametrize("cuts", [[350], [1, 256, 257], [255, 256, 512], [100, 100, 699]])
def test_rows_are_the_same_however_they_are_cut(cuts: list[int]) -> None:
    whole = rows(0, 700)
    edges = [0, *cuts, 700]
    parts = [rows(first, stop) for first, stop in itertools.pairwise(edges)]
    assert torch.equal(torch.cat(parts), whole)


def test_rows_are_all_different() -> None:
    assert torch.unique(rows(0, 700), dim=0).shape[0] == 700


def test_same_seed_gives_the_same_model() -> None:
    first, second = parameters(3), parameters(3)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_seeds_give_different_models() -> None:
    first, second = parameters(3), parameters(4)
    assert not torch.equal(first["embedding.weight"], second["embedding.weight"])


def test_equal_shapes_get_different_numbers() -> None:
    model = parameters(3)
    assert not torch.equal(model["blocks.0.mlp.up.weight"], model["blocks.1.mlp.up.weight"])


def test_global_random_state_is_neither_read_nor_moved() -> None:
    model = Decoder(SETTINGS)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    initialise(model, SETTINGS, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    first = model.embedding.weight.detach().clone()
    torch.manual_seed(1)
    initialise(model, SETTINGS, seed=3)
    assert torch.equal(model.embedding.weight, first)


def test_norms_are_ones_and_biases_zeros() -> None:
    for name, parameter in parameters(3).items():
        if parameter.ndim == 1:
            expected = 1.0 if name.endswith("weight") else 0.0
            assert torch.equal(parameter, torch.full_like(parameter, expected)), name


def test_projections_into_the_residual_stream_are_smaller() -> None:
    deep = replace(SETTINGS, num_layers=8)
    model = parameters(3, deep)
    assert model["embedding.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert model["blocks.0.attention.qkv.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    for name in ("blocks.0.attention.out.weight", "blocks.7.mlp.down.weight"):
        assert model[name].std().item() == pytest.approx(0.02 / 4, rel=0.05)
