"""Documents told apart: none sees another, each has its own positions, padding is nothing."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch.nn import functional
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from train.models.attention import (
    block_mask,
    boolean_mask,
    can_use_flex,
    document_mask,
    locate_documents,
)
from train.models.decoder import Decoder
from train.models.init import initialise
from train.settings import Activation, ModelSettings, Norm

PARALLEL = ModelSettings(
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
GROUPED = replace(PARALLEL, num_block_norms=2, num_kv_heads=2)
SEQUENTIAL = replace(
    PARALLEL,
    num_kv_heads=4,
    activation=Activation.SWIGLU,
    norm=Norm.RMSNORM,
    num_block_norms=2,
    is_parallel=False,
    has_tied_embeddings=False,
)
FAMILIES = pytest.mark.parametrize(
    "settings",
    [PARALLEL, GROUPED, SEQUENTIAL, replace(SEQUENTIAL, num_kv_heads=2)],
    ids=["parallel", "grouped", "sequential", "sequential_grouped"],
)
T1 = 24
ROWS = ((5, 9, 1, 9), (24,), (2, 2, 3, 4, 13))  # the lengths of the documents of each row
CPU = torch.device("cpu")


def make(settings: ModelSettings) -> Decoder:
    model = Decoder(settings)
    initialise(model, settings, seed=0)
    return model


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(seed))


def starts_of(rows: Sequence[Sequence[int]], length: int = T1) -> torch.Tensor:
    """Return what `DocumentLayout.starts` is for documents of these lengths."""
    starts = torch.full((len(rows), max(map(len, rows)) + 1), length, dtype=torch.int32)
    for row, lengths in enumerate(rows):
        for number in range(len(lengths)):
            starts[row, number] = sum(lengths[:number])
    return starts


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def gradients(model: Decoder, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in found:  # gradients reach 10
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4)


# Where documents are.


def test_positions_begin_anew_with_each_document() -> None:
    documents, positions = locate_documents(starts_of([[3, 1, 4], [8]], 8), None, 7)
    assert documents.tolist() == [[0, 0, 0, 1, 2, 2, 2], [0] * 7]
    assert positions.tolist() == [[0, 1, 2, 0, 0, 1, 2], [0, 1, 2, 3, 4, 5, 6]]


def test_padding_is_a_document_behind_all_others() -> None:
    documents, positions = locate_documents(starts_of([[3, 5], [8]], 8), int32(5, 8), 7)
    assert documents.tolist() == [[0, 0, 0, 1, 1, 3, 3], [0] * 7]
    assert positions.tolist() == [[0, 1, 2, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5, 6]]


def test_position_sees_itself_and_what_precedes_it_in_its_document() -> None:
    documents, _ = locate_documents(starts_of([[2, 2]], 4), None, 4)
    assert boolean_mask(documents).int().tolist() == [
        [[[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]]
    ]


# Each document alone.


@FAMILIES
def test_documents_of_a_row_are_predicted_as_each_alone(settings: ModelSettings) -> None:
    model, rows = make(settings), tokens(len(ROWS), T1)
    logits = model.logits(rows, starts_of(ROWS))
    together, alone = torch.zeros(()), torch.zeros(())
    for row, lengths in enumerate(ROWS):
        first = 0
        for length in lengths:
            document = rows[row : row + 1, first : first + length]
            expected = model.logits(document)[0]
            found = logits[row, first : first + length]
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            losses = [
                functional.cross_entropy(part[:-1], document[0, 1:], reduction="sum")
                for part in (found, expected)
            ]
            assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
            together, alone = together + losses[0], alone + losses[1]
            first += length
    assert_close(gradients(model, together), gradients(model, alone))


@FAMILIES
def test_loss_of_a_row_is_that_of_its_documents_and_of_the_steps_between(
    settings: ModelSettings,
) -> None:
    model, rows = make(settings), tokens(len(ROWS), T1)
    with torch.no_grad():
        losses, square_log_z = model(rows, starts_of(ROWS))
        for row, lengths in enumerate(ROWS):
            first, expected = 0, 0.0
            for length in lengths:
                # The last token of a document predicts the first of the next one.
                alone = rows[row : row + 1, first : first + length + 1]
                expected += model(alone)[0].item()
                first += length
            assert losses[row].item() == pytest.approx(expected, rel=1e-5)
    log_z = model.logits(rows[:, :-1], starts_of(ROWS)).logsumexp(-1)
    assert square_log_z.item() == pytest.approx(log_z.square().sum().item(), rel=1e-5)


@FAMILIES
@pytest.mark.parametrize("changed", [0, 1, 3])
def test_no_document_sees_another(settings: ModelSettings, changed: int) -> None:
    model, before = make(settings), tokens(1, T1)
    lengths = ROWS[0]
    first = sum(lengths[:changed])
    own = slice(first, first + lengths[changed])
    after = before.clone()
    after[:, own] = (after[:, own] + 1) % 50
    with torch.no_grad():
        logits = [model.logits(rows, starts_of([lengths])) for rows in (before, after)]
    is_other = torch.ones(T1, dtype=torch.bool)
    is_other[own] = False
    assert torch.equal(logits[0][:, is_other], logits[1][:, is_other]), "bit for bit"
    assert not torch.allclose(logits[0][:, own], logits[1][:, own])


def test_documents_see_each_other_unless_told_apart() -> None:
    """The test above can fail."""
    model, before = make(PARALLEL), tokens(1, T1)
    after = before.clone()
    after[:, 0] = (after[:, 0] + 1) % 50
    with torch.no_grad():
        assert not torch.equal(model.logits(before)[:, 14:], model.logits(after)[:, 14:])


def test_rows_of_one_document_are_as_without_a_layout() -> None:
    model, rows = make(GROUPED), tokens(3, T1)
    starts = starts_of([[T1]] * 3)
    with torch.no_grad():
        expected, found = model(rows), model(rows, starts, int32(T1, T1, T1))
        assert torch.equal(model(rows, None, int32(T1, T1, T1))[0], expected[0]), "bit for bit"
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_documents_are_told_apart_in_half_precision() -> None:
    model, rows = make(GROUPED), tokens(len(ROWS), T1)
    with torch.no_grad():
        expected = model(rows, starts_of(ROWS))[0]
        with torch.autocast("cpu", torch.bfloat16):
            found = model(rows, starts_of(ROWS))[0]
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0)


# Padding.


@FAMILIES
@pytest.mark.parametrize("is_isolated", [False, True])
def test_padding_changes_nothing(settings: ModelSettings, is_isolated: bool) -> None:
    model, length = make(settings), 14
    text = tokens(1, length)
    starts = starts_of([(5, 9)]) if is_isolated else None
    expected, expected_z = model(text, None if starts is None else starts_of([(5, 9)], length))
    expected_gradients = gradients(model, expected.sum() + expected_z)
    found = []
    for seed in (1, 2):
        rows = torch.cat([text, tokens(1, T1 - length, seed=seed)], dim=1)
        loss, square_log_z = model(rows, starts, int32(length))
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        assert square_log_z.item() == pytest.approx(expected_z.item(), rel=1e-5)
        assert_close(gradients(model, loss.sum() + square_log_z), expected_gradients)
        found.append((loss.item(), square_log_z.item()))
    assert found[0] == found[1], "whatever stands there"


@pytest.mark.parametrize("length", [0, 1])
def test_row_without_a_prediction_has_no_loss_and_no_gradient(length: int) -> None:
    model = make(PARALLEL)
    losses, square_log_z = model(tokens(1, T1), starts_of([(T1,)]), int32(length))
    assert losses.tolist() == [0.0] and square_log_z.item() == 0.0
    found = gradients(model, losses.sum() + square_log_z)
    assert all(not gradient.any() for gradient in found.values())


def test_padding_that_is_no_number_does_not_reach_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(PARALLEL)
    logits = torch.zeros(1, T1 - 1, 50)
    logits[:, 9:] = torch.nan
    monkeypatch.setattr(model, "logits", lambda *arguments: logits)
    losses, square_log_z = model(tokens(1, T1), None, int32(10))
    assert torch.isfinite(losses).all() and torch.isfinite(square_log_z)
    assert not torch.isfinite(model(tokens(1, T1), None, int32(11))[0]).all()


# Which kernel.


def test_cpu_uses_the_mask() -> None:
    """FlexAttention has no backward there."""
    assert not can_use_flex(CPU, 64, 2048)
    assert document_mask(torch.zeros(1, 256, dtype=torch.int64), 64).shape == (1, 1, 256, 256)


@pytest.mark.parametrize("num_positions", [128, 256, 300, 400])
@pytest.mark.parametrize("is_padded", [False, True])
def test_blocks_are_those_of_the_mask(num_positions: int, is_padded: bool) -> None:
    rows = [(10, 120, 170, 101), (128, 128, 145), (401,), (1, 2, 3, 200, 195)]
    lengths = int32(390, 130, 200, 401) if is_padded else None
    documents, _ = locate_documents(starts_of(rows, 401), lengths, num_positions)
    mask = boolean_mask(documents)

    def is_seen(
        batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        return mask[batch, 0, query, key]

    expected = create_block_mask(
        is_seen, len(rows), None, num_positions, num_positions, device="cpu"
    )
    found = block_mask(documents)
    assert found.shape == expected.shape
    for name in ("kv", "q", "full_kv", "full_q"):
        for kind in ("num_blocks", "indices"):
            attribute = f"{name}_{kind}"
            assert torch.equal(getattr(found, attribute), getattr(expected, attribute)), attribute


def test_flex_attention_over_the_blocks_equals_the_mask() -> None:
    rows = [(10, 120, 170), (300,)]
    documents, _ = locate_documents(starts_of(rows, 300), int32(300, 150), 299)
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(2, 4, 299, 16, generator=generator)
    keys, values = torch.randn(2, 2, 2, 299, 16, generator=generator)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        found = flex_attention(
            queries, keys, values, block_mask=block_mask(documents), enable_gqa=True
        )
    expected = functional.scaled_dot_product_attention(
        queries, keys, values, attn_mask=boolean_mask(documents), enable_gqa=True
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
