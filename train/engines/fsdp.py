"""`fsdp`: FSDP2; each rank holds a part of every parameter, gradient and moment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from train.data.layout import DocumentLayout
from train.distributed import World
from train.engines.torch_engine import TorchEngine
from train.models.decoder import Decoder


def wrap(model: Decoder, world: World, compute_dtype: torch.dtype | None) -> None:
    """Shard `model` in place, block by block; gradients are reduced in fp32."""
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    mesh = world.mesh()
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


class FsdpEngine(TorchEngine):
    """The engine for a model sharded by `wrap`."""

    @contextmanager
    def gradient_sync(self, *, is_last: bool) -> Iterator[None]:
        """Gradients are reduced and scattered in the last backward of a step alone."""
        assert isinstance(self._module, FSDPModule)
        self._module.set_requires_gradient_sync(is_last)
        yield

    def evaluate(
        self, rows: npt.NDArray[np.integer], layout: DocumentLayout | None = None
    ) -> float:
        """See `Engine.evaluate`; between steps, the model holds parts of parameters alone.

        After a forward without a backward, the outermost module would keep its own whole, and the
        next forward would use them as they were, whatever a restore has put into the parts.
        """
        try:
            return super().evaluate(rows, layout)
        finally:
            for module in self.model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
