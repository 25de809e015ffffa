"""A prepared folder held against its manifest, byte by byte.

Owns what a whole corpus is. Called by `trimtab prepare --verify`; a run looks at sizes, and at
digests if `data.verify` says so.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from train.data.prepare.finish import FORMAT, FORMAT_VERSION, MANIFEST_FILE
from train.data.prepare.tokenizer import TOKENIZER_FILE
from train.errors import DataError


def verify_folder(folder: Path) -> list[str]:
    """Return what is wrong with a prepared folder: nothing, if it is whole.

    Raises: DataError if it is no prepared folder.
    """
    path = folder / MANIFEST_FILE
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(
            f"{folder} is no prepared corpus, or not prepared to the end: it has no {path.name}"
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); prepare the corpus again") from error
    found = (manifest.get("format"), manifest.get("version"))
    if found != (FORMAT, FORMAT_VERSION):
        raise DataError(
            f"{path} is {found[0]} version {found[1]}, expected {FORMAT} version {FORMAT_VERSION}"
        )
    return list(_problems(folder, manifest))


def _problems(folder: Path, manifest: dict[str, Any]) -> Iterator[str]:
    if manifest["tokenizer"]["kind"] != "bytes":
        path = folder / TOKENIZER_FILE
        if not path.is_file():
            yield f"{path} is missing"
        elif _sha256(path) != manifest["tokenizer"]["fingerprint"]:
            yield f"{path} is not the one of the manifest: its sha256 is {_sha256(path)}"
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            problems = [
                *_file_problems(folder / shard["file"], shard["num_bytes"], shard["sha256"]),
                *_file_problems(
                    folder / shard["documents_file"],
                    shard["documents_num_bytes"],
                    shard["documents_sha256"],
                ),
            ]
            yield from problems or _document_problems(folder, manifest, shard)


def _file_problems(path: Path, num_bytes: int, sha256: str) -> Iterator[str]:
    if not path.is_file():
        yield f"{path} is missing"
    elif path.stat().st_size != num_bytes:
        yield f"{path} has {path.stat().st_size:,} bytes, the manifest says {num_bytes:,}"
    elif _sha256(path) != sha256:
        yield f"{path} has other content: its sha256 is {_sha256(path)}, the manifest says {sha256}"


def _document_problems(
    folder: Path, manifest: dict[str, Any], shard: dict[str, Any]
) -> Iterator[str]:
    tokens = np.memmap(folder / shard["file"], dtype=manifest["dtype"], mode="r")
    path = folder / shard["documents_file"]
    starts, files, _ = np.load(path, mmap_mode="r")
    if starts[0] != 0 or np.any(np.diff(starts) <= 0) or starts[-1] >= len(tokens):
        yield f"{path}: documents do not begin one after the other"
        return
    last = np.append(starts[1:], len(tokens)) - 1
    wrong = np.count_nonzero(tokens[last] != manifest["tokenizer"]["separator_id"])
    if wrong:
        yield f"{folder / shard['file']}: {wrong:,} documents have no separator behind them"
    if files.min() < 0 or files.max() >= len(manifest["files"]):
        yield f"{path} names a file that the manifest does not"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
