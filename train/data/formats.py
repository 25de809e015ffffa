"""Which tokens a path means: a folder that Trimtab prepared, or token files of other tools.

Owns the reading of manifests and headers. Refuses what contradicts itself, with one message that
names the file; tokens are not read here, but for the ends of foreign files, which stand for their
identity. Called when a run or the preparation looks at `data.paths`.
"""

from __future__ import annotations

import ast
import glob
import hashlib
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from train.data import addresses, megatron
from train.data.cache import ShardCache
from train.data.manifest import FORMAT, MANIFEST, open_prepared
from train.data.shards import Corpus, DocumentsFile, Shard, Split
from train.errors import DataError

_SUFFIXES = (".bin", ".idx", ".npy")
_INTEGERS = ("uint8", "uint16", "uint32", "int8", "int16", "int32", "int64")
_RAW_DTYPE = "uint16"
_END_BYTES = 65_536
# Upper halves of ids are below 16 in vocabularies of up to a million; so many show that they are.
_HIGH_HALF_BELOW = 16
_HALVES_TOLD = 64

# Source: llm.c, dev/data/data_common.py (HEADERS_INFO): magic, version and dtype; 256 int32 in all,
# the third of which is the number of tokens.
_LLM_C = {20240520: (1, "uint16"), 20240801: (7, "uint32")}
_LLM_C_HEADER_BYTES = 1024

_FILE_SUFFIX = re.compile(r"\.[A-Za-z]\w*$")

