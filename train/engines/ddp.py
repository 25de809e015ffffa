"""`ddp`: a whole copy of the model on each rank; gradients are averaged while backward runs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch.nn.parallel import DistributedDataParallel

from train.distributed import World
from train.engines.torch_engine import TorchEngine
from train.models.decoder import Decoder


def wrap(model: Decoder, world: World) -> DistributedDataParallel:
    """Return `model` with gradient averaging; a collective."""
    device_ids = [world.device.index] if world.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)


class DdpEngine(TorchEngine):
    """The engine for a model wrapped by `wrap`."""

    has_replicas = True

    def gradient_sync(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Gradients travel in the last backward of a step alone."""
        assert isinstance(self._module, DistributedDataParallel)
        return nullcontext() if is_last else self._module.no_sync()
