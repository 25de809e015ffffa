"""AdamW as all engines use it: decay on matrices alone, fused, steered by the loop."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from train.settings import OptimSettings

MOMENTS = ("exp_avg", "exp_avg_sq")


def make_optimizer(model: nn.Module, settings: OptimSettings) -> torch.optim.AdamW:
    """Return fused AdamW over `model`; vectors (norms, biases) are not decayed."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.epsilon,
        fused=True,
    )


def materialise_state(optimizer: torch.optim.AdamW, parameters: Iterable[Tensor]) -> None:
    """Make moments and step counters of `parameters` now, at zero, as the first step would.

    torch.distributed.checkpoint needs them to exist, and would make them by a step of its own,
    which leaves the counters at 1: saving before the first step would change the training. A
    snapshot, too, has the same tensors at any step.
    """
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            **{
                moment: torch.zeros_like(parameter, memory_format=torch.preserve_format)
                for moment in MOMENTS
            },
        }
