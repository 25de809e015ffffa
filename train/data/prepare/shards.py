"""Shards while they are written: tokens, where documents begin, and the hashes of their text.

Owns the names of a task's files. A shard is written under a temporary name, and has its own once it
is on disk. Documents end up in the split that the hash of their text says. Called by `task`.
"""

from __future__ import annotations

import hashlib
import io
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from train.durable import fsync_file

SPLITS = ("train", "validation")
HASH_BYTES = 16
_COPY_BYTES = 2**23

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskShard:
    """A shard as a task left it. `name`: of its files in the work folder, without suffix."""

    name: str
    split: str
    num_tokens: int
    num_documents: int
    sha256: str

    def as_json(self) -> dict[str, Any]:
        """Return the record of the shard in the record of its task."""
        return asdict(self)


def tokens_file(folder: Path, name: str) -> Path:
    """Return where the tokens of a shard lie."""
    return folder / f"{name}.bin"


def documents_file(folder: Path, name: str) -> Path:
    """Return where the first tokens, files and lines of a shard's documents lie: int64 [3, n]."""
    return folder / f"{name}.documents.npy"


def hashes_file(folder: Path, name: str) -> Path:
    """Return where the hashes of a shard's documents lie: 16 bytes each."""
    return folder / f"{name}.hashes"


class SplitWriter:
    """Writes the documents of one split of one task, as one shard after another."""

    def __init__(self, folder: Path, task_name: str, split: str, shard_tokens: int) -> None:
        self._folder = folder
        self._prefix = f"{task_name}-{split}"
        self._split = split
        self._shard_tokens = shard_tokens
        self._file: BinaryIO | None = None
        self.shards: list[TaskShard] = []
        self._open()

    def _open(self) -> None:
        self._num_tokens = 0
        self._digest = hashlib.sha256()
        self._columns: list[Numbers] = []
        self._hashes = io.BytesIO()

    @property
    def _name(self) -> str:
        return f"{self._prefix}-{len(self.shards):03d}"

    def add(self, tokens: npt.NDArray[np.integer], documents: Numbers, hashes: bytes) -> None:
        """Add whole documents: tokens with separators, [first token, file, line] each, hashes."""
        documents[0] += self._num_tokens
        self._write(tokens.data.cast("B"), len(tokens))
        self._note(documents, hashes)

    def add_spilled(self, spilled: Path, itemsize: int, document: Numbers, hashes: bytes) -> None:
        """Add one document whose tokens are in a file: it may be longer than memory."""
        document[0] += self._num_tokens
        with spilled.open("rb") as file:
            while part := file.read(_COPY_BYTES):
                self._write(memoryview(part), len(part) // itemsize)
        self._note(document, hashes)

    def _write(self, part: memoryview, num_tokens: int) -> None:
        if self._file is None:
            self._file = _temporary(tokens_file(self._folder, self._name)).open("wb", buffering=0)
        _write_all(self._file, part)
        self._digest.update(part)
        self._num_tokens += num_tokens

    def _note(self, documents: Numbers, hashes: bytes) -> None:
        self._columns.append(documents)
        self._hashes.write(hashes)
        if self._num_tokens >= self._shard_tokens:
            self.finish()

    def finish(self) -> None:
        """Put what was written under its names, on disk; nothing if there is none."""
        if self._file is None:
            return
        self._file.close()
        self._file = None
        name = self._name
        documents = np.concatenate(self._columns, axis=1)
        _publish(tokens_file(self._folder, name))
        write_array(documents_file(self._folder, name), documents)
        hashes = hashes_file(self._folder, name)
        _temporary(hashes).write_bytes(self._hashes.getbuffer())
        _publish(hashes)
        self.shards.append(
            TaskShard(
                name=name,
                split=self._split,
                num_tokens=self._num_tokens,
                num_documents=documents.shape[1],
                sha256=self._digest.hexdigest(),
            )
        )
        self._open()

    def close(self) -> None:
        """Let go of a shard that will not be finished."""
        if self._file is not None:
            self._file.close()


def write_array(path: Path, array: npt.NDArray[Any]) -> str:
    """Write `array` under `path`, on disk when it returns; return its sha256."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    _temporary(path).write_bytes(buffer.getbuffer())
    _publish(path)
    return hashlib.sha256(buffer.getbuffer()).hexdigest()


def _write_all(file: BinaryIO, part: memoryview) -> None:
    """Write all of `part`; a full disk is an error here, and takes a part of it before."""
    while part:
        part = part[file.write(part) :]


def _temporary(path: Path) -> Path:
    # A worker may outlive its job for a moment: it must not write into the file of its successor.
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")


def _publish(path: Path) -> None:
    temporary = _temporary(path)
    fsync_file(temporary)
    temporary.replace(path)


def write_kept(
    source: Path,
    target: Path,
    dtype: np.dtype[Any],
    lengths: Numbers,
    kept: npt.NDArray[np.bool_],
) -> str:
    """Copy the documents of a shard that are kept, [documents]; return the copy's sha256."""
    tokens = np.memmap(source, dtype=dtype, mode="r")
    bounds = np.concatenate(([0], np.cumsum(lengths)))
    edges = np.flatnonzero(np.diff(np.concatenate(([False], kept, [False])).astype(np.int8)))
    digest = hashlib.sha256()
    with _temporary(target).open("wb") as file:
        for first, last in edges.reshape(-1, 2):
            for start in range(int(bounds[first]), int(bounds[last]), _COPY_BYTES):
                part = tokens[start : min(start + _COPY_BYTES, int(bounds[last]))]
                data = np.ascontiguousarray(part).data.cast("B")
                file.write(data)
                digest.update(data)
    _publish(target)
    return digest.hexdigest()
