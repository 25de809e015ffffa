"""What ranks do for the tests of saves: write a state at once, and a copy beside training."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from typing import Any

import torch
from engine_tasks import base_config, digest, one_step, results, train, with_engine
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter

import train.engines.snapshot as snapshot
from train.checkpoint.info import Health
from train.checkpoint.store import CheckpointStore
from train.distributed import World, join_world
from train.engines.build import build_engine
from train.engines.dcp import DcpWrite
from train.settings import EngineKind
from train.state import TrainState

NUM_STEPS = 4


def files(folder: Path) -> dict[str, str]:
    """Return a digest of each file, and the index without the folder and id that are in it."""
    found = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("*.distcp"))
    }
    index = FileSystemReader(folder).read_metadata()
    return found | {"index": repr((index.state_dict_metadata, index.planner_data))}


def both_ways(folder: str, name: str, kind: str, slab_bytes: int = snapshot._SLAB_BYTES) -> None:
    """Write one state at once and from a copy, while training goes on; load the latter."""
    snapshot._SLAB_BYTES = slab_bytes
    config = with_engine(base_config(), kind=EngineKind(kind))
    with results(Path(folder), name) as found, join_world(config.engine, job_name=name) as world:
        engine: Any = build_engine(config, world)
        train(engine, world, 0, NUM_STEPS)
        at_once, staged = (Path(folder) / f"{name}-{way}" for way in ("at-once", "staged"))
        if world.is_main:
            at_once.mkdir()
            staged.mkdir()
        world.barrier()
        before = digest(engine)
        engine.begin_save().write(at_once, world)
        pending = engine.begin_save(engine.snapshot())
        beside = world.aside()
        writing = threading.Thread(target=pending.write, args=(staged, beside))
        writing.start()
        train(engine, world, NUM_STEPS, 3 * NUM_STEPS)
        writing.join()
        world.barrier()
        found["is_finite"] = pending.is_finite()
        found["files"] = [files(at_once), files(staged)]
        found["has_moved"] = digest(engine) != before
        engine.load(staged)
        found["is_as_before"] = digest(engine) == before
        found["num_split"] = len(pending._split)


def held_up(folder: str, name: str, kind: str) -> None:
    """Train with a save in flight that one rank holds up; the others must not wait for it."""
    config = with_engine(base_config(), kind=EngineKind(kind))
    with results(Path(folder), name) as found, join_world(config.engine, job_name=name) as world:
        engine: Any = build_engine(config, world)
        store = CheckpointStore(
            Path(folder) / f"{name}-checkpoints", world, keep_good=2, beside=world.aside()
        )
        store.open()
        may_write = threading.Event()
        _hold(may_write, is_here=world.rank == 1)
        train(engine, world, 0, NUM_STEPS)
        before = digest(engine)
        state = TrainState(step=NUM_STEPS, clock=NUM_STEPS)
        staged = engine.snapshot()
        store.begin(engine, state, {"ledger": []}, health=Health.GOOD, staged=staged)
        found["losses"] = train(engine, world, NUM_STEPS, 3 * NUM_STEPS)
        found["settled_early"] = store.settle(waits=False) is not None
        may_write.set()
        outcome = store.settle(waits=True)
        assert outcome is not None
        found["problem"] = outcome.problem
        store.load(engine, store.entries()[-1])
        found["is_as_before"] = digest(engine) == before


def _hold(may_write: threading.Event, *, is_here: bool) -> None:
    write = DcpWrite.write

    def held(self: DcpWrite, folder: Path, world: World) -> None:
        if is_here:
            assert may_write.wait(60)
        write(self, folder, world)

    DcpWrite.write = held  # type: ignore[method-assign]


def failing_beside(folder: str, name: str, failing_rank: int) -> None:
    """Let the writes of one rank fail, once and then for good; report what each is told."""
    config = with_engine(base_config(), kind=EngineKind.DDP, timeout_seconds=30.0)
    with results(Path(folder), name) as found, join_world(config.engine, job_name=name) as world:
        engine: Any = build_engine(config, world)
        store = CheckpointStore(
            Path(folder) / f"{name}-checkpoints",
            world,
            keep_good=2,
            beside=world.aside(),
            retry_seconds=(0.01,),
        )
        store.open()
        num_failures = 1
        write_data = FileSystemWriter.write_data

        def fail(self: FileSystemWriter, *arguments: Any) -> Any:
            nonlocal num_failures
            if world.rank == failing_rank and num_failures:
                num_failures -= 1
                raise OSError(28, "No space left on device")
            return write_data(self, *arguments)

        FileSystemWriter.write_data = fail  # type: ignore[method-assign]
        for step, failures in ((1, 1), (2, 100)):
            num_failures = failures
            one_step(engine, world, step)
            state = TrainState(step=step, clock=step)
            staged = engine.snapshot()
            store.begin(engine, state, {"ledger": []}, health=Health.GOOD, staged=staged)
            while (outcome := store.settle(waits=False)) is None:
                one_step(engine, world, step)
            found[str(step)] = outcome.problem
        found["steps"] = [info.step for info in store.entries()]
        found["left"] = sorted(path.name for path in store.folder.iterdir())


def broken(folder: str, name: str, kind: str) -> None:
    """Put a NaN into the last rank's part of the state; report the health of its checkpoint."""
    config = with_engine(base_config(), kind=EngineKind(kind))
    with results(Path(folder), name) as found, join_world(config.engine, job_name=name) as world:
        engine: Any = build_engine(config, world)
        store = CheckpointStore(
            Path(folder) / f"{name}-checkpoints", world, keep_good=2, beside=world.aside()
        )
        store.open()
        if world.rank == world.size - 1:
            moment = next(iter(engine.optimizer.state.values()))["exp_avg"]
            getattr(moment, "_local_tensor", moment).view(-1)[-1] = torch.nan
        state = TrainState(step=1, clock=1)
        store.begin(engine, state, {"ledger": []}, health=Health.GOOD, staged=engine.snapshot())
        assert store.settle(waits=True) is not None
        found["health"] = str(store.entries()[-1].health)
