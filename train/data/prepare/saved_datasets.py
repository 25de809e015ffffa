"""Datasets that Hugging Face's library saved to disk: which files of a folder are theirs.

Owns the lists that the library leaves beside its files. Refuses a folder that lacks a file of its
list: it is what an interrupted copy leaves. Called by `sources`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

from train.data.prepare.inputs import Found, open_binary
from train.errors import DataError

logger = logging.getLogger(__name__)

_STATE_FILE = "state.json"
_INFO_FILE = "dataset_info.json"
_SPLITS_FILE = "dataset_dict.json"
_DATA_SUFFIX = ".arrow"
# What the library made on the way; it is no part of the dataset.
_CACHE_PREFIX = "cache-"


class Splits(NamedTuple):
    """The folders of a saved `DatasetDict`: those that are read, and those that are not."""

    taken: list[str]
    left_out: list[str]


def dataset_files(folder: str, files: Sequence[Found]) -> list[Found] | None:
    """Return the files of the dataset that `folder` holds; None if it holds none.

    Raises: DataError if one is missing, or their list cannot be read.
    """
    by_name = {file.address.rpartition("/")[2]: file for file in files}
    if not {_STATE_FILE, _INFO_FILE} <= by_name.keys():
        return [] if _SPLITS_FILE in by_name else None
    listed = [
        str(entry["filename"])
        for entry in _read_list(by_name[_STATE_FILE].address, "_data_files", dict)
        if "filename" in entry
    ]
    missing = [name for name in listed if name not in by_name]
    if missing:
        raise DataError(
            f"{folder} lacks {len(missing)} of the {len(listed)} files that its {_STATE_FILE} "
            f"names ({', '.join(missing[:3])}); copy or download the dataset once more"
        )
    others = sorted(
        name
        for name in by_name.keys() - set(listed)
        if name.endswith(_DATA_SUFFIX) and not name.startswith(_CACHE_PREFIX)
    )
    if others:
        logger.warning(
            "%s: %s left out: its %s does not name them",
            folder,
            ", ".join(others[:3]),
            _STATE_FILE,
        )
    return [by_name[name] for name in listed]


def splits_of(folder: str, files: Sequence[Found]) -> Splits:
    """Return the splits of a saved `DatasetDict`: its training split alone is taken, if it has one.

    Both are empty of any other folder. Raises: DataError if the list of splits cannot be read.
    """
    address = f"{folder}/{_SPLITS_FILE}"
    if not any(file.address == address for file in files):
        return Splits([], [])
    splits = _read_list(address, "splits", str)
    taken = ["train"] if "train" in splits else splits
    left_out = [split for split in splits if split not in taken]
    if left_out:
        logger.warning(
            "%s: its split train is taken, %s left out; name their folders to have them",
            folder,
            ", ".join(left_out),
        )
    return Splits([f"{folder}/{name}" for name in taken], [f"{folder}/{name}" for name in left_out])


def _read_list(address: str, key: str, kind: type[Any]) -> list[Any]:
    with open_binary(address) as stream:
        content = stream.read()
    try:
        values = json.loads(content)[key]
    except (ValueError, KeyError, TypeError) as error:
        raise _unlisted(address, key, error) from error
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise _unlisted(address, key, f"{values!r:.60}")
    return values


def _unlisted(address: str, key: str, reason: object) -> DataError:
    what = "splits" if key == "splits" else "files"
    return DataError(
        f"{address} names no {what} ({reason}); copy or download the dataset once more, or give "
        + ("the folders of the splits themselves" if what == "splits" else "its files themselves")
    )
