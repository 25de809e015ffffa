"""Megatron-LM's indexed dataset: a `.bin` of tokens and an `.idx` that says where they lie.

Owns the layout of the `.idx`; refuses those whose parts contradict each other or the `.bin`.
Source: Megatron-LM, megatron/core/datasets/indexed_dataset.py (`_IndexWriter`): 9 bytes of magic,
uint64 version 1, uint8 code of the dtype, uint64 number of sequences, uint64 number of document
indices (one more than documents), then int32 lengths, int64 byte pointers of the sequences, and
the int64 numbers of the sequences with which documents begin, followed by that of the end. For
multimodal data an int8 mode a sequence follows.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from train.data import addresses
from train.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER_BYTES = 34
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
_FLOATS = {6: "float64", 7: "float32"}
_AGAIN = "make it again with Megatron's tools/preprocess_data.py"


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """What the head and the tail of an `.idx` say. `num_bytes`: of the `.idx` itself."""

    dtype: str
    num_sequences: int
    num_documents: int
    num_tokens: int
    num_bytes: int


def read_index(address: str) -> Index:
    """Read the head of a local or remote `.idx`, and the ends of its arrays.

    Raises: DataError if it is none, is cut off, or its counts contradict each other.
    """
    try:
        head = addresses.read(address, 0, HEADER_BYTES)
    except FileNotFoundError as error:
        raise DataError(
            f"{address} is missing: Megatron's .bin is read with the .idx of the same name; bring "
            "it back"
        ) from error
    num_bytes = addresses.num_bytes(address) or 0
    if len(head) < HEADER_BYTES or not head.startswith(MAGIC):
        raise DataError(
            f"{address} is no index of Megatron: it begins with {head[:9]!r}, {MAGIC!r} was "
            f"expected; {_AGAIN}"
        )
    _, version, code, num_sequences, num_indices = _HEADER.unpack(head)
    if version != 1:
        raise DataError(f"{address} has version {version}, 1 was expected; {_AGAIN}")
    if code not in _DTYPES:
        found = _FLOATS.get(code, f"dtype code {code}")
        raise DataError(
            f"{address} says that its tokens are {found}; one of {', '.join(_DTYPES.values())} was "
            f"expected; {_AGAIN}"
        )
    expected = HEADER_BYTES + 12 * num_sequences + 8 * num_indices
    if num_bytes not in (expected, expected + num_sequences) or not (num_sequences and num_indices):
        raise DataError(
            f"{address} has {num_bytes} bytes, its head speaks of {num_sequences} sequences and "
            f"{num_indices} document indices, which are {expected}; copy it again whole, or "
            f"{_AGAIN}"
        )
    item_bytes = np.dtype(_DTYPES[code]).itemsize
    lengths_end = HEADER_BYTES + 4 * num_sequences
    pointers_end = lengths_end + 8 * num_sequences
    (length,) = struct.unpack("<i", addresses.read(address, lengths_end - 4, lengths_end))
    (pointer,) = struct.unpack("<q", addresses.read(address, pointers_end - 8, pointers_end))
    (last,) = struct.unpack("<q", addresses.read(address, expected - 8, expected))
    if last != num_sequences or length < 0 or pointer < 0 or pointer % item_bytes:
        raise DataError(
            f"{address} is damaged: its documents end with sequence {last} of {num_sequences}, the "
            f"last of which has {length} tokens at byte {pointer}; {_AGAIN}"
        )
    return Index(
        dtype=_DTYPES[code],
        num_sequences=num_sequences,
        num_documents=num_indices - 1,
        num_tokens=pointer // item_bytes + length,
        num_bytes=num_bytes,
    )


def first_tokens_of(path: Path) -> npt.NDArray[np.int64]:
    """Return where each document begins, in tokens: int64 [num_documents], ascending.

    They are copied into memory, 8 bytes a document: in the file they lie behind an indirection and
    at odd addresses, where numpy would copy them for each search. Raises: DataError.
    """
    index = read_index(str(path))
    item_bytes = np.dtype(index.dtype).itemsize
    raw = np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
    pointers_begin = HEADER_BYTES + 4 * index.num_sequences
    pointers = np.frombuffer(raw, "<i8", index.num_sequences, pointers_begin)
    documents_begin = pointers_begin + 8 * index.num_sequences
    sequences = np.frombuffer(raw, "<i8", index.num_documents + 1, documents_begin)[:-1]
    if sequences.size and (sequences.min() < 0 or sequences.max() > index.num_sequences):
        raise DataError(f"{path} is damaged: a document begins outside its sequences; {_AGAIN}")
    # A last document without sequences begins where the tokens end.
    begins = np.full(sequences.size, index.num_tokens, dtype=np.int64)
    is_inside = sequences < index.num_sequences
    begins[is_inside] = pointers[sequences[is_inside]] // item_bytes
    if begins.size and (begins[0] != 0 or (np.diff(begins) < 0).any()):
        raise DataError(f"{path} is damaged: its documents are not in the order of the tokens")
    return begins
