"""Which pieces of documents make up which row: best-fit packing, planned once and kept on disk.

Owns the cutting of documents into pieces, the packing of pieces into rows, and the files of a plan.
A plan is a function of the documents' lengths and of the row's alone. Called by `packing`; every
process may call it: a file lock lets one work while the others wait, with no process group.

Source: Ding et al., Fewer Truncations Improve Language Modeling, arXiv 2404.10830, section 3.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from train.data.store import TokenStore
from train.durable import fsync_file, fsync_folder, write_json
from train.errors import DataError

logger = logging.getLogger(__name__)

PLAN_VERSION = 1
"""Raised when the same documents give other rows: a run under way cannot go on with those."""

# Pieces that are packed together. It bounds memory, and how far apart the pieces of a row lie.
_WINDOW_PIECES = 1 << 17
# The index of documents is read in parts of so many tokens.
_STRETCH_TOKENS = 1 << 24
_FILES = ("offsets", "lengths", "firsts", "row_lengths")

Integer = TypeVar("Integer", np.int32, np.int64)
Ints = npt.NDArray[np.integer]
Offsets = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackingPlan:
    """The rows of a split; row r has the pieces `firsts[r]` to `firsts[r + 1]`, by offset.

    `offsets`, int64, and `lengths`, int32: of each piece. `firsts`: int64 [num_rows + 1].
    `row_lengths`: int32 [num_rows], the tokens of each row together.
    """

    offsets: Offsets
    lengths: npt.NDArray[np.int32]
    firsts: Offsets
    row_lengths: npt.NDArray[np.int32]
    num_documents: int
    num_documents_cut: int
    num_tokens: int

    @property
    def num_rows(self) -> int:
        """How many rows there are."""
        return len(self.row_lengths)


def best_fit(lengths: Ints, capacity: int) -> Offsets:
    """Return the row of each piece: int64 [n], rows numbered as they are begun.

    Best fit, the longest piece first: each goes into the fullest row that still has room for it.
    """
    rooms: list[list[int]] = [[] for _ in range(capacity)]
    rooms_open = 0  # bit r: a row has room for r more tokens
    num_rows = 0
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    rows = []
    for length in lengths[order].tolist():
        fitting = rooms_open >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = rooms[room].pop()
            if not rooms[room]:
                rooms_open ^= 1 << room
        else:
            room, row = capacity, num_rows
            num_rows += 1
        room -= length
        if room:
            if not rooms[room]:
                rooms_open |= 1 << room
            rooms[room].append(row)
        rows.append(row)
    placed = np.empty(len(lengths), dtype=np.int64)
    placed[order] = rows
    return placed


def pieces_of(begins: Offsets, ends: Offsets, capacity: int) -> tuple[Offsets, Ints]:
    """Return offset and length of the pieces of documents, in order.

    A document longer than `capacity` is cut every `capacity` tokens, without an overlap: a token
    shared by two pieces would be predicted twice where the second one follows another document.
    """
    counts = -(-(ends - begins) // capacity)
    documents = np.repeat(np.arange(len(begins)), counts)
    ranks = np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)
    offsets = begins[documents] + ranks * capacity
    return offsets, np.minimum(ends[documents] - offsets, capacity).astype(np.int32)


def rows_of(offsets: Offsets, lengths: Ints, capacity: int) -> tuple[Offsets, Ints, Offsets]:
    """Return the pieces of one window, row after row, and how many each row has.

    Rows are in the order of their first pieces, and each row's pieces in the order of the corpus.
    """
    is_short = lengths < capacity
    rows = np.empty(len(lengths), dtype=np.int64)
    rows[is_short] = best_fit(lengths[is_short], capacity)
    num_packed = int(rows[is_short].max(initial=-1)) + 1
    rows[~is_short] = num_packed + np.arange(np.count_nonzero(~is_short))
    _, first_pieces, numbers = np.unique(rows, return_index=True, return_inverse=True)
    ranks = np.empty(len(first_pieces), dtype=np.int64)
    ranks[np.argsort(first_pieces)] = np.arange(len(first_pieces))
    rows = ranks[numbers]
    order = np.argsort(rows, kind="stable")
    return offsets[order], lengths[order], np.bincount(rows)


def load_plan(
    store: TokenStore, *, identity: str, capacity: int, cache_folder: Path
) -> PackingPlan:
    """Return the plan for rows of `capacity` tokens, and make it first if it is not there.

    `identity`: what the tokens of `store` are, digest and split. Raises: DataError if the plan
    cannot be written, or is damaged.
    """
    key = json.dumps([PLAN_VERSION, identity, capacity, _WINDOW_PIECES])
    name = f"packing-{hashlib.sha256(key.encode()).hexdigest()[:20]}"
    folder = cache_folder / name
    if not (folder / "manifest.json").exists():
        try:
            cache_folder.mkdir(parents=True, exist_ok=True)
            with _locked(cache_folder / f"{name}.lock"):
                if not (folder / "manifest.json").exists():  # another process may have made it
                    _build(store, folder, key, capacity)
        except OSError as error:
            raise DataError(
                f"the packing plan could not be written to {cache_folder} ({error.strerror}); set "
                "data.cache_dir to a disk with room that you may write to"
            ) from error
    return _open(folder, key)


def _build(store: TokenStore, folder: Path, key: str, capacity: int) -> None:
    started = time.monotonic()
    for leftover in folder.parent.glob(f".{folder.name}.*.tmp"):  # of a killed process
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        manifest = _write(store, temporary, capacity)
        for name in _FILES:
            fsync_file(temporary / name)
        write_json(temporary / "manifest.json", {"key": key, **manifest})
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
        fsync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    seconds = time.monotonic() - started
    logger.info("packed %s tokens in %.1f s: %s", f"{store.num_tokens:,}", seconds, folder)


def describe(plan: PackingPlan, capacity: int) -> str:
    """Return a plan in one line, for people."""
    filled = plan.num_tokens / max(1, plan.num_rows * capacity)
    cut = plan.num_documents_cut
    return (
        f"{plan.num_rows:,} rows of {capacity} tokens, {filled:.2%} full, from "
        f"{plan.num_documents:,} documents, of which {cut:,} are longer and cut"
    )


def _write(store: TokenStore, folder: Path, capacity: int) -> dict[str, int]:
    counts = dict.fromkeys(("documents", "documents_cut", "pieces", "rows"), 0)

    def pieces() -> Iterator[tuple[Offsets, Ints]]:
        for begins, ends in _documents(store):
            counts["documents"] += len(begins)
            counts["documents_cut"] += int(np.count_nonzero(ends - begins > capacity))
            yield pieces_of(begins, ends, capacity)

    with ExitStack() as stack:
        files = {name: stack.enter_context((folder / name).open("wb")) for name in _FILES}
        for offsets, lengths in _windows(pieces()):
            offsets, lengths, num_pieces = rows_of(offsets, lengths, capacity)
            firsts = np.cumsum(num_pieces) - num_pieces
            columns: list[Ints] = [
                offsets.astype(np.int64),
                lengths.astype(np.int32),
                firsts.astype(np.int64) + counts["pieces"],
                np.add.reduceat(lengths, firsts).astype(np.int32),
            ]
            for file, column in zip(files.values(), columns, strict=True):
                file.write(column.tobytes())
            counts["pieces"] += len(offsets)
            counts["rows"] += len(firsts)
        files["firsts"].write(np.int64(counts["pieces"]).tobytes())
    return {"tokens": store.num_tokens, **counts}


def _documents(store: TokenStore) -> Iterator[tuple[Offsets, Offsets]]:
    """Yield begins and ends of the documents of one stretch of tokens after the other."""
    open_begin = np.zeros(min(1, store.num_tokens), dtype=np.int64)  # tokens before any are one too
    for start in range(0, store.num_tokens, _STRETCH_TOKENS):
        first = max(0, start - 1)  # the first column of a row is no sign of a document
        length = min(start + _STRETCH_TOKENS, store.num_tokens) - first
        columns = store.document_starts(np.array([first]), length)[0, 1:]
        begins = np.concatenate((open_begin, first + columns[columns < length].astype(np.int64)))
        yield begins[:-1], begins[1:]
        open_begin = begins[-1:]
    if store.num_tokens:
        yield open_begin, np.array([store.num_tokens], dtype=np.int64)


def _windows(pieces: Iterator[tuple[Offsets, Ints]]) -> Iterator[tuple[Offsets, Ints]]:
    """Yield the same pieces, `_WINDOW_PIECES` at a time; the last ones may be fewer."""
    offsets, lengths = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int32)
    for new_offsets, new_lengths in pieces:
        offsets = np.concatenate((offsets, new_offsets))
        lengths = np.concatenate((lengths, new_lengths))
        start = 0
        while len(offsets) - start >= _WINDOW_PIECES:
            stop = start + _WINDOW_PIECES
            yield offsets[start:stop], lengths[start:stop]
            start = stop
        offsets, lengths = offsets[start:], lengths[start:]
    if len(offsets):
        yield offsets, lengths


def _open(folder: Path, key: str) -> PackingPlan:
    """Map a plan into memory; nothing of it is read."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if manifest["key"] != key:
            raise ValueError(f"it is of {manifest['key']}, not of {key}")
        num_pieces, num_rows = int(manifest["pieces"]), int(manifest["rows"])
        return PackingPlan(
            offsets=_mapped(folder / "offsets", np.int64, num_pieces),
            lengths=_mapped(folder / "lengths", np.int32, num_pieces),
            firsts=_mapped(folder / "firsts", np.int64, num_rows + 1),
            row_lengths=_mapped(folder / "row_lengths", np.int32, num_rows),
            num_documents=manifest["documents"],
            num_documents_cut=manifest["documents_cut"],
            num_tokens=manifest["tokens"],
        )
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"the packing plan {folder} is damaged ({error}); delete it and it is made anew"
        ) from error


def _mapped(path: Path, dtype: type[Integer], size: int) -> npt.NDArray[Integer]:
    num_bytes, expected = path.stat().st_size, size * np.dtype(dtype).itemsize
    if num_bytes != expected:
        raise ValueError(f"{path.name} has {num_bytes} bytes instead of {expected}")
    if size == 0:
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r", shape=(size,)).view(np.ndarray)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`; it is freed when the process ends, however it ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
