"""Make the engine that a config asks for."""

from __future__ import annotations

import torch
from torch import nn

from train.distributed import World, resolve_engine
from train.engines import ddp, fsdp
from train.engines.base import Engine
from train.engines.optimizer import make_optimizer, materialise_state
from train.engines.single import SingleEngine
from train.models.decoder import Decoder
from train.models.init import initialise
from train.settings import EngineKind, Precision, RunConfig, Veto


def build_engine(config: RunConfig, world: World) -> Engine:
    """Return the engine, its parameters initialised from `run.seed`. Called on all ranks.

    Parameters are made on the meta device and filled where they will stay, so that a sharded model
    never exists whole.
    """
    kind = resolve_engine(config.engine, world.size)
    is_bf16 = _uses_bf16(config.engine.precision, world)
    dtype = torch.bfloat16 if is_bf16 else None
    with torch.device("meta"):
        model = Decoder(config.model)
    if kind is EngineKind.FSDP:
        fsdp.wrap(model, world, dtype)
    model.to_empty(device=world.device)
    initialise(model, config.model, seed=config.run.seed)
    if kind is EngineKind.DEEPSPEED:
        from train.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(
            model=model, world=world, engine=config.engine, optim=config.optim, is_bf16=is_bf16
        )
    classes = {EngineKind.SINGLE: SingleEngine, EngineKind.DDP: ddp.DdpEngine}
    module: nn.Module = ddp.wrap(model, world) if kind is EngineKind.DDP else model
    optimizer = make_optimizer(model, config.optim)
    materialise_state(optimizer, model.parameters())
    return classes.get(kind, fsdp.FsdpEngine)(
        name=str(kind),
        module=module,
        model=model,
        optimizer=optimizer,
        world=world,
        optim=config.optim,
        micro_batch_samples=config.engine.micro_batch_samples,
        autocast_dtype=None if kind is EngineKind.FSDP else dtype,
        has_veto=config.recovery.resolved_veto is not Veto.OFF,
        is_sharded=kind is EngineKind.FSDP,
    )


def _uses_bf16(precision: Precision, world: World) -> bool:
    if precision is Precision.AUTO:
        return world.device.type == "cuda" and torch.cuda.is_bf16_supported()
    return precision is Precision.BF16
