"""The engine in plain torch: one step for `single`, `ddp` and `fsdp`, which differ in how the
model is wrapped, when gradients travel, and whether a rank holds all of them.

The veto: fused optimizers take `found_inf` and skip the whole update where it is 1: parameters,
both moments and the step counter stay as they are, even when every gradient is NaN. Clipping rides
along as `grad_scale`, so it costs no pass over the gradients of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn

from train.data.layout import DocumentLayout
from train.distributed import World
from train.engines.dcp import DcpWrite, accept_lone_process, catchable
from train.engines.optimizer import MOMENTS
from train.engines.rank_signals import SampleLosses, own_signals
from train.engines.snapshot import (
    HostSnapshot,
    SnapshotCopier,
    state_bytes,
    state_checksums,
    state_digest,
)
from train.engines.staging import num_predictions, stage
from train.engines.update_norm import UpdateNorm, local_part
from train.models.decoder import Decoder, num_parameters
from train.settings import OptimSettings
from train.signals import GRAD_NORM, IS_VETOED, Gate


def evaluation_parts(
    num_rows: int, world: World, micro_batch_samples: int | None
) -> Iterator[tuple[int, int, int]]:
    """Yield start, stop and weight of this rank's parts of so many rows, as many on every rank.

    Engines talk to each other in each forward: a rank that has run out of rows computes one of
    weight 0.
    """
    share = -(-num_rows // world.size)
    size = micro_batch_samples or 16
    for offset in range(0, share, size):
        start = world.rank * share + offset
        stop = min(start + size, (world.rank + 1) * share, num_rows)
        yield (start, stop, 1) if start < stop else (0, 1, 0)


def parameter_groups(model: nn.Module) -> tuple[tuple[str, ...], list[int]]:
    """Return the names of the groups (embedding, each block, head) and each parameter's group."""
    names: list[str] = []
    membership = []
    for name, _ in model.named_parameters():
        parts = [part for part in name.split(".") if part not in ("module", "_orig_mod")]
        group = ".".join(parts[:2]) if parts[0] == "blocks" else parts[0]
        if group not in names:
            names.append(group)
        membership.append(names.index(group))
    return tuple(names), membership


