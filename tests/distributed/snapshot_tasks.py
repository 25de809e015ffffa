"""What the ranks of the snapshot tests do: take one, train on, put it back, train again."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from engine_tasks import (
    LR,
    base_config,
    batch,
    one_step,
    own_rows,
    poisoned_gradient,
    results,
    with_engine,
)
from torch.distributed.tensor import DTensor

from train.distributed import World, join_world
from train.engines.build import build_engine
from train.errors import CheckpointError, ConfigError, CorruptCheckpointError
from train.settings import EngineKind, Precision, RunConfig, Veto
from train.signals import LOSS, Gate

NUM_STEPS = 4


def _train(engine: Any, world: World, first: int) -> list[Any]:
    """Take a few steps with a learning rate that differs from step to step."""
    found: list[Any] = []
    for step in range(first, first + NUM_STEPS):
        signals = one_step(engine, world, step, lr=LR * (1 + step / 10))
        found.append([signals.loss_nats, signals.grad_norm, signals.update_norm])
    return [*found, engine.state_digest()]


def _pointers(snapshot: Any) -> list[int]:
    return [slab.data_ptr() for slab in snapshot.slabs]


def snapshots(
    folder: str,
    name: str,
    kind: str,
    zero_stage: int,
    precision: str,
    settings: str = "{}",
    device: str = "cpu",
) -> None:
    """Go back from several states, bit for bit."""
    if device == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    config = with_engine(
        base_config(device=device),
        kind=EngineKind(kind),
        zero_stage=zero_stage,
        precision=Precision(precision),
        deepspeed=json.loads(settings),
    )
    with results(Path(folder), name) as found, join_world(config.engine, job_name=name) as world:
        engine: Any = build_engine(config, world)
        found["can_snapshot"] = engine.can_snapshot
        fresh = engine.snapshot()
        found["is_sized"] = fresh.num_bytes == engine.state_bytes
        first = _train(engine, world, 0)
        later = engine.snapshot()
        onwards = _train(engine, world, NUM_STEPS)
        # Twice, and after an evaluation, which can leave gathered parameters behind.
        for label in ("once", "twice"):
            engine.evaluate(batch(1000))
            parameters = engine.model.parameters()
            found["holds_parts"] = all(isinstance(each, DTensor) for each in parameters)
            engine.restore(later)
            found[label] = {
                "digest": engine.state_digest() == first[-1],
                "kept": engine.recent_sample_losses(),
                "steps": _train(engine, world, NUM_STEPS) == onwards,
            }
        engine.restore(fresh)
        engine.restore(later)
        evaluation = engine.evaluate(batch(1000))
        engine.restore(fresh)
        found["evaluation_differs"] = engine.evaluate(batch(1000)) != evaluation
        engine.restore(later)
        found["evaluation_is_same"] = engine.evaluate(batch(1000)) == evaluation
        engine.restore(fresh)
        found["fresh"] = _train(engine, world, 0) == first
        pointers = _pointers(fresh)
        reused = engine.snapshot(reuse=fresh)
        found["reuses"] = _pointers(reused) == pointers
        found["healed"] = _healed(engine, world, reused, first[-1], onwards)
        found["refused"] = _refused(engine, reused)
        engine.restore(later)
        if world.rank == 0:  # alone: a collective would wait for the others, or be taken for theirs
            engine.snapshot(reuse=engine.snapshot())
            engine.restore(later)
            engine.state_digest()
            engine.recent_sample_losses()
        found["last"] = _train(engine, world, NUM_STEPS) == onwards


def _healed(engine: Any, world: World, snapshot: Any, digest: str, onwards: list[Any]) -> Any:
    """Fill the whole state with NaN, on one rank alone, and put the snapshot back on all."""
    if world.rank == world.size - 1:
        for tensor in engine._state_tensors().values():
            tensor.detach().fill_(math.nan)
    one_step(engine, world, 0)  # gathered copies of parameters may still be sound
    is_broken = not math.isfinite(one_step(engine, world, 0).loss_nats)
    engine.restore(snapshot)
    same = engine.state_digest() == digest
    return [is_broken, same, _train(engine, world, NUM_STEPS) == onwards]


def _refused(engine: Any, snapshot: Any) -> dict[str, Any]:
    """Flip one bit here and there; report what `restore` says and whether it touched anything."""
    snapshot.wait()
    before = engine.state_digest()
    slots = snapshot.slots
    messages = {}
    for slot in (slots[0], slots[len(slots) // 2], slots[-1]):
        position = slot.offset + slot.num_bytes // 2
        snapshot.slabs[0][position] ^= 16
        try:
            engine.restore(snapshot)
        except CorruptCheckpointError as error:
            messages[slot.name] = str(error)
        snapshot.slabs[0][position] ^= 16
    is_untouched = engine.state_digest() == before
    engine.restore(snapshot)
    return {
        "messages": messages,
        "num_flipped": 3,
        "is_untouched": is_untouched,
        "then_restores": engine.state_digest() != before,
    }


def nan_update(folder: str, name: str, kind: str) -> None:
    """Let a NaN gradient through, without a veto, and heal by the snapshot before it."""
    config = with_engine(base_config(), kind=EngineKind(kind))
    config = replace(config, recovery=replace(config.recovery, veto=Veto.OFF))
    with results(Path(folder), name) as found, join_world(config.engine, job_name=name) as world:
        engine: Any = build_engine(config, world)
        _train(engine, world, 0)
        snapshot = engine.snapshot()
        onwards = _train(engine, world, NUM_STEPS)
        engine.restore(snapshot)
        with poisoned_gradient(engine, is_here=world.rank == world.size - 1):
            one_step(engine, world, NUM_STEPS)
        found["is_broken"] = not math.isfinite(one_step(engine, world, NUM_STEPS).loss_nats)
        engine.restore(snapshot)
        found["is_healed"] = _train(engine, world, NUM_STEPS) == onwards


def digests(folder: str, name: str, kind: str) -> None:
    """Compare two executions, and one in which one bit of one weight was flipped on one rank."""
    config = with_engine(base_config(), kind=EngineKind(kind))
    with results(Path(folder), name) as found, join_world(config.engine, job_name=name) as world:
        engine, same, other = (build_engine(config, world) for _ in range(3))
        for each in (engine, same, other):
            _train(each, world, 0)
        if world.rank == world.size - 1:
            weight: Any = next(iter(other._state_tensors().values()))
            weight.view(-1).view(torch.int32)[0] ^= 1
        found["digests"] = [each.state_digest() for each in (engine, same, other)]
        try:
            small = replace(config, model=replace(config.model, num_layers=1))
            engine.restore(build_engine(small, world).snapshot())
        except CheckpointError as error:
            found["error"] = str(error)
        found["is_untouched"] = engine.state_digest() == found["digests"][0]


def without_host_sync(folder: str, name: str) -> None:
    """Step and take snapshots on a GPU, with every wait of the host an error."""
    config = with_engine(base_config(device="cuda"), kind=EngineKind.SINGLE)
    with results(Path(folder), name) as found, join_world(config.engine, job_name=name) as world:
        engine = build_engine(config, world)
        snapshot = engine.snapshot()
        snapshot.wait()
        one_step(engine, world, 0)
        torch.cuda.set_sync_debug_mode("error")
        vectors = []
        for step in range(1, 4):
            rows = own_rows(world, step)
            vectors.append(engine.step(rows, num_tokens=rows[:, 1:].size, lr=LR, gate=Gate()))
            snapshot = engine.snapshot(reuse=snapshot)
        torch.cuda.set_sync_debug_mode("default")
        losses = [float(vector[LOSS]) for vector in vectors]
        found["num_steps"] = sum(math.isfinite(loss) for loss in losses)


def unsupported(folder: str, name: str, settings: str) -> None:
    """Ask DeepSpeed for a snapshot with settings that rule it out."""
    config: RunConfig = with_engine(
        base_config(),
        kind=EngineKind.DEEPSPEED,
        zero_stage=1,
        precision=Precision.BF16,
        deepspeed=json.loads(settings),
    )
    with results(Path(folder), name) as found, join_world(config.engine, job_name=name) as world:
        engine = build_engine(config, world)
        found |= {"can_snapshot": engine.can_snapshot, "state_bytes": engine.state_bytes}
        try:
            engine.snapshot()
        except ConfigError as error:
            found["error"] = str(error)
