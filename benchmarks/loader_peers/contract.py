"""What an adapter of a loader offers. Nothing here is imported from a loader."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from loader_peers.workload import Workload


class Loader(Protocol):
    """One rank's view of a loader, opened: all that it does at the start of a run.

    `folder`: what `prepare` wrote, and where the loader keeps its caches. `tokens_folder`: the
    tokens as they are.
    """

    def __init__(
        self, folder: Path, tokens_folder: Path, workload: Workload, *, rank: int, num_ranks: int
    ) -> None: ...

    def batches(self, state: Any = None) -> Iterator[Any]:
        """Return this rank's batches from the start of the epoch, or from a loaded state, on."""

    def state(self) -> Any:
        """Return what a checkpoint would keep after the last batch; None if there is nothing."""

    def skipping(self, num_batches: int) -> Iterator[Any]:
        """Return the batches after the first `num_batches`, in the loader's own way to skip."""

    def rows(self, batch: Any) -> npt.NDArray[np.integer]:
        """Return the tokens of a batch, [n, 2048 or more], in order to compare them."""


def as_array(tensor: Any) -> npt.NDArray[np.integer]:
    """Return a tensor or an array as an array; torch's uint16 too."""
    return np.asarray(tensor.numpy() if hasattr(tensor, "numpy") else tensor)
