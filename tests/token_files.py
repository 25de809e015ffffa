"""Writes files of tokens as Trimtab's preparation and other tools do, for tests."""

from __future__ import annotations

import hashlib
import json
import random
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.data.shards import Corpus, DocumentsFile, Shard, Split

Documents = Sequence[Sequence[int]]
MEGATRON_CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}


def random_shards(
    seed: int, *, num_shards: int = 4, vocab_size: int = 1000
) -> list[list[list[int]]]:
    """Return the documents of some shards, of any length from 1 token on."""
    source = random.Random(seed)
    return [
        [
            source.choices(range(vocab_size), k=source.choice([1, 2, 3, 8, 40]))
            for _ in range(source.randrange(1, 12))
        ]
        for _ in range(num_shards)
    ]


def all_tokens(shards: Sequence[Documents]) -> list[int]:
    """Return the tokens of shards, one after the other."""
    return [token for documents in shards for document in documents for token in document]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_shard(folder: Path, name: str, documents: Documents, dtype: str) -> dict[str, Any]:
    """Write a shard and its documents; return its entry of the manifest."""
    tokens, index = folder / f"{name}.bin", folder / f"{name}.documents.npy"
    np.array(all_tokens([documents]), dtype=dtype).tofile(tokens)
    lengths = [len(document) for document in documents]
    count = len(lengths)
    first_tokens = np.cumsum([0, *lengths], dtype=np.int64)[:-1]
    numbers = np.arange(count, dtype=np.int64)
    np.save(index, np.stack([first_tokens, numbers % 2, numbers // 2]))
    return {
        "file": tokens.name,
        "num_tokens": sum(lengths),
        "num_documents": count,
        "num_bytes": tokens.stat().st_size,
        "sha256": sha256(tokens),
        "documents_file": index.name,
        "documents_num_bytes": index.stat().st_size,
        "documents_sha256": sha256(index),
    }


def write_prepared(
    folder: Path,
    train: Sequence[Documents],
    validation: Sequence[Documents] = (),
    *,
    dtype: str = "uint16",
    tokenizer: str | None = None,
) -> dict[str, Any]:
    """Write a prepared folder; return its manifest. Document d is of file d % 2, line d // 2."""
    folder.mkdir(parents=True, exist_ok=True)
    splits = {}
    for split, shards in (("train", train), ("validation", validation)):
        entries = [
            write_shard(folder, f"{split}-{number:05}", documents, dtype)
            for number, documents in enumerate(shards)
        ]
        splits[split] = {
            "num_tokens": sum(entry["num_tokens"] for entry in entries),
            "num_documents": sum(entry["num_documents"] for entry in entries),
            "shards": entries,
        }
    if tokenizer is not None:
        (folder / "tokenizer.json").write_text(tokenizer)
    manifest = {
        "format": "trimtab-corpus",
        "version": 1,
        "digest": hashlib.sha256(json.dumps(splits).encode()).hexdigest(),
        "dtype": dtype,
        "vocab_size": 1000,
        "tokenizer": {
            "kind": "bytes" if tokenizer is None else "bpe",
            "fingerprint": hashlib.sha256((tokenizer or "bytes").encode()).hexdigest(),
            "separator": "<|endoftext|>",
            "separator_id": 999,
        },
        "splits": splits,
        "files": ["a.jsonl", "b.jsonl"],
        "counts": {},
        "settings": {},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return manifest


def write_megatron(
    prefix: Path, documents: Sequence[Sequence[Sequence[int]]], dtype: str = "uint16"
) -> None:
    """Write documents, each of some sequences of tokens, as Megatron's builder does."""
    sequences = [sequence for document in documents for sequence in document]
    ends = np.cumsum([0, *(len(document) for document in documents)], dtype=np.int64)
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int32)
    item_bytes = np.dtype(dtype).itemsize
    pointers = np.cumsum([0, *lengths.tolist()], dtype=np.int64)[:-1] * item_bytes
    np.array(all_tokens(documents), dtype=dtype).tofile(f"{prefix}.bin")
    head = b"MMIDIDX\x00\x00" + struct.pack("<QB", 1, MEGATRON_CODES[dtype])
    head += struct.pack("<QQ", len(sequences), len(ends))
    body = lengths.tobytes() + pointers.tobytes() + ends.tobytes()
    Path(f"{prefix}.idx").write_bytes(head + body)


def write_llm_c(path: Path, tokens: Sequence[int], *, magic: int = 20240520) -> None:
    """Write tokens with the header of llm.c: uint16 for GPT-2's magic, uint32 for Llama 3's."""
    version, dtype = {20240520: (1, "uint16"), 20240801: (7, "uint32")}[magic]
    header = np.zeros(256, dtype=np.int32)
    header[:3] = magic, version, len(tokens)
    path.write_bytes(header.tobytes() + np.array(tokens, dtype=dtype).tobytes())


def corpus_of(shards: Sequence[Shard], *, dtype: str = "uint16", digest: str = "d") -> Corpus:
    """Return a corpus of shards that no file describes."""
    return Corpus(
        address="somewhere",
        digest=digest,
        dtype=dtype,
        vocab_size=None,
        tokenizer_path=None,
        tokenizer_fingerprint=None,
        separator_id=None,
        train=Split(shards=tuple(shards)),
        files=("a.jsonl", "b.jsonl"),
    )


def shard_of(folder: Path, name: str, documents: Documents, dtype: str = "uint16") -> Shard:
    """Write a shard and return what a manifest would say of it."""
    entry = write_shard(folder, name, documents, dtype)
    return Shard(
        address=str(folder / entry["file"]),
        num_tokens=entry["num_tokens"],
        num_bytes=entry["num_bytes"],
        sha256=entry["sha256"],
        documents=DocumentsFile(
            address=str(folder / entry["documents_file"]),
            num_documents=entry["num_documents"],
            num_bytes=entry["documents_num_bytes"],
            sha256=entry["documents_sha256"],
        ),
    )
