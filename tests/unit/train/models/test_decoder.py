"""The decoder: published sizes, causality, rotary positions, and the shape of each part."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional

from train.models.attention import Attention, rotary_tables, rotate
from train.models.decoder import Block, Decoder, Mlp, flops_per_token, num_parameters
from train.models.init import initialise
from train.settings import Activation, ModelSettings, Norm, RunConfig

FALCON = ModelSettings(
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=1,
    mlp_multiple=4.0,
    vocab_size=50,
    activation=Activation.GELU,
    norm=Norm.LAYERNORM,
    norm_epsilon=1e-5,
    num_block_norms=1,
    is_parallel=True,
    has_bias=False,
    has_tied_embeddings=True,
    rope_theta=10000.0,
    init_std=0.2,
)
TWO_NORMS = replace(FALCON, num_block_norms=2, num_kv_heads=2)
LLAMA = replace(
    FALCON,
    num_kv_heads=4,
    mlp_multiple=2.667,
    activation=Activation.SWIGLU,
    norm=Norm.RMSNORM,
    num_block_norms=2,
    is_parallel=False,
    has_tied_embeddings=False,
)
BIASED = replace(FALCON, has_bias=True)
FAMILIES = pytest.mark.parametrize(
    "settings", [FALCON, TWO_NORMS, LLAMA, BIASED], ids=["falcon", "two_norms", "llama", "biased"]
)


def make(settings: ModelSettings, *, seed: int = 0) -> Decoder:
    model = Decoder(settings)
    initialise(model, settings, seed=seed)
    return model.eval()


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(0))


# Published sizes.


@pytest.mark.parametrize(
    ("size", "num_in_released_files"),
    [
        ("falcon_7b", 7_217_189_760),
        ("falcon_40b", 41_835_970_560),
        ("falcon_180b", 179_522_565_120),
    ],
)
def test_falcon_has_as_many_parameters_as_published(
    size: str,
    num_in_released_files: int,
    compose_config: Callable[..., tuple[RunConfig, dict[str, Any]]],
) -> None:
    config, _ = compose_config(["+exp=falcon_like", f"model/size={size}"])
    with torch.device("meta"):
        model = Decoder(config.model)
    # The released files hold the tied head a second time.
    head = config.model.vocab_size * config.model.hidden_size
    assert num_parameters(model) + head == num_in_released_files


def test_tied_head_counts_once() -> None:
    untied = replace(FALCON, has_tied_embeddings=False)
    assert num_parameters(Decoder(untied)) - num_parameters(Decoder(FALCON)) == 50 * 32


def test_arithmetic_counts_the_embedding_only_where_it_is_the_head() -> None:
    untied = replace(FALCON, has_tied_embeddings=False)
    same = [
        flops_per_token(settings, 16, num_parameters(Decoder(settings)))
        for settings in (FALCON, untied)
    ]
    assert same[0] == same[1]
    assert same[0] == 6 * num_parameters(Decoder(FALCON)) + 12 * 2 * 32 * 16


# Behaviour of the whole.


@FAMILIES
def test_logits_have_a_score_for_each_token_of_the_vocabulary(settings: ModelSettings) -> None:
    assert make(settings).logits(tokens(3, 7)).shape == (3, 7, 50)


@FAMILIES
def test_future_tokens_do_not_change_earlier_logits(settings: ModelSettings) -> None:
    model, first = make(settings), tokens(2, 12)
    second = first.clone()
    second[:, 8:] = (second[:, 8:] + 1) % 50
    with torch.no_grad():
        before, after = model.logits(first), model.logits(second)
    assert torch.equal(before[:, :8], after[:, :8])
    assert not torch.allclose(before[:, 8:], after[:, 8:])


@FAMILIES
def test_earlier_tokens_change_later_logits(settings: ModelSettings) -> None:
    model, first = make(settings), tokens(1, 12)
    second = first.clone()
    second[:, 0] = (second[:, 0] + 1) % 50
    with torch.no_grad():
        assert not torch.allclose(model.logits(first)[:, -1], model.logits(second)[:, -1])


@FAMILIES
def test_every_parameter_takes_part_in_the_loss(settings: ModelSettings) -> None:
    model = make(settings)
    cross_entropy, _ = model(tokens(2, 9))
    cross_entropy.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_loss_of_a_sample_is_the_sum_of_the_cross_entropies_of_its_next_tokens() -> None:
    model, rows = make(FALCON), tokens(3, 9)
    with torch.no_grad():
        cross_entropy, square_log_z = model(rows)
        logits = model.logits(rows[:, :-1])
    expected = functional.cross_entropy(
        logits.reshape(-1, 50), rows[:, 1:].reshape(-1), reduction="none"
    )
    assert cross_entropy.tolist() == pytest.approx(expected.view(3, 8).sum(1).tolist(), rel=1e-5)
    log_z = torch.logsumexp(logits, dim=-1)
    assert square_log_z.item() == pytest.approx(log_z.square().sum().item(), rel=1e-5)


def test_losses_of_any_split_of_a_batch_add_up() -> None:
    model, rows = make(LLAMA), tokens(6, 9)
    with torch.no_grad():
        whole = model(rows)[0].sum().item()
        parts = sum(model(part)[0].sum().item() for part in rows.split([1, 2, 3]))
    assert parts == pytest.approx(whole, rel=1e-5)


def test_fresh_model_knows_nothing() -> None:
    settings = replace(FALCON, init_std=0.02)
    with torch.no_grad():
        cross_entropy, _ = make(settings)(tokens(8, 33))
    assert cross_entropy.sum().item() / (8 * 32) == pytest.approx(math.log(50), rel=0.05)


# Parts.


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    cos, sin = rotary_tables(64, 16, 10000.0, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 16, generator=generator)
    queries = rotate(query.expand(1, 1, 64, 16), cos, sin)[0, 0]
    keys = rotate(key.expand(1, 1, 64, 16), cos, sin)[0, 0]
    scores = queries @ keys.T
    for distance in (0, 1, 5, 30):
        along = torch.diagonal(scores, -distance)
        assert torch.allclose(along, along[0].expand_as(along), atol=1e-4)
    assert not torch.allclose(scores[10, 5], scores[10, 9], atol=1e-2)


def test_rotation_keeps_lengths_dtype_and_the_first_position() -> None:
    cos, sin = rotary_tables(8, 16, 10000.0, torch.device("cpu"))
    x = torch.randn(1, 2, 8, 16, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, cos, sin)
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1), atol=1e-5)
    assert torch.equal(turned[:, :, 0], x[:, :, 0])
    assert rotate(x.bfloat16(), cos, sin).dtype is torch.bfloat16


def test_multi_query_attention_has_one_key_and_one_value_head() -> None:
    assert Attention(FALCON).qkv.weight.shape == ((4 + 2) * 8, 32)
    assert Attention(TWO_NORMS).qkv.weight.shape == ((4 + 4) * 8, 32)
    assert Attention(LLAMA).qkv.weight.shape == (3 * 32, 32)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_grouped_heads_equal_full_attention_with_repeated_heads(num_kv_heads: int) -> None:
    settings = replace(FALCON, num_kv_heads=num_kv_heads)
    grouped, full = Attention(settings), Attention(replace(FALCON, num_kv_heads=4))
    with torch.no_grad():
        queries, keys, values = grouped.qkv.weight.split(
            [32, num_kv_heads * 8, num_kv_heads * 8], dim=0
        )
        repeated = [
            part.view(num_kv_heads, 8, 32).repeat_interleave(4 // num_kv_heads, 0).reshape(32, 32)
            for part in (keys, values)
        ]
        full.qkv.weight.copy_(torch.cat([queries, *repeated]))
        full.out.weight.copy_(grouped.out.weight)
        x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
        tables = rotary_tables(5, 8, 10000.0, torch.device("cpu"))
        assert torch.allclose(grouped(x, *tables), full(x, *tables), atol=1e-5)


def test_gated_mlp_has_two_ways_up() -> None:
    assert Mlp(FALCON).up.weight.shape == (128, 32)
    width = round(32 * 2.667)
    assert Mlp(LLAMA).up.weight.shape == (2 * width, 32)
    assert Mlp(LLAMA).down.weight.shape == (32, width)


def test_parallel_block_adds_attention_and_mlp_of_one_norm() -> None:
    block = Block(FALCON)
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    tables = rotary_tables(5, 8, 10000.0, torch.device("cpu"))
    normed = block.attention_norm(x)
    expected = x + block.attention(normed, *tables) + block.mlp(normed)
    assert torch.allclose(block(x, *tables), expected, atol=1e-6)
    assert block.mlp_norm is None


def test_sequential_block_feeds_the_mlp_with_what_attention_made() -> None:
    block = Block(LLAMA)
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    tables = rotary_tables(5, 8, 10000.0, torch.device("cpu"))
    attended = x + block.attention(block.attention_norm(x), *tables)
    assert block.mlp_norm is not None
    expected = attended + block.mlp(block.mlp_norm(attended))
    assert torch.allclose(block(x, *tables), expected, atol=1e-6)
