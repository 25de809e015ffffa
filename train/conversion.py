"""From DeepSpeed's own files, which only as many ranks can read, to those of all engines.

DeepSpeed itself reads them, on the ranks that wrote them; what it then holds is saved as any other
state. Owns the order of things: verify, read, write, keep what was there. Refuses to change the
checkpoint it reads. Called by `train/convert.py`, on every rank.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.errors import (
    CheckpointError,
    ConfigError,
    CorruptCheckpointError,
    RunFolderError,
    TrimtabError,
)
from train.logs import log_to_console

if TYPE_CHECKING:
    from train.distributed import World
    from train.engines.deepspeed import DeepSpeedEngine
    from train.run_folder import FolderLock

logger = logging.getLogger(__name__)

_FORMAT = re.compile(r"^deepspeed-zero(\d)-(\d+)-ranks$")


def convert(paths: list[Path], config: Path, output: Path) -> None:
    """Convert checkpoints, all of the same format, into `output`. A collective.

    Health, cursor and ledger stay. A checkpoint of the same name there is put aside.
    Raises: TrimtabError.
    """
    from omegaconf import OmegaConf
    from pydantic import TypeAdapter

    from train.distributed import join_world
    from train.run_folder import FolderLock
    from train.settings import EngineSettings

    node: Any = OmegaConf.to_container(OmegaConf.load(config))
    manifest, _ = _read(paths[0])
    match = _FORMAT.match(str(manifest["format"]))
    if match is None:
        raise ConfigError([f"{paths[0]} is {manifest['format']}, which all engines read already"])
    # There may be fewer GPUs here than ranks then, and nothing is computed.
    stage = {"kind": "deepspeed", "zero_stage": int(match[1]), "device": "cpu"}
    settings = {**node["engine"], **stage}
    engine_settings = TypeAdapter(EngineSettings).validate_python(settings)
    with join_world(engine_settings, job_name="convert") as world:
        if world.size != int(match[2]):
            raise ConfigError([f"{paths[0]} needs {match[2]} ranks, and {world.size} were started"])
        with closing(FolderLock(output.parent)) as lock:
            _hold(lock, output.parent, world)
            engine: DeepSpeedEngine | None = None
            for path in paths:
                _verify(path, world)
                engine = engine or _engine(node, engine_settings, world, path)
                engine.load_own_files(path)
                _save(engine, world, path, output)


def _hold(lock: FolderLock, run_folder: Path, world: World) -> None:
    """Keep runs out of the folder that is written to, if it is a run's. A collective.

    Raises: RunFolderError on all ranks if one is training there.
    """
    problems: tuple[str, ...] = ()
    if world.is_main and (run_folder / ".lock").exists():
        try:
            lock.acquire()
        except RunFolderError as error:
            problems = error.problems
    problems = world.broadcast(problems)
    if problems:
        raise RunFolderError(problems)


def _engine(node: Mapping[str, Any], settings: Any, world: World, path: Path) -> DeepSpeedEngine:
    """Return an engine that reads `path` and writes for all. A collective."""
    import torch
    from pydantic import TypeAdapter

    from train.engines.deepspeed import DeepSpeedEngine
    from train.models.decoder import Decoder
    from train.settings import ModelSettings, OptimSettings

    with torch.device("meta"):
        model = Decoder(TypeAdapter(ModelSettings).validate_python(node["model"]))
    engine = DeepSpeedEngine(
        model=model.to_empty(device=world.device),
        world=world,
        engine=settings,
        optim=TypeAdapter(OptimSettings).validate_python(node["optim"]),
        is_bf16=any(path.glob("deepspeed/bf16_*")),
    )
    if engine.checkpoint_format.startswith("deepspeed"):
        raise ConfigError(
            [
                "engine.deepspeed of this run keeps state on a disk, quantised, or on some of the "
                f"ranks alone: {path} can be read by the engine that wrote it, and by no other"
            ]
        )
    return engine


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return manifest and state of a checkpoint. Raises: CheckpointError."""
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        return manifest, json.loads((path / "state.json").read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from error


def _verify(path: Path, world: World) -> None:
    """Read each file's digest, every rank its share. A collective.

    Raises: CorruptCheckpointError on all ranks.
    """
    from train.checkpoint.info import verify_digests, verify_sizes

    manifest, _ = _read(path)
    files = manifest["files"]
    mine = {name: files[name] for name in sorted(files)[world.rank :: world.size]}
    problem = None
    try:
        verify_sizes(path, mine)
        verify_digests(path, mine)
    except CorruptCheckpointError as error:
        problem = str(error)
    problems = [answer for answer in world.gather(problem) if answer]
    if problems:
        raise CorruptCheckpointError("; ".join(problems))


def _save(engine: DeepSpeedEngine, world: World, path: Path, output: Path) -> None:
    from train.checkpoint.info import Health
    from train.checkpoint.store import CheckpointStore
    from train.state import TrainState

    _, extra = _read(path)
    state = TrainState(**extra.pop("train_state"))
    health = json.loads((path / "health.json").read_bytes())["health"]
    store = CheckpointStore(
        output,
        world,
        keep_good=1,
        kept=lambda: frozenset(info.name for info in store.entries()),  # it removes nothing
        sequence_length=int(extra.pop("sequence_length", 0) or 0),
    )
    store.open()
    info = store.save(engine, state, extra, health=Health(health))
    logger.info("%s: readable by all engines, on any number of ranks", info.path)


def main() -> int:
    """Run with the arguments of the command line and return the exit code."""
    parser = argparse.ArgumentParser(description="Make checkpoints readable by all engines.")
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--config", type=Path, required=True, help="config.yaml of the run")
    parser.add_argument("--output", type=Path, required=True, help="a folder of checkpoints")
    arguments = parser.parse_args()
    log_to_console()
    try:
        convert(arguments.checkpoints, arguments.config, arguments.output)
    except TrimtabError as error:
        return _report(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _report("interrupted; the checkpoints are as they were", 130)
    return 0


def _report(message: str, exit_code: int) -> int:
    """Say what went wrong, once for all ranks of a host."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        sys.stderr.write(f"trimtab: {message}\n")
    return exit_code
