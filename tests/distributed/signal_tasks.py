"""What the ranks of the signal tests do: provoke each signal on one rank, report it from all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from engine_tasks import (
    BATCH_SAMPLES,
    LR,
    base_config,
    batch,
    one_step,
    own_rows,
    poisoned_gradient,
    results,
    train,
    whole,
    with_engine,
)
from torch import Tensor, nn

from train.distributed import World, join_world
from train.engines import deepspeed, torch_engine
from train.engines.base import Engine
from train.engines.build import build_engine
from train.settings import EngineKind, RunConfig
from train.signals import Gate, StepSignals

NUM_STEPS = 6


class CountingDist:
    """torch.distributed, with the calls of `all_reduce` counted."""

    def __init__(self, original: Any) -> None:
        self._original = original
        self.num_calls = 0

    def all_reduce(self, *arguments: Any, **options: Any) -> Any:
        self.num_calls += 1
        return self._original.all_reduce(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        assert not name.startswith(("all_", "reduce", "broadcast", "gather", "scatter", "barrier"))
        return getattr(self._original, name)


@contextmanager
def counted(kind: str) -> Iterator[CountingDist]:
    """Count the reduces that the engine's own module makes."""
    module: Any = deepspeed if kind == "deepspeed" else torch_engine
    original = module.dist
    module.dist = CountingDist(original)
    try:
        yield module.dist
    finally:
        module.dist = original


@contextmanager
def nan_loss(engine: Engine, *, is_here: bool) -> Iterator[None]:
    """Turn every loss of the model into NaN, on the ranks where `is_here`."""

    def poison(_module: nn.Module, _inputs: Any, output: tuple[Tensor, Tensor]) -> Any:
        return output[0] * torch.nan, output[1]

    handle = engine.model.register_forward_hook(poison) if is_here else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def _report(signals: StepSignals) -> dict[str, Any]:
    return {name: getattr(signals, name) for name in signals.__slots__}


def signals(folder: str, name: str, kind: str, zero_stage: int) -> None:
    """Provoke the signals one by one."""
    config = with_engine(base_config(), kind=EngineKind(kind), zero_stage=zero_stage)
    with results(Path(folder), name) as found, join_world(config.engine, job_name=name) as world:
        engine = build_engine(config, world)
        is_last = world.rank == world.size - 1
        with counted(kind) as reduces:
            found["clean"] = _report(one_step(engine, world, 0))
        found["num_reduces"] = reduces.num_calls
        found["flagged"] = _report(one_step(engine, world, 1, flag=is_last))
        found["unflagged"] = _report(one_step(engine, world, 2))
        with nan_loss(engine, is_here=is_last):
            found["bad_rank"] = _report(one_step(engine, world, 3))
        with nan_loss(engine, is_here=True):
            found["bad_ranks"] = _report(one_step(engine, world, 3))
        with poisoned_gradient(engine, is_here=is_last):
            found["bad_gradient"] = _report(one_step(engine, world, 3))
        found["after"] = _report(one_step(engine, world, 3))
        found["share"] = engine.model.blocks[0].mlp.down.weight.numel() / engine.num_parameters
        found["group"] = list(engine.group_names).index("blocks.0") if engine.group_names else None
        found["sample_losses"] = _sample_losses(config, world)


def _sample_losses(config: RunConfig, world: World) -> dict[str, Any]:
    """Train in micro-batches of 3 rows, which do not divide a rank's share."""
    engine = build_engine(with_engine(config, micro_batch_samples=3), world)
    reports, alone = [], []
    for step in range(3):
        alone.append([engine.evaluate(row[None]) for row in batch(step)])
        reports.append(one_step(engine, world, step).loss_nats)
    share = BATCH_SAMPLES // world.size
    own = slice(world.rank * share, (world.rank + 1) * share)
    found = {
        "losses": reports,
        "recent": engine.recent_sample_losses(),
        "alone": [losses[own] for losses in alone],
    }
    train(engine, world, 3, 36)
    last = one_step(engine, world, 36).loss_nats
    recent = engine.recent_sample_losses()
    return {**found, "num_kept": len(recent), "last_kept": recent[-1], "last_loss": last}


def update_norms(folder: str, name: str, kind: str) -> None:
    """Measure each update; save in the middle, and read its size in a fresh engine."""
    config = base_config()
    config = replace(config, optim=replace(config.optim, weight_decay=0.0))
    config = with_engine(config, kind=EngineKind(kind))
    with results(Path(folder), name) as found, join_world(config.engine, job_name=name) as world:
        engine: Any = build_engine(config, world)
        reported, measured = [], []
        for step in range(NUM_STEPS):
            before = [whole(parameter).clone() for parameter in engine.model.parameters()]
            reported.append(one_step(engine, world, step, lr=_lr(step)).update_norm)
            after = [whole(parameter) for parameter in engine.model.parameters()]
            squares = [
                (new - old).double().square().sum() for new, old in zip(after, before, strict=True)
            ]
            measured.append(float(torch.stack(squares).sum().sqrt()))
        found |= {"reported": reported, "measured": measured}
        checkpoint = Path(folder) / f"{name}-checkpoint"
        checkpoint.mkdir(exist_ok=True)
        engine.begin_save().write(checkpoint, world)
        fresh = build_engine(config, world)
        fresh.load(checkpoint)
        kept = fresh.recent_sample_losses()
        found["loaded"] = one_step(fresh, world, NUM_STEPS, lr=_lr(NUM_STEPS)).update_norm
        found["num_kept_by_load"] = len(kept)
        vetoed = one_step(engine, world, NUM_STEPS, Gate(max_loss_nats=0.0), lr=_lr(NUM_STEPS))
        found |= {"uninterrupted": vetoed.update_norm, "is_vetoed": vetoed.is_vetoed}
        again = one_step(engine, world, NUM_STEPS, lr=_lr(NUM_STEPS))
        found["after_veto"] = again.update_norm
        first = next(iter(engine.optimizer.state.values()))
        first["exp_avg"].fill_(torch.nan)
        found["broken"] = one_step(engine, world, NUM_STEPS).update_norm
        assert len(own_rows(world, 0)) * world.size == BATCH_SAMPLES


def _lr(step: int) -> float:
    """Return a rate that differs from step to step, and from the config's."""
    return 0.5 * LR * (1 + step / 10)
