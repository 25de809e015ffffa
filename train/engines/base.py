"""The engine protocol: what the loop needs of a model that is spread over processes.

An engine owns parameters, moments and their device; it knows nothing of schedules, data order,
checkpoint folders or recovery. All methods are collectives unless they say otherwise: call them on
all ranks in the same order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from train.data.layout import DocumentLayout
from train.distributed import World
from train.engines.snapshot import HostSnapshot
from train.models.decoder import Decoder
from train.signals import Gate


class PendingWrite(Protocol):
    """A state on its way to disk."""

    def write(self, folder: Path, world: World) -> None:
        """Write it into `folder`, which exists. A collective of `world`.

        May be called again after it has failed. Raises: whatever the storage does, CheckpointError.
        """

    def is_finite(self) -> bool:
        """True if no number of this rank's part is NaN or infinite, as far as that can be known.

        Waits for the copy. Raises: whatever the copy failed with.
        """


class Engine(Protocol):
    """One model, its optimizer, and a way to step them."""

    name: str
    can_veto: bool
    """Whether a bad update can be refused on the device."""
    can_snapshot: bool
    """Whether `snapshot` and `restore` work with these settings."""
    has_replicas: bool
    """Whether every rank holds the whole state, and all of them the same bits."""
    reads_together: bool
    """Whether `load` fails on all ranks if it fails on one."""
    writes_staged: bool
    """Whether `begin_save` takes a snapshot, so that a save can go on beside training."""
    checkpoint_format: str
    """Engines of the same format read each other's checkpoints."""
    num_parameters: int
    group_names: tuple[str, ...]
    """Names of the parameter groups whose gradient norms `step` reports."""

    model: Decoder
    """The model itself, inside of what wraps it: for hooks. Its parameters may be parts."""

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
        """Forward, backward, one fused reduce, gated update; no host sync.

        `rows`: this rank's samples, [n, T + 1]. `layout`: where documents begin in them, and what
        is padding; None: all is text of one document. `num_tokens`: predictions of the global
        batch, without those of padding. Memory from `staging.host_buffer` is read behind the
        host's back; other memory is free when this returns.
        `flag`: this rank asks for the attention of all; every rank's signals say so.
        Returns the signal vector (see `signals.py`), float64, on the device.
        """

    def recent_sample_losses(self) -> list[list[float]]:
        """Return the mean losses in nats a token of this rank's samples in the last 32 steps.

        Oldest step first, samples in row order; empty after `load` and `restore`. A host sync; no
        collective.
        """

    def evaluate(
        self, rows: npt.NDArray[np.integer], layout: DocumentLayout | None = None
    ) -> float:
        """Return the mean loss in nats a prediction of `rows`, which are equal on all ranks.

        Predictions of padding do not count; NaN if there are no others. A host sync.
        """

    def begin_save(self, staged: HostSnapshot | None = None) -> PendingWrite:
        """Get parameters and optimizer state ready to be written. No collective.

        `staged`: a snapshot of the present state, if `writes_staged`. What is returned reads that
        alone, so it may write in any thread while training goes on, until the snapshot is reused.
        None: it reads the engine's own tensors; write at once, in this thread.
        """

    def load(self, folder: Path) -> None:
        """Take up what was written, from any number of ranks if the format allows."""

    @property
    def state_bytes(self) -> int:
        """Host memory that one snapshot takes on this rank. No collective."""

    def snapshot(self, reuse: HostSnapshot | None = None) -> HostSnapshot:
        """Copy this rank's parameters, moments, counters and learning rates to host memory.

        Call it between steps. The buffers of `reuse`, a snapshot that is needed no more, are
        written again. On a GPU the copy goes on behind the host's back, and the next update waits
        for it there; a host sync only if `reuse` is still being copied. No collective.

        Raises: ConfigError unless `can_snapshot`, naming the settings that are in the way.
        """

    def restore(self, snapshot: HostSnapshot) -> None:
        """Put this rank's state back, in place; training goes on bit for bit as it did then.

        All ranks restore snapshots of the same step. No collective; it waits for the checksums.

        Raises: CorruptCheckpointError, naming the tensor, if a byte of the snapshot has changed;
        CheckpointError if it is of another engine. This rank's state is then as it was.
        """

    def undo(self, snapshot: HostSnapshot) -> None:
        """Take back the last step, before which `snapshot` was taken, as if it had not been.

        As `restore`, but the sample losses of the steps before are kept.
        """

    def state_checksums(self) -> dict[str, int]:
        """Return a checksum of each tensor of this rank's state, by name; one flipped bit shows.

        A host sync; no collective.
        """

    def state_digest(self) -> str:
        """Return a digest of this rank's parameters, moments and counters, bit for bit.

        A host sync; no collective.
        """
