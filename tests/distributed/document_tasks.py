"""What the rank of the tests with documents on a GPU does; writes JSON, as `engine_tasks` does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine_tasks import BATCH_SAMPLES, LR, base_config, results, with_engine
from torch import Tensor

from train.data.layout import DocumentLayout
from train.distributed import World, join_world
from train.engines.base import Engine
from train.engines.build import build_engine
from train.engines.staging import host_buffer, num_predictions
from train.settings import EngineKind
from train.signals import Gate, StepSignals


def isolated_on_gpu(folder: str, name: str, sequence_length: int) -> None:
    """Step on a GPU with documents told apart, with every wait of the host an error.

    Short sequences go through the mask, long ones through FlexAttention; each step has other
    documents and another number of them at most.
    """
    config = with_engine(base_config(device="cuda"), kind=EngineKind.SINGLE)
    with results(Path(folder), name) as found, join_world(config.engine, job_name=name) as world:
        batches = [_documents(step, sequence_length, world) for step in range(4)]
        engine = build_engine(config, world)
        vectors = [_step_of(engine, *batches[0])]  # compiles kernels
        torch.cuda.set_sync_debug_mode("error")
        vectors += [_step_of(engine, rows, layout) for rows, layout in batches[1:]]
        torch.cuda.set_sync_debug_mode("default")
        found["losses"] = [StepSignals.from_vector(each.tolist()).loss_nats for each in vectors]
        found["evaluation"] = engine.evaluate(*batches[0])


def isolated_twice_on_gpu(folder: str, name: str, sequence_length: int) -> None:
    """Train twice with documents told apart, as `run.is_deterministic` has it."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    config = with_engine(base_config(device="cuda"), kind=EngineKind.SINGLE)
    with results(Path(folder), name) as found, join_world(config.engine, job_name=name) as world:
        found["digests"] = []
        for _ in range(2):
            engine = build_engine(config, world)
            for step in range(4):
                _step_of(engine, *_documents(step, sequence_length, world)).tolist()
            found["digests"].append(engine.state_digest())


def _step_of(engine: Engine, rows: Any, layout: DocumentLayout) -> Tensor:
    num_tokens = num_predictions(rows, layout)
    return engine.step(rows, layout=layout, num_tokens=num_tokens, lr=LR, gate=Gate())


def _documents(
    step: int, sequence_length: int, world: World
) -> tuple[np.ndarray[Any, np.dtype[np.uint16]], DocumentLayout]:
    """Return rows of random documents, in memory that the device reads by itself."""
    generator = np.random.default_rng(step)
    length = sequence_length + 1
    rows = host_buffer((BATCH_SAMPLES, length), np.uint16, world.device)
    rows[:] = generator.integers(0, 257, rows.shape)
    starts = np.sort(generator.integers(1, length + 1, (BATCH_SAMPLES, 3 + step)), axis=1)
    starts = np.pad(starts, ((0, 0), (1, 0))).astype(np.int32)
    lengths = generator.integers(length // 2, length + 1, BATCH_SAMPLES).astype(np.int32)
    return rows, DocumentLayout(starts=starts, lengths=lengths)
