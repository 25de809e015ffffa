"""A decoder-only Transformer whose parts are chosen by config: Falcon's, LLaMA's, and between.

Shapes: B batch, T sequence, K documents at most in a row, D hidden, C head size, V vocabulary.
Owns the forward pass and the loss; parameters are made empty and filled by `init.py`, so a model
of any size can be built on the meta device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor, nn

from train.models.attention import Attention, document_mask, locate_documents, rotary_tables
from train.settings import Activation, ModelSettings, Norm

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def make_norm(settings: ModelSettings) -> nn.Module:
    """Return one normalisation layer over D."""
    if settings.norm is Norm.RMSNORM:
        return nn.RMSNorm(settings.hidden_size, eps=settings.norm_epsilon)
    return nn.LayerNorm(settings.hidden_size, eps=settings.norm_epsilon)


class Mlp(nn.Module):
    """The feed-forward part: GELU, or SwiGLU (Shazeer, arXiv 2002.05202)."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        width = round(settings.hidden_size * settings.mlp_multiple)
        self.is_gated = settings.activation is Activation.SWIGLU
        up_width = 2 * width if self.is_gated else width
        self.up = nn.Linear(settings.hidden_size, up_width, bias=settings.has_bias)
        self.down = nn.Linear(width, settings.hidden_size, bias=settings.has_bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the MLP output, [B, T, D]."""
        hidden = self.up(x_BTD)
        if self.is_gated:
            gate, value = hidden.chunk(2, dim=-1)
            hidden = F.silu(gate) * value
        else:
            hidden = F.gelu(hidden)
        out: Tensor = self.down(hidden)
        return out


class Block(nn.Module):
    """One layer, parallel (one or two norms, as Falcon) or sequential (two, as LLaMA)."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.is_parallel = settings.is_parallel
        self.attention_norm = make_norm(settings)
        self.mlp_norm = make_norm(settings) if settings.num_block_norms == 2 else None
        self.attention = Attention(settings)
        self.mlp = Mlp(settings)

    def forward(
        self, x_BTD: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | BlockMask | None = None
    ) -> Tensor:
        """Return the residual stream after this layer, [B, T, D]."""
        normed = self.attention_norm(x_BTD)
        attended = self.attention(normed, cos, sin, mask)
        if self.is_parallel:
            mlp_input = normed if self.mlp_norm is None else self.mlp_norm(x_BTD)
            parallel: Tensor = x_BTD + attended + self.mlp(mlp_input)
            return parallel
        assert self.mlp_norm is not None, "a sequential block has two norms; config checks it"
        x_BTD = x_BTD + attended
        sequential: Tensor = x_BTD + self.mlp(self.mlp_norm(x_BTD))
        return sequential


class Decoder(nn.Module):
    """The language model; `forward` returns sums of losses, so any split of a batch adds up."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.settings = settings
        self.embedding = nn.Embedding(settings.vocab_size, settings.hidden_size)
        self.blocks = nn.ModuleList(Block(settings) for _ in range(settings.num_layers))
        self.norm = make_norm(settings)
        self.head = (
            None
            if settings.has_tied_embeddings
            else nn.Linear(settings.hidden_size, settings.vocab_size, bias=False)
        )

    def forward(
        self,
        tokens_BT1: Tensor,
        starts_BK: Tensor | None = None,
        lengths_B: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return each sample's summed cross-entropy in nats, and the summed log(Z)^2 of all.

        `tokens_BT1`: int64 [B, T + 1]; position t predicts token t + 1. The results are fp32, [B]
        and a scalar. Source of the second: PaLM, arXiv 2204.02311, section 5 (auxiliary z-loss).

        `starts_BK`: int32, the columns where documents begin (see `DocumentLayout`): none sees
        another. `lengths_B`: int32, how many of a row's tokens are text: neither result has a part
        of what would predict the padding behind it.
        """
        logits_BTV = self.logits(tokens_BT1[:, :-1], starts_BK, lengths_B).float()
        log_z_BT = torch.logsumexp(logits_BTV, dim=-1)
        targets_BT1 = tokens_BT1[:, 1:, None]
        losses_BT = log_z_BT - logits_BTV.gather(-1, targets_BT1).squeeze(-1)
        if lengths_B is not None:
            columns_T = torch.arange(losses_BT.shape[1], device=losses_BT.device)
            is_prediction_BT = columns_T < lengths_B[:, None] - 1
            # Not a product: a padding's loss that is no number would pass through it.
            losses_BT = torch.where(is_prediction_BT, losses_BT, 0.0)
            log_z_BT = torch.where(is_prediction_BT, log_z_BT, 0.0)
        return losses_BT.sum(dim=1), log_z_BT.square().sum()

    def logits(
        self,
        tokens_BT: Tensor,
        starts_BK: Tensor | None = None,
        lengths_B: Tensor | None = None,
    ) -> Tensor:
        """Return the logits, [B, T, V]."""
        x_BTD = self.embedding(tokens_BT)
        head_size = self.settings.hidden_size // self.settings.num_heads
        num_positions = tokens_BT.shape[1]
        cos, sin = rotary_tables(num_positions, head_size, self.settings.rope_theta, x_BTD.device)
        mask = None
        if starts_BK is not None:
            documents_BT, positions_BT = locate_documents(starts_BK, lengths_B, num_positions)
            cos, sin = cos[positions_BT][:, None], sin[positions_BT][:, None]
            mask = document_mask(documents_BT, head_size)
        for block in self.blocks:
            x_BTD = block(x_BTD, cos, sin, mask)
        x_BTD = self.norm(x_BTD)
        if self.head is None:
            return F.linear(x_BTD, self.embedding.weight)
        logits: Tensor = self.head(x_BTD)
        return logits


def num_parameters(model: nn.Module) -> int:
    """Return how many distinct parameters a model has (tied ones count once)."""
    return sum(parameter.numel() for parameter in model.parameters())


def flops_per_token(settings: ModelSettings, sequence_length: int, parameters: int) -> float:
    """Return the arithmetic of one training token, forward and backward.

    6 N + 12 L D T, with the embedding counted only where it is also the head.
    Source: PaLM, arXiv 2204.02311, appendix B, the convention of published MFU figures.
    """
    if not settings.has_tied_embeddings:
        parameters -= settings.vocab_size * settings.hidden_size
    attention = 12 * settings.num_layers * settings.hidden_size * sequence_length
    return 6.0 * parameters + attention
