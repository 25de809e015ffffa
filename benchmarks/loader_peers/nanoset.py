"""nanotron: Nanoset over a datatrove folder, with the sampler of its training loop."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from loader_peers.workload import (
    BATCH_SAMPLES,
    SEED,
    SEPARATOR,
    SEQUENCE_LENGTH,
    Workload,
    tokens_path,
)


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """flash_attn: nanotron imports its attention with its data, and a CPU has none."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name.partition(".")[0] == "flash_attn":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> ModuleType:
        module = ModuleType(spec.name)
        vars(module).update(__version__="2.7.0", __getattr__=self._missing)
        return module

    def exec_module(self, module: ModuleType) -> None: ...

    @staticmethod
    def _missing(name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


sys.meta_path.append(_Absent())

from datatrove.utils.dataset import DatatroveFolderDataset  # noqa: E402
from nanotron.data import nanoset  # noqa: E402
from nanotron.data.samplers import get_sampler  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402


def _folder_dataset(*, filename_pattern: str, eos_token_id: int | None, **options: Any) -> Any:
    """Translate: no release of datatrove has the very arguments that nanotron calls it with."""
    return DatatroveFolderDataset(
        filename_pattern=Path(filename_pattern).name,
        positions_from_eos_token_id=eos_token_id,
        **options,
    )


nanoset.DatatroveFolderDataset = _folder_dataset


def prepare(folder: Path, tokens_folder: Path, workload: Workload) -> None:
    """Give the tokens the name that its folder needs; build what its compiler keeps."""
    (folder / "corpus").mkdir()
    os.link(tokens_path(tokens_folder), folder / "corpus/tokens.ds")
    Loader(folder, tokens_folder, workload, rank=0, num_ranks=1)


class Loader:
    """Rows alone, without the positions of tokens in their documents."""

    def __init__(
        self, folder: Path, tokens_folder: Path, workload: Workload, *, rank: int, num_ranks: int
    ) -> None:
        if not torch.distributed.is_initialized():  # its log asks for a rank
            torch.distributed.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
        self._dataset = nanoset.Nanoset(
            dataset_folders=[str(folder / "corpus")],
            sequence_length=SEQUENCE_LENGTH,
            token_size=2,
            train_split_num_samples=workload.num_batches * BATCH_SAMPLES,
            random_seed=SEED,
            eos_token_id=SEPARATOR,
            return_positions=False,
        )
        self._rank, self._num_ranks = rank, num_ranks
        self._consumed = 0

    def batches(self, state: Any = None) -> Iterator[Any]:
        """Return batches from the number of consumed samples on."""
        self._consumed = 0 if state is None else int(state["consumed_train_samples"])
        sampler = get_sampler(
            dl_ranks_size=self._num_ranks,
            dl_rank=self._rank,
            train_dataset=self._dataset,
            consumed_train_samples=self._consumed,
            drop_last=True,
        )
        loader = torch.utils.data.DataLoader(
            self._dataset,
            batch_size=BATCH_SAMPLES // self._num_ranks,
            sampler=sampler,
            drop_last=True,
            num_workers=0,
        )
        for batch in loader:
            self._consumed += BATCH_SAMPLES
            yield batch

    def state(self) -> Any:
        """Return the samples consumed by all ranks, as its checkpoints keep them."""
        return {"consumed_train_samples": self._consumed}

    def skipping(self, num_batches: int) -> Iterator[Any]:
        """Return batches from a greater number of consumed samples on."""
        return self.batches({"consumed_train_samples": num_batches * BATCH_SAMPLES})

    def rows(self, batch: Any) -> npt.NDArray[np.integer]:
        """Return the tokens."""
        tokens: npt.NDArray[np.integer] = batch["input_ids"].numpy()
        return tokens
