"""Documents told apart on a GPU: FlexAttention equals the mask, and the host waits for nothing."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import Launch

from train.data.layout import DocumentLayout
from train.engines.staging import host_buffer, stage, to_device
from train.models import decoder
from train.models.attention import boolean_mask, can_use_flex
from train.models.decoder import Decoder
from train.models.init import initialise
from train.settings import Activation, ModelSettings, Norm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA"),
]

T = 300  # the last block is ragged
SETTINGS = ModelSettings(
    hidden_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
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
    init_std=0.1,
)
ROWS = np.random.default_rng(0).integers(0, 50, (3, T + 1)).astype(np.uint16)
LAYOUT = DocumentLayout(
    starts=np.array([[0, 10, 129, 200], [0, 301, 301, 301], [0, 1, 2, 128]], dtype=np.int32),
    lengths=np.array([301, 170, 250], dtype=np.int32),
)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def document_tasks() -> Iterator[Any]:
    """Return the tasks of tests/distributed."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "distributed"))
    try:
        import document_tasks

        yield document_tasks
    finally:
        sys.path.pop(0)


def losses_and_gradients(
    settings: ModelSettings, device: torch.device, dtype: torch.dtype, layout: DocumentLayout
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model = Decoder(settings).to(device)
    initialise(model, settings, seed=0)
    with torch.autocast("cuda", torch.bfloat16, enabled=dtype is torch.bfloat16):
        losses, _ = model(*stage(ROWS[: len(layout.lengths)], layout, device))  # type: ignore[arg-type]
    (losses.sum() / 700).backward()
    return losses.detach(), {
        name: parameter.grad
        for name, parameter in model.named_parameters()  # type: ignore[misc]
    }


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 3e-2)], ids=["fp32", "bf16"]
)
def test_flex_attention_equals_the_mask_forward_and_backward(
    num_kv_heads: int,
    dtype: torch.dtype,
    tolerance: float,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert can_use_flex(device, 32, T)
    settings = replace(SETTINGS, num_kv_heads=num_kv_heads)
    losses, gradients = losses_and_gradients(settings, device, dtype, LAYOUT)
    monkeypatch.setattr(decoder, "document_mask", lambda documents, size: boolean_mask(documents))
    expected, expected_gradients = losses_and_gradients(settings, device, dtype, LAYOUT)
    torch.testing.assert_close(losses, expected, rtol=tolerance, atol=0)
    for name, gradient in gradients.items():
        scale = float(expected_gradients[name].abs().max())
        torch.testing.assert_close(
            gradient, expected_gradients[name], rtol=0, atol=tolerance * scale, msg=name
        )


def test_other_documents_compile_nothing_anew(device: torch.device) -> None:
    from torch._dynamo.utils import counters

    losses_and_gradients(SETTINGS, device, torch.float32, LAYOUT)
    before = counters["stats"]["unique_graphs"]
    assert LAYOUT.starts is not None
    other = DocumentLayout(starts=LAYOUT.starts[:, :2], lengths=LAYOUT.lengths)
    losses_and_gradients(SETTINGS, device, torch.float32, other)
    assert counters["stats"]["unique_graphs"] == before


def test_pinned_buffer_gives_the_same_rows_without_another_copy(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = host_buffer((5, T + 1), np.uint16, device)
    buffer[:3] = ROWS
    assert torch.from_numpy(buffer).is_pinned() and torch.from_numpy(buffer[1:3]).is_pinned()
    expected = stage(ROWS, LAYOUT, device)

    def refuse(tensor: torch.Tensor) -> torch.Tensor:
        raise AssertionError("it is pinned")

    monkeypatch.setattr(torch.Tensor, "pin_memory", refuse)
    assert to_device(buffer, device).dtype is torch.uint16
    assert torch.equal(stage(buffer[:3], None, device).tokens, expected.tokens)
    with pytest.raises(AssertionError, match="it is pinned"):
        to_device(ROWS, device)


@pytest.mark.parametrize("sequence_length", [64, T], ids=["mask", "flex"])
def test_step_with_documents_makes_the_host_wait_for_nothing(
    sequence_length: int, tmp_path: Path, document_tasks: Any
) -> None:
    arguments = (str(tmp_path), "isolated", sequence_length)
    launch = Launch(document_tasks.isolated_on_gpu, *arguments, log=tmp_path / "output")
    assert launch.wait() == (0,), launch.output()
    found: dict[str, Any] = json.loads((tmp_path / "isolated.0.json").read_text())
    assert len(found["losses"]) == 4 and all(map(math.isfinite, found["losses"]))
    assert math.isfinite(found["evaluation"])


def test_steps_with_documents_are_the_same_bits_again(tmp_path: Path, document_tasks: Any) -> None:
    launch = Launch(
        document_tasks.isolated_twice_on_gpu, str(tmp_path), "twice", T, log=tmp_path / "output"
    )
    assert launch.wait() == (0,), launch.output()
    first, second = json.loads((tmp_path / "twice.0.json").read_text())["digests"]
    assert first == second
