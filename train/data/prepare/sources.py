"""What text a corpus has: which files its paths mean, and what kind each is.

Owns the order of files, on which the order of documents depends: that of their addresses. Refuses
what is not text rather than train on it. Called by preparation.
"""

from __future__ import annotations

import logging
import os
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
    is_remote,
    walk,
)
from train.data.prepare.saved_datasets import dataset_files, splits_of
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
# What tells a prepared corpus, or one that is half done, from text.
WORK_FOLDER = ".work"
PLAN_FILE = "plan.json"
DOCUMENTS_SUFFIX = ".documents.npy"
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

    @property
    def is_json_text(self) -> bool:
        """Whether it is one JSON text, which is read as one document."""
        return self.format is Format.TEXT and _suffix(_unpacked(self.address)[0]) == ".json"

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


def list_sources(
    paths: Sequence[str], *, but: str | None = None, option: str = "data.paths"
) -> list[SourceFile]:
    """Return the files of a corpus, sorted by address; no paths mean the standard library.

    `but`: a folder that is passed by, since the corpus is written there. `option`: what the paths
    were given as. Raises: DataError if there are none, or one is nothing to read.
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
        raise DataError(f"{option}: {', '.join(missing[:5])} cannot be found; check the globs")
    archives = [address for address in sorted(found) if _suffix(address) in _ARCHIVES]
    if archives:
        raise DataError(f"{option}: {', '.join(archives[:5])} is an archive; unpack it to files")
    if not found:
        inside = [
            address for pattern in paths for address in expand(pattern) if _is_in(address, but)
        ]
        if inside:
            raise DataError(
                f"{option}: {', '.join(inside[:5])} lies in --output={but}, where nothing is read; "
                "give another --output"
            )
        raise DataError(
            f"{option}={list(paths)} holds no text files; text is expected in "
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


def _of_folder(root: str, but: str | None) -> dict[str, Found]:
    found: dict[str, Found] = {}
    num_left_out = 0
    passed_by: list[str] = []
    splits: list[str] = []
    datasets: set[str] = set()
    for folder, files in walk(root, _PASSED_BY):
        if _is_in(folder, but) or any(_is_below(folder, other) for other in passed_by):
            continue
        corpus = _corpus_of(folder, files)
        if corpus is not None:
            _pass_by(corpus, root, files)
            passed_by.append(corpus)
            continue
        taken, left_out = splits_of(folder, files)
        splits += taken
        passed_by += left_out
        wanted = dataset_files(folder, files)
        if wanted is not None:
            datasets.add(folder)
        else:
            wanted = [file for file in files if _is_text(file)]
            num_left_out += len(files) - len(wanted)
        found |= {file.address: file for file in wanted}
    missing = [folder for folder in splits if folder not in datasets]
    if missing:
        raise DataError(
            f"{', '.join(missing[:3])} is missing or no whole dataset, though dataset_dict.json "
            "beside it names it; copy or download the dataset once more"
        )
    if num_left_out:
        logger.warning("%s: %d files without a text suffix left out", root, num_left_out)
    return found


def _is_in(address: str, folder: str | None) -> bool:
    """Return whether a local address is `folder` or lies in it, however the two are written."""
    if folder is None or is_remote(address):
        return False
    return _is_below(os.path.abspath(address), os.path.abspath(folder))  # noqa: PTH100 - no links


def _is_below(address: str, folder: str) -> bool:
    return address == folder or address.startswith(f"{folder}/")


def _corpus_of(folder: str, files: Sequence[Found]) -> str | None:
    """Return the corpus that a folder holds, whole or not, or is the work folder of."""
    parent, _, name = folder.rpartition("/")
    if any(file.address.endswith(DOCUMENTS_SUFFIX) for file in files):
        return folder
    is_work = name == WORK_FOLDER and any(f.address == f"{folder}/{PLAN_FILE}" for f in files)
    return parent if is_work else None


def _pass_by(corpus: str, root: str, files: Sequence[Found]) -> None:
    """Say that a corpus among the text is not read. Raises: DataError if it is what was named."""
    if corpus != root.rstrip("/"):
        logger.warning("%s: %s is a prepared corpus, and passed by", root, corpus)
        return
    if any(file.address == f"{corpus}/manifest.json" for file in files):
        raise DataError(
            f"{corpus} is a prepared corpus and no text; a run reads it as it is, and if that "
            f"failed, its manifest.json is damaged: see `trimtab prepare --verify {corpus}`"
        )
    raise DataError(
        f"{corpus} is a corpus that was not prepared to the end; run its `trimtab prepare` again, "
        "which goes on where it was"
    )


def _is_text(file: Found) -> bool:
    suffix = _suffix(_unpacked(file.address)[0])
    return suffix in _TEXT_SUFFIXES or suffix in _COLUMN_SUFFIXES


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
