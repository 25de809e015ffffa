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

from train.data.manifest import open_prepared
from train.data.prepare.finish import (
    BAD_RECORDS_FILE,
    FORMAT,
    FORMAT_VERSION,
    MANIFEST_FILE,
    digest_of,
)
from train.data.prepare.sources import WORK_FOLDER
from train.data.prepare.tokenizer import TOKENIZER_FILE
from train.errors import DataError


def verify_folder(folder: Path) -> list[str]:
    """Return what is wrong with a prepared folder: nothing, if it is whole.

    Raises: DataError if it is no prepared folder, or its manifest contradicts itself.
    """
    manifest = _read(folder)
    found = (manifest.get("format"), manifest.get("version"))
    if found != (FORMAT, FORMAT_VERSION):
        raise DataError(
            f"{folder / MANIFEST_FILE} is {found[0]} version {found[1]}, expected {FORMAT} version "
            f"{FORMAT_VERSION}"
        )
    # Without its tokenizer a corpus cannot be opened, and opening it shows that it fits itself.
    problems = list(_tokenizer_problems(folder, manifest.get("tokenizer")))
    if not problems:
        open_prepared(str(folder), dtype=None, cache=None)
        problems = [*_manifest_problems(folder, manifest), *_shard_problems(folder, manifest)]
    return problems


def stray_files(folder: Path) -> list[str]:
    """Return the names of what lies in a prepared folder and is no part of it.

    `folder` is one in which `verify_folder` found nothing wrong.
    """
    manifest = _read(folder)
    known = {MANIFEST_FILE, TOKENIZER_FILE, BAD_RECORDS_FILE, WORK_FOLDER}
    for shard in _shards(manifest):
        known |= {shard["file"], shard["documents_file"]}
    return sorted(path.name for path in folder.iterdir() if path.name not in known)


def _read(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST_FILE
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(
            f"{folder} is no prepared corpus, or not prepared to the end: it has no {path.name}"
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); prepare the corpus again") from error
    if not isinstance(manifest, dict):
        raise DataError(
            f"{path} holds a {type(manifest).__name__}, and an object is expected; prepare the "
            "corpus again"
        )
    return manifest


def _shards(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    return [shard for split in manifest["splits"].values() for shard in split["shards"]]


def _tokenizer_problems(folder: Path, tokenizer: object) -> Iterator[str]:
    if not isinstance(tokenizer, dict) or tokenizer.get("kind") == "bytes":
        return
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        yield f"{path} is missing"
    elif _sha256(path) != tokenizer.get("fingerprint"):
        yield f"{path} is not the one of the manifest: its sha256 is {_sha256(path)}"


def _manifest_problems(folder: Path, manifest: dict[str, Any]) -> Iterator[str]:
    path = folder / MANIFEST_FILE
    settings, counts = manifest.get("settings"), manifest.get("counts")
    if not isinstance(settings, dict) or not isinstance(counts, dict):
        yield f"{path} lacks settings or counts"
        return
    digest = digest_of(settings, manifest["tokenizer"]["fingerprint"], manifest["splits"])
    if digest != manifest["digest"]:
        yield f"{path} was edited: what it says has the digest {digest}, not {manifest['digest']}"
    num_documents = sum(split["num_documents"] for split in manifest["splits"].values())
    read, duplicates = counts.get("documents_read"), counts.get("duplicates")
    if not isinstance(read, int) or not isinstance(duplicates, int):
        yield f"{path} does not say how many documents were read"
    elif read - duplicates != num_documents:
        yield (
            f"{path} was edited: {read:,} documents were read and {duplicates:,} of them were "
            f"duplicates, but the splits have {num_documents:,}"
        )


def _shard_problems(folder: Path, manifest: dict[str, Any]) -> Iterator[str]:
    for shard in _shards(manifest):
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
