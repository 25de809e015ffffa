"""What the ranks of the integrity tests do: real engines, one rank of which goes wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from engine_tasks import (
    BATCH_SAMPLES,
    LR,
    SEQUENCE_LENGTH,
    base_config,
    own_rows,
    results,
    with_engine,
)

from train.actions import Continue
from train.checkpoint.info import Health
from train.checkpoint.snapshots import SnapshotRing
from train.checkpoint.store import CheckpointStore
from train.checkpoint.tiers import Tiers
from train.distributed import World, join_world
from train.engines.build import build_engine
from train.engines.update_norm import local_part
from train.events import Events
from train.health.integrity import Integrity
from train.recovery.history import RecoveryHistory
from train.settings import EngineKind, IntegritySettings, OnMismatch, Precision
from train.signals import LOSS, Gate
from train.state import TrainState

NUM_STEPS = 8
WRONG_STEP = 5


class Task:
    """An engine and its checks, stepped as the loop does."""

    def __init__(self, folder: Path, name: str, config: Any, world: World, **settings: Any) -> None:
        self.world = world
        self.engine: Any = build_engine(config, world)
        store = CheckpointStore(folder / f"{name}-checkpoints", world, keep_good=2)
        store.open()
        self.tiers = Tiers(store, SnapshotRing(self.engine, world, size=2))
        chosen: dict[str, Any] = {
            "replica_check_interval_steps": None,
            "reexecution_interval_steps": None,
            "on_mismatch": OnMismatch.REWIND,
        }
        self.integrity = Integrity(
            IntegritySettings(**{**chosen, **settings}),
            world=world,
            tiers=self.tiers,
            history=RecoveryHistory(),
            events=Events([], is_main=world.is_main),
            last_step=1000,
            max_rewinds=5,
        )
        self.state = TrainState()
        self.losses: list[float] = []
        self.answers: list[Any] = []

    def step(self) -> None:
        execute = partial(
            self.engine.step,
            own_rows(self.world, self.state.step),
            num_tokens=BATCH_SAMPLES * SEQUENCE_LENGTH,
            lr=LR * (1 + self.state.step / 10),
            gate=Gate(),
        )
        vector = self.integrity.execute(self.engine, execute, self.state)
        self.losses += vector.tolist()[LOSS : LOSS + 2]
        self.state = self.state.after(next_cursor=0, num_tokens=1)
        self.answers += self.integrity.reviewed([Continue()], self.engine, self.state)

    def facts(self) -> dict[str, Any]:
        return {
            "losses": self.losses,
            "kept": self.engine.recent_sample_losses(),
            "digest": self.engine.state_digest(),
            "answers": [type(answer).__name__ for answer in self.answers],
            "reasons": [getattr(answer, "reason", "") for answer in self.answers],
        }


def _config(
    kind: str, zero_stage: int = 2, precision: str = "fp32", micro: int | None = None
) -> Any:
    return with_engine(
        base_config(),
        kind=EngineKind(kind),
        zero_stage=zero_stage,
        precision=Precision(precision),
        micro_batch_samples=micro,
    )


def undisturbed(folder: str, name: str, kind: str, zero_stage: int, precision: str) -> None:
    """Train with all checks at every step, and without any."""
    config = _config(kind, zero_stage, precision, micro=1)
    always = {"replica_check_interval_steps": 1, "reexecution_interval_steps": 1}

    def train(world: World, settings: dict[str, Any]) -> dict[str, Any]:
        task = Task(Path(folder), name, config, world, **settings)
        for _ in range(NUM_STEPS):
            task.step()
        return task.facts()

    with results(Path(folder), name) as found, join_world(config.engine, job_name=name) as world:
        for label, settings in (("checked", always), ("plain", {})):
            found[label] = train(world, settings)


def replicas(folder: str, name: str, wrong_rank: int, bit: int, keeps_snapshot: bool) -> None:
    """Turn one bit of one weight over, on one rank, between two steps."""
    config = _config("ddp")

    def train(world: World) -> dict[str, Any]:
        task = Task(Path(folder), name, config, world, replica_check_interval_steps=4)
        if keeps_snapshot:
            extra = {"ledger": [], "callbacks": {}}
            task.tiers.ring.take(task.state, extra, health=Health.GOOD)
        for step in range(NUM_STEPS):
            if step == WRONG_STEP and world.rank == wrong_rank:
                weight = dict(task.engine.model.named_parameters())["blocks.1.mlp.down.weight"]
                weight.detach().view(-1).view(torch.int32)[7] ^= 1 << bit
            task.step()
        return {**task.facts(), "suspects": len(getattr(task.answers[-1], "suspects", ()))}

    with results(Path(folder), name) as found, join_world(config.engine, job_name=name) as world:
        found |= train(world)


def wrong_once(folder: str, name: str, kind: str, wrong_rank: int) -> None:
    """Let one rank compute one thing otherwise, in the first of two executions of a step."""
    config = _config(kind)
    config = replace(config, optim=replace(config.optim, max_grad_norm=None))

    def train(world: World) -> dict[str, Any]:
        task = Task(Path(folder), name, config, world, reexecution_interval_steps=2)
        for step in range(NUM_STEPS):
            if step in WRONG and world.rank == wrong_rank:
                task.engine.step = _otherwise_once(task.engine, WRONG[step])
            task.step()
        return task.facts()

    with results(Path(folder), name) as found, join_world(config.engine, job_name=name) as world:
        found |= train(world)


def _otherwise_once(engine: Any, disturb: Callable[[Any], Callable[[], None]]) -> Any:
    original, left = engine.step, [1]

    def step(*arguments: Any, **keywords: Any) -> Any:
        undo = disturb(engine) if left else lambda: None
        left.clear()
        try:
            return original(*arguments, **keywords)
        finally:
            undo()

    return step


def _in_forward(engine: Any) -> Callable[[], None]:
    module = engine.model.blocks[0].mlp
    handle = module.register_forward_hook(lambda *all_of_it: all_of_it[-1] * 1.0001)
    return lambda: handle.remove()


def _in_backward(engine: Any) -> Callable[[], None]:
    module = engine.model.blocks[0].mlp
    handle = module.register_full_backward_hook(lambda *all_of_it: (all_of_it[1][0] * 1.0001,))
    return lambda: handle.remove()


def _in_update(engine: Any) -> Callable[[], None]:
    update = engine._update

    def otherwise(*arguments: Any) -> None:
        update(*arguments)
        parameter = next(p for p in engine.model.parameters() if local_part(p).numel())
        local_part(parameter).view(-1)[:1] *= 1.0001

    engine._update = otherwise
    return lambda: setattr(engine, "_update", update)


WRONG = {3: _in_forward, 5: _in_backward, 7: _in_update}
