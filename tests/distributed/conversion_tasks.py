"""A run folder whose checkpoints are DeepSpeed's own files, as older versions left them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine_tasks import SAVED_STEP, base_config, digest, results, train, with_engine
from omegaconf import OmegaConf
from pydantic import TypeAdapter

from train.checkpoint.info import Health
from train.checkpoint.store import CheckpointStore
from train.distributed import World, join_world
from train.engines.build import build_engine
from train.settings import EngineKind, Precision, RunConfig
from train.state import TrainState


class OwnFiles:
    """Saves as DeepSpeed does by itself."""

    def __init__(self, engine: Any, stage: int, world: World) -> None:
        self._engine = engine._engine
        self.checkpoint_format = f"deepspeed-zero{stage}-{world.size}-ranks"

    def begin_save(self, staged: object) -> OwnFiles:
        del staged
        return self

    def write(self, folder: Path, world: World) -> None:
        del world
        self._engine.save_checkpoint(str(folder), tag="deepspeed", save_latest=False)

    def is_finite(self) -> bool:
        return True


def own_files(folder: str, name: str) -> None:
    """Write a checkpoint of ZeRO 1 in fp32, and one of ZeRO 3 in bf16."""
    run = Path(folder) / name
    config = with_engine(base_config(), kind=EngineKind.DEEPSPEED)
    with results(Path(folder), name) as found, join_world(config.engine, job_name=name) as world:
        if world.is_main:
            run.mkdir()
            node = TypeAdapter(RunConfig).dump_python(config, mode="json")
            OmegaConf.save(OmegaConf.create(node), run / "config.yaml")
        store = CheckpointStore(run / "checkpoints", world, keep_good=9, sequence_length=32)
        world.barrier()
        store.open()
        for stage, precision in ((1, Precision.FP32), (3, Precision.BF16)):
            engine = build_engine(with_engine(config, zero_stage=stage, precision=precision), world)
            train(engine, world, 0, SAVED_STEP)
            state = TrainState(step=SAVED_STEP, clock=SAVED_STEP + stage, cursor=7)
            writer: Any = OwnFiles(engine, stage, world)
            extra = {"ledger": [[1, 2]], "callbacks": {"a": {"b": stage}}}
            info = store.save(writer, state, extra, health=Health.GOOD)
            found[info.name] = {
                "digest": digest(engine),
                "losses": train(engine, world, SAVED_STEP, SAVED_STEP + 5),
            }


def load_each(folder: str, name: str, run: str) -> None:
    """Load the checkpoints of a run folder, and go on from each."""
    config = with_engine(base_config(), kind=EngineKind.SINGLE)
    with results(Path(folder), name) as found, join_world(config.engine, job_name=name) as world:
        store = CheckpointStore(
            Path(folder) / run / "checkpoints", world, keep_good=9, sequence_length=32
        )
        store.open()
        for info in store.entries():
            engine = build_engine(config, world)
            extra = store.load(engine, info)
            found[info.name] = {
                "digest": digest(engine),
                "losses": train(engine, world, SAVED_STEP, SAVED_STEP + 5),
                "extra": extra,
                "health": str(info.health),
            }
