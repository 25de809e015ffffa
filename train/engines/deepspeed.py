"""`deepspeed`: ZeRO 1, 2 and 3, started by plain torchrun, its JSON generated from our config.

DeepSpeed takes the gradient norm inside its own step, so no update can be refused from outside:
here a bad update is undone by a rewind. The one module that imports DeepSpeed.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from train.data.layout import DocumentLayout
from train.distributed import World
from train.engines.base import PendingWrite
from train.engines.dcp import accept_lone_process
from train.engines.deepspeed_state import (
    group_settings,
    is_stage_3,
    masters,
    obstacles_to_sharing,
    obstacles_to_snapshots,
    shared_state,
    state_tensors,
    take_up_masters,
)
from train.engines.flat_state import read_state, write_state
from train.engines.optimizer import make_optimizer, materialise_state
from train.engines.rank_signals import SampleLosses, own_signals
from train.engines.snapshot import (
    HostSnapshot,
    HostValues,
    SnapshotCopier,
    is_finite,
    state_bytes,
    state_checksums,
    state_digest,
)
from train.engines.staging import num_predictions, stage
from train.engines.torch_engine import TorchEngine, evaluation_parts
from train.errors import CheckpointError, ConfigError
from train.models.decoder import Decoder, num_parameters
from train.settings import EngineSettings, OptimSettings
from train.signals import Gate

_TAG = "deepspeed"
_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


def generate_json(
    engine: EngineSettings, optim: OptimSettings, *, is_bf16: bool
) -> dict[str, object]:
    """Return DeepSpeed's configuration; `engine.deepspeed` is merged over it, key by key."""
    generated: dict[str, object] = {
        "train_micro_batch_size_per_gpu": engine.micro_batch_samples or 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optim.max_grad_norm or 0.0,
        "bf16": {"enabled": is_bf16},
        "zero_optimization": {"stage": engine.zero_stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
    }
    return _merged(generated, engine.deepspeed)


def _merged(base: Mapping[str, object], over: Mapping[str, object]) -> dict[str, object]:
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            result[key] = _merged(old, value)
        else:
            result[key] = value
    return result


def _import_deepspeed(device: torch.device) -> Any:
    os.environ.setdefault("LOCAL_RANK", "0")  # it asks for it even where no launcher set it
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
        from deepspeed.ops import __compatible_ops__
    except ImportError as error:
        raise ConfigError(
            [f"engine.kind=deepspeed: DeepSpeed is not installed ({error}); pip install deepspeed"]
        ) from error
    # Without this, its first start on a CPU compiles an extension for minutes, and a lock left by a
    # killed build hangs every later start; gloo does the same work.
    __compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # It still calls collectives by names that torch is renaming; nothing here can change that.
    warnings.filterwarnings("ignore", category=FutureWarning, message="`torch.distributed")
    return deepspeed


class _Write:
    """What the two ways to write have in common; see `PendingWrite`."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def is_finite(self) -> bool:
        """See `PendingWrite.is_finite`; True where it is not known where the numbers lie."""
        return all(is_finite(tensor) for tensor in self._tensors.values())


class _SharedWrite(_Write):
    """Writes what all engines read."""

    def __init__(self, state: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        self._state = state

    def write(self, folder: Path, world: World) -> None:
        """See `PendingWrite.write`. Raises: CheckpointError on all ranks, if one has failed."""
        write_state(self._state, folder, world)


class _OwnWrite(_Write):
    """Writes DeepSpeed's own files."""

    def __init__(self, engine: Any, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        self._engine = engine

    def write(self, folder: Path, world: World) -> None:
        """See `PendingWrite.write`; over DeepSpeed's own process groups."""
        del world
        self._engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False)


class DeepSpeedEngine:
    """A model under DeepSpeed's own engine."""

    name = "deepspeed"
    has_replicas = False
    can_veto = False
    writes_staged = False

    def __init__(
        self,
        *,
        model: Decoder,
        world: World,
        engine: EngineSettings,
        optim: OptimSettings,
        is_bf16: bool,
    ) -> None:
        deepspeed = _import_deepspeed(world.device)
        self.num_parameters = num_parameters(model)
        self.group_names: tuple[str, ...] = ()
        optimizer = make_optimizer(model, optim)
        self._group_settings = group_settings(model.named_parameters(), optimizer)
        # It keeps process groups in module globals; those of an earlier job are gone by now.
        deepspeed.utils.groups._release_process_group_references(group=None)
        deepspeed.init_distributed(dist_backend=None, dist_init_required=False)
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=generate_json(engine, optim, is_bf16=is_bf16),
            dist_init_required=False,
        )
        self.model: Decoder = self._engine.module
        zero = self._engine.optimizer
        self._obstacles = obstacles_to_snapshots(engine.deepspeed, zero)
        self.can_snapshot = not self._obstacles
        self._is_shared = not obstacles_to_sharing(engine.deepspeed, zero, self.model)
        self.checkpoint_format = f"deepspeed-zero{engine.zero_stage}-{world.size}-ranks"
        if self._is_shared:
            self.checkpoint_format = TorchEngine.checkpoint_format
            materialise_state(zero.optimizer, masters(zero))
        self.reads_together = self._is_shared
        self._copier = SnapshotCopier(world.device)
        accept_lone_process()
        self._sample_losses = SampleLosses()
        self._world = world
        self._optim = optim
        self._micro_batch_samples = engine.micro_batch_samples

    def step(
        self,
        rows: npt.NDArray[np.integer],
        *,
        layout: DocumentLayout | None = None,
        num_tokens: int,
        lr: float,
        gate: Gate,
        flag: bool = False,
    ) -> Tensor:
        """See `Engine.step`; the gate is ignored, and norms but the gradient's are unknown."""
        del gate
        staged = stage(rows, layout, self._world.device)
        chunks = list(staged.split(self._micro_batch_samples))
        scale = self._world.size / num_tokens
        losses_B: list[Tensor] = []
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        for number, chunk in enumerate(chunks, start=1):
            self._engine.set_gradient_accumulation_boundary(number == len(chunks))
            cross_entropy_B, square_log_z = self._engine(*chunk)
            loss = cross_entropy_B.sum() + self._optim.z_loss * square_log_z
            self._engine.backward(scale * loss)
            losses_B.append(cross_entropy_B.detach())
        self._copier.before_write()
        self._engine.step()
        loss_sum = self._sample_losses.add(losses_B, num_predictions=staged.num_predictions)
        reduced = own_signals(loss_sum, self._world, flag=flag)
        dist.all_reduce(reduced)
        norm = self._engine.get_global_grad_norm()
        grad_norm = torch.as_tensor(
            math.nan if norm is None else norm, dtype=torch.float64, device=self._world.device
        ).reshape(1)
        unknown = torch.full_like(grad_norm, math.nan)
        # It refuses updates that are not finite by itself, in most of its modes.
        is_refused = float(getattr(self._engine.optimizer, "overflow", False))
        is_vetoed = torch.full_like(grad_norm, is_refused)
        return torch.cat(
            (reduced[:1] / num_tokens, grad_norm, unknown, unknown, reduced[1:], is_vetoed)
        )

    def recent_sample_losses(self) -> list[list[float]]:
        """See `Engine.recent_sample_losses`."""
        return self._sample_losses.recent()

    def evaluate(
        self, rows: npt.NDArray[np.integer], layout: DocumentLayout | None = None
    ) -> float:
        """See `Engine.evaluate`."""
        total = torch.zeros(1, dtype=torch.float64, device=self._world.device)
        self._engine.eval()
        with torch.no_grad():
            for start, stop, weight in evaluation_parts(
                len(rows), self._world, self._micro_batch_samples
            ):
                part = None if layout is None else layout.rows(start, stop)
                staged = stage(rows[start:stop], part, self._world.device)
                cross_entropy_B, _ = self._engine(*staged)
                total += weight * cross_entropy_B.sum()
        self._engine.train()
        dist.all_reduce(total)
        return float(total / num_predictions(rows, layout))  # host sync

    def begin_save(self, staged: HostSnapshot | None = None) -> PendingWrite:
        """See `Engine.begin_save`; written in the foreground.

        In the format of all engines, or, where the state lies elsewhere, in DeepSpeed's own.
        """
        assert staged is None, "DeepSpeed's copies are not written"
        tensors = self._state_tensors() if self.can_snapshot else {}
        if not self._is_shared:
            return _OwnWrite(self._engine, tensors)
        state = self._shared_state()
        lr = float(self._engine.optimizer.param_groups[0]["lr"])
        for name, settings in self._group_settings.items():
            for key, value in {**settings, "lr": lr}.items():
                state["optimizer"][f"param_groups.{name}.{key}"] = value
        return _SharedWrite(state, tensors)

    def load(self, folder: Path) -> None:
        """Read what any engine has written on any number of ranks, or DeepSpeed's own files.

        Its own can be read with the stage and on the number of ranks that wrote them alone.
        """
        self._copier.before_write()
        if not self._is_shared:
            self.load_own_files(folder)
            return
        state = self._shared_state()
        read_state(state, folder, self._world)
        counters = (v for name, v in state["optimizer"].items() if name.endswith(".step"))
        take_up_masters(self._engine.optimizer, counters)
        self._engine.optimizer.overflow = False
        self._sample_losses.clear()

    def load_own_files(self, folder: Path) -> None:
        """Read DeepSpeed's own files, of the same stage and number of ranks. A collective."""
        path, _ = self._engine.load_checkpoint(str(folder), tag=_TAG)
        if path is None:
            raise CheckpointError(f"DeepSpeed found no checkpoint in {folder}")
        self._sample_losses.clear()

    def _shared_state(self) -> dict[str, dict[str, Any]]:
        optimizer = self._engine.optimizer
        tensors = state_tensors(optimizer)
        return shared_state(self.model, optimizer, tensors, rank=self._world.rank)

    @property
    def state_bytes(self) -> int:
        """See `Engine.state_bytes`; 0 where there can be no snapshot."""
        return state_bytes(self._state_tensors()) if self.can_snapshot else 0

    def snapshot(self, reuse: HostSnapshot | None = None) -> HostSnapshot:
        """See `Engine.snapshot`."""
        host_values: HostValues = {
            "lr": tuple(float(group["lr"]) for group in self._engine.optimizer.param_groups),
            **{name: (getattr(self._engine, name),) for name in _COUNTERS},
        }
        return self._copier.take(self._state_tensors(), host_values, reuse)

    def restore(self, snapshot: HostSnapshot) -> None:
        """See `Engine.restore`."""
        self._put_back(snapshot)
        self._sample_losses.clear()

    def undo(self, snapshot: HostSnapshot) -> None:
        """See `Engine.undo`."""
        self._put_back(snapshot)
        self._sample_losses.drop_last()

    def _put_back(self, snapshot: HostSnapshot) -> None:
        self._copier.put_back(snapshot, self._state_tensors())
        optimizer = self._engine.optimizer
        if is_stage_3(optimizer):
            optimizer._partition_all_parameters()  # the next forward gathers what was put back
        lrs = snapshot.host_values["lr"]
        for group, lr in zip(optimizer.param_groups, lrs, strict=True):
            group["lr"] = lr
        for name in _COUNTERS:
            setattr(self._engine, name, int(snapshot.host_values[name][0]))
        optimizer.overflow = False

    def state_checksums(self) -> dict[str, int]:
        """See `Engine.state_checksums`."""
        return state_checksums(self._state_tensors())

    def state_digest(self) -> str:
        """See `Engine.state_digest`."""
        return state_digest(self._state_tensors())

    def _state_tensors(self) -> dict[str, Tensor]:
        if self._obstacles:
            raise ConfigError(
                [
                    f"{obstacle}: it keeps state where a snapshot in host memory would miss it; "
                    "remove it, or recover from checkpoints alone"
                    for obstacle in self._obstacles
                ]
            )
        return state_tensors(self._engine.optimizer)
