"""Causal self-attention with rotary positions, and what tells the documents of a row apart.

Shapes: B batch, T sequence, D hidden, H query heads, K key-value heads, C head size, N blocks of
positions; K in `starts_BK` is the number of documents. Owns which kernel runs: torch's own causal
one where documents are not told apart; else FlexAttention, which skips the blocks between
documents, on a GPU that it supports, and a boolean mask everywhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor, nn

from train.settings import ModelSettings

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# Positions in a block of a BlockMask, torch's default. Shorter sequences would go to a kernel for
# decoding, which takes fewer numbers of heads.
_BLOCK = 128
_FLEX_HEAD_SIZES = range(16, 257)
_FLEX_CAPABILITY = (8, 0)


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


def rotate(x_BHTC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each head's vectors by their position's angles: tables [T, C], or [B, 1, T, C]."""
    first, second = x_BHTC.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x_BHTC * cos + turned * sin).to(x_BHTC.dtype)


def locate_documents(
    starts_BK: Tensor, lengths_B: Tensor | None, num_positions: int
) -> tuple[Tensor, Tensor]:
    """Return each position's document and its position in that document, both int64 [B, T].

    `starts_BK`: int32, the columns where documents begin, the first 0, ascending, T + 1 for none.
    Documents are numbered from 0 in each row; padding, from `lengths_B` on, is one more behind all
    others. No host sync.
    """
    columns_T = torch.arange(num_positions, dtype=torch.int32, device=starts_BK.device)
    columns_BT = columns_T.expand(len(starts_BK), -1)
    documents_BT = torch.searchsorted(starts_BK, columns_BT.contiguous(), right=True) - 1
    firsts_BT = starts_BK.gather(1, documents_BT)
    if lengths_B is not None:
        is_padding_BT = columns_BT >= lengths_B[:, None]
        documents_BT = documents_BT.masked_fill(is_padding_BT, starts_BK.shape[1])
        firsts_BT = torch.where(is_padding_BT, lengths_B[:, None], firsts_BT)
    return documents_BT, (columns_BT - firsts_BT).long()


def document_mask(documents_BT: Tensor, head_size: int) -> Tensor | BlockMask:
    """Return the mask of causal attention inside documents, for `Attention` on this device."""
    if can_use_flex(documents_BT.device, head_size, documents_BT.shape[1]):
        return block_mask(documents_BT)
    return boolean_mask(documents_BT)


def boolean_mask(documents_BT: Tensor) -> Tensor:
    """Return where a query (third dimension) sees a key (last): bool [B, 1, T, T].

    Every position sees itself, so no softmax is over nothing.
    """
    length = documents_BT.shape[1]
    is_same_BTT = documents_BT[:, :, None] == documents_BT[:, None, :]
    is_causal_TT = torch.ones(length, length, dtype=torch.bool, device=documents_BT.device).tril()
    return (is_same_BTT & is_causal_TT)[:, None]


def block_mask(documents_BT: Tensor) -> BlockMask:
    """Return `boolean_mask` as blocks of positions, without making T x T of anything.

    Documents ascend along a row, so the first and the last one of two blocks say whether anything
    between them is seen, and whether all of it is. torch's create_block_mask evaluates all pairs.
    No host sync.
    """
    from torch.nn.attention.flex_attention import BlockMask

    length = documents_BT.shape[1]
    blocks_N = torch.arange(-(-length // _BLOCK), device=documents_BT.device)
    firsts_BN = documents_BT[:, ::_BLOCK]
    lasts_BN = documents_BT[:, ((blocks_N + 1) * _BLOCK - 1).clamp(max=length - 1)]
    is_before_NN = blocks_N[None, :] < blocks_N[:, None]
    is_diagonal_NN = blocks_N[None, :] == blocks_N[:, None]
    is_whole_N = (blocks_N + 1) * _BLOCK <= length
    is_seen_BNN = (lasts_BN[:, None, :] == firsts_BN[:, :, None]) & is_before_NN | is_diagonal_NN
    is_full_BNN = (firsts_BN[:, None, :] == lasts_BN[:, :, None]) & is_before_NN
    is_full_BNN = is_full_BNN & is_whole_N[:, None]
    part = _ordered(is_seen_BNN & ~is_full_BNN)
    full = _ordered(is_full_BNN)

    def is_seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        del head
        return (query >= key) & (documents_BT[batch, query] == documents_BT[batch, key])

    return BlockMask.from_kv_blocks(
        *part, *full, BLOCK_SIZE=_BLOCK, mask_mod=is_seen, seq_lengths=(length, length)
    )


def _ordered(is_chosen_BNN: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many blocks of keys each block of queries has, and which, these first."""
    chosen = is_chosen_BNN[:, None].to(torch.int32)
    order = torch.argsort(chosen, dim=-1, descending=True, stable=True)
    return chosen.sum(dim=-1, dtype=torch.int32), order.to(torch.int32)


@cache
def can_use_flex(device: torch.device, head_size: int, num_positions: int) -> bool:
    """Return whether FlexAttention has kernels for this; on a CPU it has none for backward."""
    if device.type != "cuda" or head_size not in _FLEX_HEAD_SIZES or num_positions < _BLOCK:
        return False
    return (
        find_spec("triton") is not None
        and torch.cuda.get_device_capability(device) >= _FLEX_CAPABILITY
    )


@cache
def _compiled_flex() -> Callable[..., Any]:
    """Return FlexAttention, compiled once for all layers; without that it makes T x T scores."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


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

    def forward(
        self, x_BTD: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | BlockMask | None = None
    ) -> Tensor:
        """Return the attention output, [B, T, D]; without `mask`, each row is one document."""
        B, T, D = x_BTD.shape
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        parts = self.qkv(x_BTD).view(B, T, sum(heads), self.head_size).split(heads, dim=2)
        q_BHTC, k_BKTC, v_BKTC = (part.transpose(1, 2) for part in parts)
        q_BHTC, k_BKTC = rotate(q_BHTC, cos, sin), rotate(k_BKTC, cos, sin)
        if mask is None or isinstance(mask, Tensor):
            attend = partial(F.scaled_dot_product_attention, attn_mask=mask, is_causal=mask is None)
        else:
            attend = partial(_compiled_flex(), block_mask=mask)
        out_BHTC = attend(q_BHTC, k_BKTC, v_BKTC, enable_gqa=self.num_kv_heads < self.num_heads)
        out: Tensor = self.out(out_BHTC.transpose(1, 2).reshape(B, T, D))
        return out
