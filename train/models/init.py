"""Initialisation that does not depend on how a model is spread.

Each parameter is filled in blocks of rows, each block from a generator seeded by (seed, name,
block): a rank makes only the rows that it holds, and all engines start from the same numbers.
Called on all ranks; no collective.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from train.settings import ModelSettings

_ROWS_PER_BLOCK = 256


def initialise(model: nn.Module, settings: ModelSettings, *, seed: int) -> None:
    """Fill all parameters in place: normal(0, init_std) for matrices, ones and zeros for norms.

    Projections that write to the residual stream are divided by sqrt(2 x layers), as in GPT-2
    (Radford et al. 2019, section 2.3).
    """
    residual_scale = (2 * settings.num_layers) ** -0.5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            if parameter.ndim == 1:
                local.fill_(1.0 if name.endswith("weight") else 0.0)
                continue
            is_residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
            std = settings.init_std * (residual_scale if is_residual else 1.0)
            _fill_rows(local, _first_row(parameter), name=name, std=std, seed=seed)


def _first_row(parameter: Tensor) -> int:
    if not isinstance(parameter, DTensor):
        return 0
    _, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    return offset[0]


def _fill_rows(local: Tensor, first_row: int, *, name: str, std: float, seed: int) -> None:
    """Fill `local`, which holds the rows from `first_row` on of the whole parameter."""
    num_rows = local.shape[0]
    if num_rows == 0:
        return
    for block in range(
        first_row // _ROWS_PER_BLOCK, (first_row + num_rows - 1) // _ROWS_PER_BLOCK + 1
    ):
        key = hashlib.sha256(f"{seed}/{name}/{block}".encode()).digest()
        generator = torch.Generator(device=local.device)
        generator.manual_seed(int.from_bytes(key[:8], "little") >> 1)
        values = torch.empty((_ROWS_PER_BLOCK, *local.shape[1:]), device=local.device)
        values.normal_(0.0, std, generator=generator)
        block_start = block * _ROWS_PER_BLOCK
        start = max(first_row, block_start)
        stop = min(first_row + num_rows, block_start + _ROWS_PER_BLOCK)
        local[start - first_row : stop - first_row] = values[
            start - block_start : stop - block_start
        ]
