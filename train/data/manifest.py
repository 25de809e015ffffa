"""The manifest of a prepared folder: reads it, and holds it against itself.

Refuses a manifest whose parts contradict each other: it was edited, or is not of this version.
Whether the shards are as it says is seen when they are opened. Called by `train.data.formats`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from train.data import addresses
from train.data.cache import ShardCache
from train.data.shards import Corpus, DocumentsFile, Shard, Split
from train.errors import DataError

MANIFEST = "manifest.json"
FORMAT = "trimtab-corpus"
VERSION = 1
DTYPES = ("uint16", "uint32")

_DIGEST = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")

Value = TypeVar("Value", int, str, list[Any], dict[str, Any])


_NOUNS = {"int": "a whole number", "str": "text", "list": "a list", "dict": "an object"}


class _DamageError(Exception):
    """What is wrong with a manifest, and what was expected; it never leaves this module."""


def open_prepared(folder: str, *, dtype: str | None, cache: ShardCache | None) -> Corpus:
    """Open a folder that preparation wrote, here or at a remote address.

    Raises: DataError if there is none, or it is not whole.
    """
    address = addresses.join(folder, MANIFEST)
    try:
        content = addresses.read(address)
    except FileNotFoundError as error:
        raise DataError(
            f"{address} is missing: {folder} is no prepared corpus, or its preparation did not "
            "end; prepare it again"
        ) from error
    try:
        corpus, has_tokenizer = _parse(json.loads(content), folder)
    except (ValueError, _DamageError) as error:
        raise DataError(
            f"{address} is damaged ({error}); delete {folder} and prepare the corpus again"
        ) from error
    if dtype is not None and dtype != corpus.dtype:
        raise DataError(
            f"{address} says that the tokens are {corpus.dtype}, data.token_dtype={dtype}; leave "
            "data.token_dtype out: a prepared corpus says it itself"
        )
    if not has_tokenizer:
        return corpus
    path = _tokenizer(folder, str(corpus.tokenizer_fingerprint), cache)
    return dataclasses.replace(corpus, tokenizer_path=path)


def _tokenizer(folder: str, fingerprint: str, cache: ShardCache | None) -> Path:
    """Return the local tokenizer.json, which is the one that the tokens were made with."""
    address = addresses.join(folder, "tokenizer.json")
    if addresses.is_remote(address):
        assert cache is not None, "open_corpus refuses remote corpora without a cache"
        return cache.path(address, None, fingerprint)
    try:
        found = hashlib.sha256(addresses.read(address)).hexdigest()
    except FileNotFoundError as error:
        raise DataError(
            f"{address} is missing; bring it back, or delete {folder} and prepare the corpus again"
        ) from error
    if found != fingerprint:
        raise DataError(
            f"{address} has the digest {found}, the tokens were made with {fingerprint}; bring "
            f"that one back, or delete {folder} and prepare the corpus again"
        )
    return Path(address)


def _parse(manifest: object, folder: str) -> tuple[Corpus, bool]:
    """Return the corpus, still without its tokenizer, and whether it has one."""
    fields = _as_object(manifest, "the manifest")
    if fields.get("format") != FORMAT:
        raise _DamageError(f"format is {fields.get('format')!r}, {FORMAT!r} was expected")
    version = _field(fields, "version", int)
    if version != VERSION:
        raise _DamageError(f"version is {version}, this Trimtab reads {VERSION}")
    dtype = _field(fields, "dtype", str)
    if dtype not in DTYPES:
        raise _DamageError(f"dtype is {dtype!r}, one of {', '.join(DTYPES)} was expected")
    vocab_size = _count(fields, "vocab_size", "")
    if not 1 <= vocab_size <= np.iinfo(dtype).max + 1:
        raise _DamageError(f"vocab_size is {vocab_size}, which {dtype} tokens do not hold")
    tokenizer = _field(fields, "tokenizer", dict)
    splits = _field(fields, "splits", dict)
    item_bytes = np.dtype(dtype).itemsize
    train = _split(_field(splits, "train", dict, "splits."), "train", folder, item_bytes)
    validation = None
    if "validation" in splits:
        of_split = _field(splits, "validation", dict, "splits.")
        validation = _split(of_split, "validation", folder, item_bytes)
    separator_id = _count(tokenizer, "separator_id", "tokenizer.")
    if separator_id >= vocab_size:
        raise _DamageError(f"tokenizer.separator_id is {separator_id}, vocab_size {vocab_size}")
    corpus = Corpus(
        address=folder,
        digest=_digest(fields, "digest", ""),
        dtype=dtype,
        vocab_size=vocab_size,
        tokenizer_path=None,
        tokenizer_fingerprint=_digest(tokenizer, "fingerprint", "tokenizer."),
        separator_id=separator_id,
        train=train,
        validation=validation if validation is not None and validation.shards else None,
        files=tuple(str(name) for name in _field(fields, "files", list)),
    )
    return corpus, _field(tokenizer, "kind", str, "tokenizer.") != "bytes"


def _split(fields: Mapping[str, Any], name: str, folder: str, item_bytes: int) -> Split:
    place = f"splits.{name}."
    shards = tuple(
        _shard(_as_object(entry, f"{place}shards[{number}]"), folder, item_bytes, place)
        for number, entry in enumerate(_field(fields, "shards", list, place))
    )
    split = Split(shards=shards, num_documents=_count(fields, "num_documents", place))
    num_documents = sum(shard.documents.num_documents for shard in shards if shard.documents)
    for key, total in (("num_tokens", split.num_tokens), ("num_documents", num_documents)):
        if _count(fields, key, place) != total:
            raise _DamageError(f"{place}{key} is {fields[key]}, its shards have {total} together")
    return split


def _shard(fields: Mapping[str, Any], folder: str, item_bytes: int, place: str) -> Shard:
    name = _file_name(fields, "file", place)
    place = f"{place}{name}."
    num_tokens = _count(fields, "num_tokens", place)
    num_bytes = _count(fields, "num_bytes", place)
    if num_bytes != num_tokens * item_bytes:
        raise _DamageError(
            f"{place}num_bytes is {num_bytes}, {num_tokens} tokens are {num_tokens * item_bytes}"
        )
    documents = DocumentsFile(
        address=addresses.join(folder, _file_name(fields, "documents_file", place)),
        num_documents=_count(fields, "num_documents", place),
        num_bytes=_count(fields, "documents_num_bytes", place),
        sha256=_digest(fields, "documents_sha256", place),
    )
    return Shard(
        address=addresses.join(folder, name),
        num_tokens=num_tokens,
        num_bytes=num_bytes,
        sha256=_digest(fields, "sha256", place),
        documents=documents,
    )


def _as_object(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _DamageError(f"{what} is {type(value).__name__}, an object was expected")
    return value


def _field(fields: Mapping[str, Any], key: str, kind: type[Value], place: str = "") -> Value:
    if key not in fields:
        raise _DamageError(f"{place}{key} is missing")
    value = fields[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise _DamageError(f"{place}{key} is {value!r:.60}, {_NOUNS[kind.__name__]} was expected")
    return value


def _count(fields: Mapping[str, Any], key: str, place: str) -> int:
    value = _field(fields, key, int, place)
    if value < 0:
        raise _DamageError(f"{place}{key} is {value}, a count was expected")
    return value


def _digest(fields: Mapping[str, Any], key: str, place: str) -> str:
    value = _field(fields, key, str, place)
    if not _DIGEST.fullmatch(value):
        raise _DamageError(f"{place}{key} is {value!r:.60}, 64 hex digits were expected")
    return value


def _file_name(fields: Mapping[str, Any], key: str, place: str) -> str:
    """A name with a path in it could lead out of the folder."""
    value = _field(fields, key, str, place)
    if not _NAME.fullmatch(value):
        raise _DamageError(f"{place}{key} is {value!r:.60}, a plain file name was expected")
    return value
