"""A decoder-only Transformer whose parts are chosen by config: Falcon's, LLaMA's, and between.

Shapes: B batch, T sequence, D hidden, H query heads, K key-value heads, C head size, V vocabulary.
Owns the forward pass and the loss; parameters are made empty and filled by `init.py`, so a model
of any size can be built on the meta device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor, nn

from train.settings import Activation, ModelSettings, Norm


def make_norm(settings: ModelSettings) -> nn.Module:
    """Return one normalisation layer over D."""
    if settings.norm is Norm.RMSNORM:
        return nn.RMSNorm(settings.hidden_size, eps=settings.norm_epsilon)
    return nn.LayerNorm(settings.hidden_size, eps=settings.norm_epsilon)


def rotary_tables(
    length: int, head_size: int, theta: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines, each [T, C], fp32.

    Source: Su et al., RoFormer, arXiv 2104.09864, equation 34, halves instead of pairs.
    """
    exponents = torch.arange(0, head_size, 2, dtype=torch.float32, device=device) / head_size
    positions = torch.arange(length, dtype=torch.float32, device=device)
    angles_TC = torch.outer(positions, theta**-exponents).repeat(1, 2)
    return angles_TC.cos(), angles_TC.sin()


def rotate(x_BHTC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    """Turn each head's vectors by their position's angles."""
    first, second = x_BHTC.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x_BHTC * cos_TC + turned * sin_TC).to(x_BHTC.dtype)


class Attention(nn.Module):
    """Causal self-attention with K key-value heads shared among H query heads.

    Source: Shazeer, arXiv 1911.02150 (multi-query); Ainslie et al., arXiv 2305.13245 (grouped).
    """

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.num_heads = settings.num_heads
        self.num_kv_heads = settings.num_kv_heads
        self.head_size = settings.hidden_size // settings.num_heads
        width = (self.num_heads + 2 * self.num_kv_heads) * self.head_size
        self.qkv = nn.Linear(settings.hidden_size, width, bias=settings.has_bias)
        self.out = nn.Linear(settings.hidden_size, settings.hidden_size, bias=settings.has_bias)

    def forward(self, x_BTD: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
        """Return the attention output, [B, T, D]."""
        B, T, D = x_BTD.shape
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        parts = self.qkv(x_BTD).view(B, T, sum(heads), self.head_size).split(heads, dim=2)
        q_BHTC, k_BKTC, v_BKTC = (part.transpose(1, 2) for part in parts)
        q_BHTC, k_BKTC = rotate(q_BHTC, cos_TC, sin_TC), rotate(k_BKTC, cos_TC, sin_TC)
        out_BHTC = F.scaled_dot_product_attention(
            q_BHTC, k_BKTC, v_BKTC, is_causal=True, enable_gqa=self.num_kv_heads < self.num_heads
        )
        out: Tensor = self.out(out_BHTC.transpose(1, 2).reshape(B, T, D))
        return out


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

    def forward(self, x_BTD: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
        """Return the residual stream after this layer, [B, T, D]."""
        normed = self.attention_norm(x_BTD)
        attended = self.attention(normed, cos_TC, sin_TC)
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

    def forward(self, tokens_BT1: Tensor) -> tuple[Tensor, Tensor]:
        """Return each sample's summed cross-entropy in nats, and the summed log(Z)^2 of all.

        `tokens_BT1`: int64 [B, T + 1]; position t predicts token t + 1. The results are fp32, [B]
        and a scalar. Source of the second: PaLM, arXiv 2204.02311, section 5 (auxiliary z-loss).
        """
        logits_BTV = self.logits(tokens_BT1[:, :-1]).float()
        log_z_BT = torch.logsumexp(logits_BTV, dim=-1)
        targets_BT1 = tokens_BT1[:, 1:, None]
        target_logits_BT = logits_BTV.gather(-1, targets_BT1).squeeze(-1)
        return (log_z_BT - target_logits_BT).sum(dim=1), log_z_BT.square().sum()

    def logits(self, tokens_BT: Tensor) -> Tensor:
        """Return the logits, [B, T, V]."""
        x_BTD = self.embedding(tokens_BT)
        head_size = self.settings.hidden_size // self.settings.num_heads
        cos_TC, sin_TC = rotary_tables(
            tokens_BT.shape[1], head_size, self.settings.rope_theta, x_BTD.device
        )
        for block in self.blocks:
            x_BTD = block(x_BTD, cos_TC, sin_TC)
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
