"""What text a corpus has: which files its paths mean, and what kind each is.

Owns the order of files, on which the order of documents depends: that of their addresses. Refuses
what is not text rather than train on it. Called by preparation.
"""

from __future__ import annotations

import json
import logging
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from train.data.prepare.inputs import (
    Found,
    expand,
    find_file,
    is_folder,
    open_binary,
    walk,
)
from train.errors import DataError

logger = logging.getLogger(__name__)


class Format(StrEnum):
    """How documents lie in a file."""

    TEXT = "text"
    JSONL = "jsonl"
    PARQUET = "parquet"
    ARROW = "arrow"


# What is read of a folder; a file that is named outright is read whatever its suffix.
_TEXT_SUFFIXES = frozenset(
    {
        *(".txt", ".text", ".md", ".rst", ".tex", ".html", ".xml", ".csv", ".json", ".jsonl"),
        *(".yaml", ".yml", ".toml", ".py", ".pyi", ".ipynb", ".c", ".h", ".cc", ".cpp", ".hpp"),
        *(".cu", ".java", ".kt", ".scala", ".js", ".jsx", ".ts", ".tsx", ".go", ".rs", ".rb"),
        *(".php", ".cs", ".swift", ".lua", ".r", ".jl", ".hs", ".ml", ".sh", ".sql", ".ndjson"),
    }
)
_JSONL_SUFFIXES = frozenset({".jsonl", ".ndjson"})
_COLUMN_SUFFIXES = {".parquet": Format.PARQUET, ".arrow": Format.ARROW}
_PACKINGS = {".gz": "gz", ".zst": "zst", ".bz2": "bz2", ".xz": "xz"}
_ARCHIVES = frozenset({".zip", ".tar", ".tgz", ".7z", ".rar"})
_PASSED_BY = frozenset({"__pycache__"})
_NOT_LIBRARY = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """A file with text: where it is, its size and stamp, how documents lie in it, how packed."""

    address: str
    num_bytes: int
    stamp: str
    format: Format
    packing: str = ""

    def as_json(self) -> list[Any]:
        """Return the file as a plan keeps it."""
        return [self.address, self.num_bytes, self.stamp, str(self.format), self.packing]

    @classmethod
    def of_json(cls, values: Sequence[Any]) -> SourceFile:
        """Return what `as_json` was asked of."""
        address, num_bytes, stamp, kind, packing = values
        return cls(
            address=address,
            num_bytes=num_bytes,
            stamp=stamp,
            format=Format(kind),
            packing=packing,
        )


def list_sources(paths: Sequence[str], *, but: str | None = None) -> list[SourceFile]:
    """Return the files of a corpus, sorted by address; no paths mean the standard library.

    `but`: a folder that is passed by, since the corpus is written there. Raises: DataError if there
    are none, or one is nothing to read.
    """
    if not paths:
        return standard_library()
    found: dict[str, Found] = {}
    missing: list[str] = []
    for pattern in paths:
        for address in expand(pattern):
            if is_folder(address):
                found |= _of_folder(address, but)
            elif file := find_file(address):
                found[file.address] = file
            else:
                missing.append(address)
    if missing:
        raise DataError(f"data.paths: {', '.join(missing[:5])} cannot be found; check the globs")
    archives = [address for address in sorted(found) if _suffix(address) in _ARCHIVES]
    if archives:
        raise DataError(f"data.paths: {', '.join(archives[:5])} is an archive; unpack it to files")
    if not found:
        raise DataError(
            f"data.paths={list(paths)} holds no text files; text is expected in "
            f"{', '.join(sorted(_TEXT_SUFFIXES | _COLUMN_SUFFIXES.keys()))}, packed with "
            f"{', '.join(_PACKINGS)} or not, or name the files themselves"
        )
    return [_source(found[address]) for address in sorted(found)]


def standard_library() -> list[SourceFile]:
    """Return the running interpreter's own library: a corpus that everyone has."""
    root = sysconfig.get_paths()["stdlib"]
    found = [
        file
        for _, files in walk(root, _NOT_LIBRARY)
        for file in files
        if file.address.endswith(".py")
    ]
    return [_source(file) for file in sorted(found)]


def changed_sources(sources: Iterable[SourceFile]) -> list[str]:
    """Return the addresses of sources that are not what they were when they were listed."""
    return [
        source.address
        for source in sources
        if find_file(source.address) != Found(source.address, source.num_bytes, source.stamp)
    ]


def _of_folder(folder: str, but: str | None) -> dict[str, Found]:
    found: dict[str, Found] = {}
    num_left_out = 0
    passed_by = [but] if but is not None else []
    for inner, files in walk(folder, _PASSED_BY):
        if any(inner == other or inner.startswith(f"{other}/") for other in passed_by):
            continue
        passed_by += _other_splits(inner, files)
        wanted, is_dataset = _wanted(files)
        num_left_out += 0 if is_dataset else len(files) - len(wanted)
        found |= {file.address: file for file in wanted}
    if num_left_out:
        logger.warning("%s: %d files without a text suffix left out", folder, num_left_out)
    return found


def _other_splits(folder: str, files: Sequence[Found]) -> list[str]:
    """Return the folders of a saved `DatasetDict` that are not its training split, if it has one.

    Raises: DataError if the list of its splits cannot be read.
    """
    if not any(file.address == f"{folder}/dataset_dict.json" for file in files):
        return []
    address = f"{folder}/dataset_dict.json"
    with open_binary(address) as stream:
        try:
            splits = [str(split) for split in json.loads(stream.read())["splits"]]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{address} names no splits ({error}); give the folders of the splits themselves"
            ) from error
    others = [split for split in splits if split != "train"] if "train" in splits else []
    if others:
        logger.warning(
            "%s: its split train is taken, %s left out; name their folders to have them",
            folder,
            ", ".join(others),
        )
    return [f"{folder}/{split}" for split in others]


def _wanted(files: Sequence[Found]) -> tuple[list[Found], bool]:
    """Return what of one folder is text, and whether the folder is a saved `datasets` dataset."""
    names = {file.address.rpartition("/")[2] for file in files}
    is_dataset = {"dataset_info.json", "state.json"} <= names or "dataset_dict.json" in names
    if is_dataset:
        arrows = [file for file in files if _suffix(file.address) == ".arrow"]
        # cache-*.arrow are what `datasets` made on the way.
        return [a for a in arrows if not a.address.rpartition("/")[2].startswith("cache-")], True
    known = _TEXT_SUFFIXES | _COLUMN_SUFFIXES.keys()
    return [file for file in files if _suffix(_unpacked(file.address)[0]) in known], False


def _source(file: Found) -> SourceFile:
    address, packing = _unpacked(file.address)
    suffix = _suffix(address)
    # Corpora of crawls have their JSON lines in .json.gz; a whole JSON text is never packed alone.
    is_jsonl = suffix in _JSONL_SUFFIXES or (suffix == ".json" and bool(packing))
    kind = _COLUMN_SUFFIXES.get(suffix, Format.JSONL if is_jsonl else Format.TEXT)
    return SourceFile(
        address=file.address,
        num_bytes=file.num_bytes,
        stamp=file.stamp,
        format=kind,
        packing=packing,
    )


def _unpacked(address: str) -> tuple[str, str]:
    suffix = _suffix(address)
    packing = _PACKINGS.get(suffix, "")
    return (address[: -len(suffix)] if packing else address), packing


def _suffix(address: str) -> str:
    name = address.rpartition("/")[2]
    stem, dot, suffix = name.rpartition(".")
    return f".{suffix.lower()}" if dot and stem else ""