class TorchEngine:
    """Forward, backward, reduce, gated update.

    `module` is what forward runs through; `model` holds the parameters (they may be the same).
    `is_sharded`: each rank holds a part of every gradient.
    """

    has_replicas = False
    can_veto = True
    reads_together = True
    can_snapshot = True
    writes_staged = True
    checkpoint_format = "dcp"

    def __init__(
        self,
        *,
        name: str,
        module: nn.Module,
        model: Decoder,
        optimizer: torch.optim.AdamW,
        world: World,
        optim: OptimSettings,
        micro_batch_samples: int | None,
        autocast_dtype: torch.dtype | None,
        has_veto: bool,
        is_sharded: bool = False,
    ) -> None:
        self.name = name
        self.num_parameters = num_parameters(model)
        self.group_names, membership = parameter_groups(model)
        self.model = model
        self.optimizer = optimizer
        self._module = module
        self._world = world
        self._optim = optim
        self._micro_batch_samples = micro_batch_samples
        self._autocast_dtype = autocast_dtype
        self._has_veto = has_veto
        self._is_sharded = is_sharded
        self._update_norm = UpdateNorm(optimizer)
        # Masks, so that sums over groups are deterministic everywhere, and no sync.
        self._is_member = torch.nn.functional.one_hot(
            torch.tensor(membership, device=world.device), len(self.group_names)
        ).T.bool()
        self._local_numels = torch.tensor(
            [local_part(parameter).numel() for parameter in model.parameters()],
            dtype=torch.float64,
            device=world.device,
        )
        self._sample_losses = SampleLosses()
        self._parameters = dict(model.named_parameters())
        self._copier = SnapshotCopier(world.device)
        accept_lone_process()

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
        """See `Engine.step`."""
        staged = stage(rows, layout, self._world.device)
        chunks = list(staged.split(self._micro_batch_samples))
        # Wrapped models average gradients over the ranks; losses here are parts of one global sum.
        scale = self._world.size / num_tokens
        losses_B: list[Tensor] = []
        for number, chunk in enumerate(chunks, start=1):
            with self.gradient_sync(is_last=number == len(chunks)):
                with self._autocast():
                    cross_entropy_B, square_log_z = self._module(*chunk)
                loss = cross_entropy_B.sum() + self._optim.z_loss * square_log_z
                (scale * loss).backward()
            losses_B.append(cross_entropy_B.detach())
        loss_sum = self._sample_losses.add(losses_B, num_predictions=staged.num_predictions)
        vector = self._signals(loss_sum, num_tokens, gate, flag=flag)
        self._update(vector, lr)
        return vector

    def gradient_sync(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Return the context of one backward; gradients travel in the last one alone."""
        del is_last
        return nullcontext()

    def _autocast(self) -> AbstractContextManager[object]:
        if self._autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self._world.device.type, self._autocast_dtype)

    def _signals(self, loss_sum: Tensor, num_tokens: int, gate: Gate, *, flag: bool) -> Tensor:
        """Return the signal vector, after the one fused reduce of the step (a collective)."""
        norms = torch.stack(torch._foreach_norm(self._local_gradients())).double()
        nonfinite = (self._local_numels * ~torch.isfinite(norms)).sum(0, keepdim=True)
        # Not a product: that would carry a NaN of one group into all of them.
        group_squares = torch.where(self._is_member, norms.square(), 0.0).sum(dim=1)
        shares = torch.cat((self._update_norm.local_square(), nonfinite, group_squares))
        if not self._is_sharded:
            shares = shares / self._world.size  # every rank has all of them; the sum restores
        reduced = torch.cat((own_signals(loss_sum, self._world, flag=flag), shares))
        if self._world.size > 1:
            dist.all_reduce(reduced)
        loss_sum, bad_and_flagged, update_square, nonfinite, group_squares = torch.split(
            reduced, [1, 3, 1, 1, len(self.group_names)]
        )
        loss = loss_sum / num_tokens
        grad_norm = group_squares.sum(0, keepdim=True).sqrt()
        passes = torch.isfinite(loss) & torch.isfinite(grad_norm)
        passes &= (loss <= gate.max_loss_nats) & (grad_norm <= gate.max_grad_norm)
        is_vetoed = (~passes).double() if self._has_veto else torch.zeros_like(loss)
        nonfinite_share = nonfinite / self.num_parameters
        return torch.cat(
            (
                *(loss, grad_norm, update_square.sqrt(), nonfinite_share),
                *(bad_and_flagged, is_vetoed, group_squares.sqrt()),
            )
        )

    def _local_gradients(self) -> list[Tensor]:
        gradients = []
        for parameter in self.model.parameters():
            gradient = parameter.grad
            assert gradient is not None, "every parameter takes part in the loss"
            gradients.append(local_part(gradient))
        return gradients

    def _update(self, vector: Tensor, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        limit = self._optim.max_grad_norm or math.inf
        # The fused step divides gradients by `grad_scale`, and does nothing where `found_inf` is 1.
        self.optimizer.grad_scale = (vector[GRAD_NORM] / limit).clamp(min=1.0).float()  # type: ignore[attr-defined]
        self.optimizer.found_inf = vector[IS_VETOED].float()  # type: ignore[attr-defined]
        self._copier.before_write()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def evaluate(
        self, rows: npt.NDArray[np.integer], layout: DocumentLayout | None = None
    ) -> float:
        """See `Engine.evaluate`."""
        total = torch.zeros(1, dtype=torch.float64, device=self._world.device)
        with torch.no_grad():
            for start, stop, weight in evaluation_parts(
                len(rows), self._world, self._micro_batch_samples
            ):
                part = None if layout is None else layout.rows(start, stop)
                staged = stage(rows[start:stop], part, self._world.device)
                with self._autocast():
                    cross_entropy_B, _ = self._module(*staged)
                total += weight * cross_entropy_B.sum()
        if self._world.size > 1:
            dist.all_reduce(total)
        return float(total / num_predictions(rows, layout))  # host sync

    def begin_save(self, staged: HostSnapshot | None = None) -> DcpWrite:
        """See `Engine.begin_save`."""
        return DcpWrite(self._state(), staged)

    def load(self, folder: Path) -> None:
        """Read model and optimizer; the number of ranks may differ from that of `save`."""
        from torch.distributed.checkpoint.filesystem import FileSystemReader
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict
        from torch.distributed.checkpoint.state_dict_loader import load

        self._copier.before_write()
        state = self._state()
        with catchable():
            reader = FileSystemReader(folder)
            load(state, storage_reader=reader, no_dist=self._world.size == 1)
        set_state_dict(
            self._module,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=StateDictOptions(flatten_optimizer_state_dict=True),
        )
        self._update_norm = UpdateNorm(self.optimizer)
        self._sample_losses.clear()

    def recent_sample_losses(self) -> list[list[float]]:
        """See `Engine.recent_sample_losses`."""
        return self._sample_losses.recent()

    @property
    def state_bytes(self) -> int:
        """See `Engine.state_bytes`."""
        return state_bytes(self._state_tensors())

    def snapshot(self, reuse: HostSnapshot | None = None) -> HostSnapshot:
        """See `Engine.snapshot`."""
        lrs = tuple(float(group["lr"]) for group in self.optimizer.param_groups)
        return self._copier.take(self._state_tensors(), {"lr": lrs}, reuse)

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
        lrs = snapshot.host_values["lr"]
        for group, lr in zip(self.optimizer.param_groups, lrs, strict=True):
            group["lr"] = lr

    def state_checksums(self) -> dict[str, int]:
        """See `Engine.state_checksums`."""
        return state_checksums(self._state_tensors())

    def state_digest(self) -> str:
        """See `Engine.state_digest`."""
        return state_digest(self._state_tensors())

    def _state_tensors(self) -> dict[str, Tensor]:
        """Return this rank's state by name; views, in an order that no load changes."""
        tensors = {}
        for name, parameter in self._parameters.items():
            tensors[f"{name}/parameter"] = local_part(parameter)
            state = self.optimizer.state[parameter]
            tensors |= {f"{name}/{kind}": local_part(state[kind]) for kind in ("step", *MOMENTS)}
        return tensors

    def _state(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

        # A veto left over from the last step would keep moments from being made here.
        self.optimizer.grad_scale = self.optimizer.found_inf = None  # type: ignore[attr-defined]
        model_state, optimizer_state = get_state_dict(
            self._module,
            self.optimizer,
            options=StateDictOptions(flatten_optimizer_state_dict=True),
        )
        return {"model": model_state, "optimizer": optimizer_state}
