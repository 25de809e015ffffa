"""Files by address: a local path, or anything that fsspec knows (s3://, gs://, hf://, memory://).

Owns opening, listing and what identifies a file's content without reading it. Refuses to import
fsspec for local paths, which would cost each start of a run.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from train.data.addresses import NUM_ATTEMPTS, filesystem, retried
from train.errors import DataError

_FILE_SCHEME = "file://"
_READ_BYTES = 2**20


class Found(NamedTuple):
    """A file: its address, its size, and a stamp that changes when its content does."""

    address: str
    num_bytes: int
    stamp: str


def is_remote(address: str) -> bool:
    """Return whether `address` is one for fsspec."""
    return "://" in address and not address.startswith(_FILE_SCHEME)


def local_path(address: str) -> str:
    """Return the path of a local address."""
    return os.path.expanduser(address.removeprefix(_FILE_SCHEME))  # noqa: PTH111 - a str, not Path


def open_binary(address: str) -> BinaryIO:
    """Return the file's bytes as a stream. Raises: DataError if it cannot be opened."""
    if not is_remote(address):
        try:
            return open(local_path(address), "rb", buffering=_READ_BYTES)  # noqa: PTH123
        except OSError as error:
            raise unreadable(address, error) from error
    system, path = filesystem(address)

    def attempt() -> BinaryIO:
        stream: BinaryIO = system.open(path, "rb", block_size=8 * _READ_BYTES)
        return stream

    try:
        return retried(address, attempt, num_attempts=NUM_ATTEMPTS)
    except FileNotFoundError as error:
        raise unreadable(address, error) from error


def unreadable(address: str, error: BaseException) -> DataError:
    """Return the error for a file that cannot be read."""
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return DataError(
        f"{address} cannot be read ({reason}); fix its permissions or take it out of the sources "
        "(data.paths)"
    )


def expand(pattern: str) -> list[str]:
    """Return the addresses that `pattern` means: itself, or the matches of a glob, sorted."""
    if not is_remote(pattern):
        path = local_path(pattern)
        return sorted(glob.glob(path, recursive=True)) or [path]  # noqa: PTH207 - any root
    if not glob.has_magic(pattern):
        return [pattern]
    system, path = filesystem(pattern)
    try:
        matches = system.glob(path)
    except Exception as error:  # each filesystem raises its own
        raise unreadable(pattern, error) from error
    return sorted(str(system.unstrip_protocol(match)) for match in matches) or [pattern]


def is_folder(address: str) -> bool:
    """Return whether `address` is a folder."""
    if not is_remote(address):
        return os.path.isdir(local_path(address))  # noqa: PTH112 - a str, not Path
    system, path = filesystem(address)
    try:
        return bool(system.isdir(path))
    except Exception as error:  # each filesystem raises its own
        raise unreadable(address, error) from error


def find_file(address: str) -> Found | None:
    """Return what is known of the file at `address`; None if there is none.

    Raises: DataError if it is a pipe, a device, or cannot be asked for.
    """
    if is_remote(address):
        system, path = filesystem(address)
        try:
            info = system.info(path)
        except FileNotFoundError:
            return None
        except Exception as error:  # each filesystem raises its own
            raise unreadable(address, error) from error
        return Found(address, int(info.get("size") or 0), _stamp(info))
    path = local_path(address)
    try:
        status = os.stat(path)  # noqa: PTH116 - a str, not Path
    except FileNotFoundError:
        return None
    except OSError as error:
        raise unreadable(path, error) from error
    if not os.path.isfile(path):  # noqa: PTH113 - a str, not Path
        raise DataError(f"data.paths: {path} is not a regular file; take it out")
    return Found(path, status.st_size, str(status.st_mtime_ns))


def walk(folder: str, unwanted: frozenset[str]) -> Iterator[tuple[str, list[Found]]]:
    """Yield each folder at or below `folder` with its files; names in `unwanted` are passed by."""
    if is_remote(folder):
        yield from _walk_remote(folder, unwanted)
        return
    files: list[Found] = []
    inner: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir():
                    # A link to a folder is not followed: it may lead back up.
                    if entry.name not in unwanted and not entry.is_symlink():
                        inner.append(entry.path)
                elif entry.is_file():
                    status = entry.stat()
                    files.append(Found(entry.path, status.st_size, str(status.st_mtime_ns)))
    except OSError as error:
        raise unreadable(folder, error) from error
    yield folder, files
    for path in inner:
        yield from walk(path, unwanted)


def _walk_remote(folder: str, unwanted: frozenset[str]) -> Iterator[tuple[str, list[Found]]]:
    system, path = filesystem(folder)
    try:
        infos = system.find(path, detail=True)
    except Exception as error:  # each filesystem raises its own
        raise unreadable(folder, error) from error
    by_folder: dict[str, list[Found]] = {}
    for name, info in infos.items():
        address = str(system.unstrip_protocol(name))
        if not unwanted & set(address.split("/")[:-1]):
            found = Found(address, int(info.get("size") or 0), _stamp(info))
            by_folder.setdefault(address.rpartition("/")[0], []).append(found)
    yield from sorted(by_folder.items())


def _stamp(info: dict[str, Any]) -> str:
    for key in (
        "ETag",
        "etag",
        "checksum",
        "blob_id",
        "LastModified",
        "mtime",
        "updated",
        "created",
    ):
        if info.get(key) is not None:
            return str(info[key])
    return ""