_Kind = Literal["Megatron", "llm.c", "raw", "npy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _TokenFile:
    """What one foreign file is. `dtype`: None if it does not say."""

    kind: _Kind
    dtype: str | None
    shard: Shard


def is_tokens(path: str) -> bool:
    """Return whether `path` means tokens: a prepared folder, or `.bin`, `.idx` and `.npy` files.

    Raises: DataError if a remote folder cannot be asked.
    """
    if path.endswith(_SUFFIXES):
        return True
    if addresses.is_remote(path):
        # Of files, some servers say only that they may not be read: what has a suffix is not asked.
        is_folder = not (_FILE_SUFFIX.search(path) or glob.has_magic(path))
        return is_folder and _has_manifest(path)
    local = Path(path).expanduser()
    return _has_manifest(str(local)) or _is_megatron_prefix(local)


def open_corpus(
    path: str | Sequence[str], *, dtype: str | None, cache: ShardCache | None
) -> Corpus:
    """Open the corpus that `path` means; several paths or a glob are the shards of one.

    `dtype` (data.token_dtype): of files that do not say theirs; others must have it. `cache`:
    where a remote corpus is kept. Raises: DataError.
    """
    if dtype is not None and dtype not in _INTEGERS:
        raise DataError(f"data.token_dtype={dtype} is none of {', '.join(_INTEGERS)}")
    paths = [path] if isinstance(path, str) else list(path)
    if any(addresses.is_remote(each) for each in paths) and cache is None:
        raise DataError(f"{paths[0]} is remote; set data.cache_dir, where its files are to be kept")
    folders = [each for each in paths if not each.endswith(_SUFFIXES)]
    if folders and len(paths) > 1:
        raise DataError(
            f"data.paths: {folders[0]} is a corpus of its own, one of {len(paths)} paths; give "
            "each corpus as one of data.sources"
        )
    if len(paths) == 1 and not paths[0].endswith(_SUFFIXES):
        local = Path(paths[0]).expanduser()
        if not (not addresses.is_remote(paths[0]) and _is_megatron_prefix(local)):
            folder = paths[0] if addresses.is_remote(paths[0]) else str(local)
            return open_prepared(folder, dtype=dtype, cache=cache)
        paths = [f"{local}.bin"]
    return _open_foreign(paths, dtype)


def _has_manifest(folder: str) -> bool:
    """A manifest of ours, whole or not; extensions of browsers have one of the same name."""
    try:
        return FORMAT.encode() in addresses.read(addresses.join(folder, MANIFEST))
    except FileNotFoundError:
        return False


def _is_megatron_prefix(path: Path) -> bool:
    """Megatron names a data set by what the names of its two files have in common."""
    return not path.exists() and path.with_name(f"{path.name}.idx").is_file()


def _open_foreign(paths: Sequence[str], dtype: str | None) -> Corpus:
    found = {match for path in paths for match in addresses.find(path)}
    names = sorted({f"{name[:-4]}.bin" if name.endswith(".idx") else name for name in found})
    if not names:
        raise DataError(f"data.paths: {', '.join(paths)} cannot be found; check the glob")
    files = addresses.for_each(lambda name: _look_at(name, dtype), names)
    first = files[0]
    for file in files:
        if (file.kind, file.dtype) != (first.kind, first.dtype):
            raise DataError(
                f"{file.shard.address} holds {file.dtype} tokens in {file.kind} format, "
                f"{first.shard.address} {first.dtype} in {first.kind} format; the shards of one "
                "corpus are of one kind: make them two of data.sources"
            )
    if dtype is not None and dtype != first.dtype:
        raise DataError(
            f"{first.shard.address} says that its tokens are {first.dtype}, "
            f"data.token_dtype={dtype}; leave data.token_dtype out, or check the file"
        )
    shards = tuple(file.shard for file in files)
    counts = [shard.documents.num_documents for shard in shards if shard.documents is not None]
    return Corpus(
        address=paths[0],
        digest=_digest(first.kind, str(first.dtype), shards),
        dtype=str(first.dtype),
        vocab_size=None,
        tokenizer_path=None,
        tokenizer_fingerprint=None,
        separator_id=None,
        train=Split(
            shards=shards, num_documents=sum(counts) if len(counts) == len(shards) else None
        ),
    )


def _look_at(address: str, dtype: str | None) -> _TokenFile:
    num_bytes = addresses.num_bytes(address)
    if num_bytes is None:
        raise DataError(
            f"data.paths: {address} cannot be found, or its server does not tell its size; check "
            "the path"
        )
    index = f"{address.removesuffix('.bin')}.idx"
    if address.endswith(".bin") and addresses.num_bytes(index) is not None:
        return _megatron_file(address, num_bytes, index)
    head = addresses.read(address, 0, _LLM_C_HEADER_BYTES)
    if address.endswith(".npy"):
        return _npy_file(address, num_bytes, head)
    magic, version, num_tokens = struct.unpack("<3i", head[:12].ljust(12, b"\0"))
    if len(head) == _LLM_C_HEADER_BYTES and magic in _LLM_C:
        return _llm_c_file(address, num_bytes, magic, version, num_tokens)
    if dtype is None and _looks_like_32_bits(head):
        raise DataError(
            f"{address} seems to hold 32-bit tokens, every second 16-bit number at its begin being "
            "(nearly) 0; set data.token_dtype=uint32, or uint16 if it is as it should be"
        )
    return _raw_file(address, num_bytes, dtype or _RAW_DTYPE)


def _looks_like_32_bits(head: bytes) -> bool:
    """Return whether 16-bit numbers look like lower and upper halves, of which one is near 0."""
    numbers = np.frombuffer(head[: len(head) // 4 * 4], dtype="<u2")
    low, high = numbers[::2], numbers[1::2]
    return len(high) >= _HALVES_TOLD and bool(high.max() < _HIGH_HALF_BELOW <= low.max())


def _raw_file(address: str, num_bytes: int, dtype: str) -> _TokenFile:
    item_bytes = np.dtype(dtype).itemsize
    if not num_bytes:
        raise DataError(f"{address} is empty; copy it again, or take it out of data.paths")
    if num_bytes % item_bytes:
        raise DataError(
            f"{address} has {num_bytes:,} bytes, which is no whole number of {dtype} tokens; copy "
            "it again whole, or set data.token_dtype to what it holds"
        )
    shard = Shard(address=address, num_tokens=num_bytes // item_bytes, num_bytes=num_bytes)
    return _TokenFile(kind="raw", dtype=dtype, shard=shard)


def _llm_c_file(
    address: str, num_bytes: int, magic: int, version: int, num_tokens: int
) -> _TokenFile:
    expected_version, dtype = _LLM_C[magic]
    if version != expected_version:
        raise DataError(
            f"{address} has version {version} of llm.c's format {magic}, {expected_version} was "
            "expected; make it again with llm.c's dev/data scripts"
        )
    expected = _LLM_C_HEADER_BYTES + num_tokens * np.dtype(dtype).itemsize
    if num_bytes != expected or num_tokens < 1:
        raise DataError(
            f"{address} has {num_bytes:,} bytes, its header speaks of {num_tokens:,} {dtype} "
            f"tokens, which are {expected:,}; copy it again whole"
        )
    shard = Shard(
        address=address,
        num_tokens=num_tokens,
        num_bytes=num_bytes,
        byte_offset=_LLM_C_HEADER_BYTES,
    )
    return _TokenFile(kind="llm.c", dtype=dtype, shard=shard)


def _megatron_file(address: str, num_bytes: int, index_address: str) -> _TokenFile:
    index = megatron.read_index(index_address)
    expected = index.num_tokens * np.dtype(index.dtype).itemsize
    if num_bytes != expected or not num_bytes:
        raise DataError(
            f"{address} has {num_bytes:,} bytes, {index_address} speaks of {index.num_tokens:,} "
            f"{index.dtype} tokens, which are {expected:,}; copy both again whole"
        )
    documents = DocumentsFile(
        address=index_address, num_documents=index.num_documents, num_bytes=index.num_bytes
    )
    shard = Shard(
        address=address, num_tokens=index.num_tokens, num_bytes=num_bytes, documents=documents
    )
    return _TokenFile(kind="Megatron", dtype=index.dtype, shard=shard)


def _npy_file(address: str, num_bytes: int, head: bytes) -> _TokenFile:
    """Source: numpy.lib.format: 6 bytes of magic, 2 of version, length of the head, the head."""
    if not head.startswith(b"\x93NUMPY"):
        raise DataError(f"{address} is no .npy file: it begins with {head[:6]!r}; check data.paths")
    length_bytes = 2 if head[6:7] == b"\x01" else 4
    offset = 8 + length_bytes + int.from_bytes(head[8 : 8 + length_bytes], "little")
    try:
        fields = ast.literal_eval(head[8 + length_bytes : offset].decode("latin1"))
        dtype, shape = np.dtype(fields["descr"]), tuple(fields["shape"])
    except (ValueError, SyntaxError, KeyError, TypeError) as error:
        raise DataError(
            f"{address} is damaged: its head cannot be read ({error}); copy it again whole"
        ) from error
    if dtype.name not in _INTEGERS or dtype.byteorder == ">":
        order = "big-endian " if dtype.byteorder == ">" else ""
        raise DataError(
            f"{address} holds {order}{dtype.name}, tokens of one of {', '.join(_INTEGERS)}, "
            "little-endian, were expected; save the array again with numpy's astype"
        )
    if len(shape) != 1 or shape[0] < 1:
        raise DataError(
            f"{address} has the shape {list(shape)}, a row of tokens was expected; save the array "
            "again after numpy's ravel"
        )
    expected = offset + shape[0] * dtype.itemsize
    if num_bytes != expected:
        raise DataError(
            f"{address} has {num_bytes:,} bytes, its head speaks of {shape[0]:,} {dtype.name} "
            f"tokens, which are {expected:,}; copy it again whole"
        )
    shard = Shard(address=address, num_tokens=shape[0], num_bytes=num_bytes, byte_offset=offset)
    return _TokenFile(kind="npy", dtype=dtype.name, shard=shard)


def _digest(kind: str, dtype: str, shards: Sequence[Shard]) -> str:
    """Stand for the tokens by the names, sizes and ends of their files; all would take hours."""
    digest = hashlib.sha256(f"{kind}\0{dtype}\n".encode())
    for shard, ends in zip(shards, addresses.for_each(_ends, shards), strict=True):
        digest.update(f"{addresses.base_name(shard.address)}\0{shard.num_bytes}\n".encode())
        digest.update(ends)
    return digest.hexdigest()


def _ends(shard: Shard) -> bytes:
    last = max(0, shard.num_bytes - _END_BYTES)
    head = addresses.read(shard.address, 0, _END_BYTES)
    return head + addresses.read(shard.address, last, shard.num_bytes)
