"""Small reads of local and remote files under one name: is it there, how large, these bytes.

An address without `://` is a local path. All others go to fsspec, which is imported by the first
of them. Refuses nothing that fsspec can open; what it says of a failure becomes one DataError.
Called when a corpus is opened; tokens are not read through here.
"""

from __future__ import annotations

import glob
import logging
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from train.errors import DataError

logger = logging.getLogger(__name__)

NUM_ATTEMPTS = 5
_FIRST_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 30.0

# They wait for servers and disks, and digests leave the interpreter to others.
_NUM_THREADS = 8

Item = TypeVar("Item")
Result = TypeVar("Result")


def is_remote(address: str) -> bool:
    """Return whether `address` is one of fsspec: it has a protocol."""
    return "://" in address


def join(folder: str, name: str) -> str:
    """Return the address of `name` in `folder`."""
    return f"{folder.rstrip('/')}/{name}" if is_remote(folder) else str(Path(folder) / name)


def base_name(address: str) -> str:
    """Return the last part of an address."""
    return address.rstrip("/").rpartition("/")[2]


def filesystem(address: str) -> tuple[Any, str]:
    """Return the fsspec file system of a remote address, and the path in it.

    Raises: DataError if fsspec, or what it needs for this protocol, is not installed.
    """
    protocol = address.partition("://")[0]
    try:
        import fsspec  # type: ignore[import-untyped]  # it ships no types

        # Untyped, and each protocol has its own class.
        found: tuple[Any, str] = fsspec.core.url_to_fs(address)
    except (ImportError, ValueError) as error:
        raise DataError(
            f"{address} cannot be opened ({error}); install fsspec and what it needs for "
            f"{protocol}:// (for s3:// that is s3fs), or copy the files to a local folder"
        ) from error
    return found


def pause_seconds(attempt: int) -> float:
    """Return how long to wait after failed attempt `attempt` (from 0): doubled, with jitter."""
    longest = min(_LONGEST_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS * 2.0**attempt)
    return longest * random.uniform(0.5, 1.0)  # ranks that failed together must not come together


def retried(address: str, attempt: Callable[[], Result], *, num_attempts: int) -> Result:
    """Return what `attempt` returns, trying again while the source of `address` fails.

    A file that is not there, or not ours to read, is final. Raises: DataError, FileNotFoundError.
    """
    for number in range(num_attempts):
        try:
            return attempt()
        except (DataError, FileNotFoundError):
            raise
        except PermissionError as error:
            raise DataError(
                f"{address} may not be read ({error}); check the credentials of this host"
            ) from error
        except Exception as error:  # each backend of fsspec has its own
            reason = f"{type(error).__name__}: {error}"
            if number + 1 == num_attempts:
                raise DataError(
                    f"{address} could not be read in {num_attempts} attempts; the last one failed "
                    f"with {reason}; check the network and the address"
                ) from error
            pause = pause_seconds(number)
            logger.warning("%s: %s; trying again in %.1f s", address, reason, pause)
            time.sleep(pause)
    raise AssertionError("num_attempts is at least 1")


def num_bytes(address: str) -> int | None:
    """Return the size of a file, None if there is none or the server does not tell.

    Raises: DataError if a remote one cannot be asked.
    """
    if not is_remote(address):
        path = Path(address)
        return path.stat().st_size if path.is_file() else None
    files, path_there = filesystem(address)

    def ask() -> int | None:
        size = files.info(path_there).get("size")
        return None if size is None else int(size)

    try:
        return retried(address, ask, num_attempts=NUM_ATTEMPTS)
    except FileNotFoundError:
        return None


def read(address: str, start: int = 0, stop: int | None = None) -> bytes:
    """Return the bytes `[start, stop)` of a file, fewer if it is shorter.

    Raises: FileNotFoundError; DataError if it cannot be read.
    """
    if not is_remote(address):
        try:
            with Path(address).open("rb") as file:
                file.seek(start)
                return file.read() if stop is None else file.read(stop - start)
        except NotADirectoryError as error:
            raise FileNotFoundError(*error.args) from error
        except FileNotFoundError:
            raise
        except OSError as error:
            raise DataError(f"{address} cannot be read ({error.strerror})") from error
    files, path = filesystem(address)

    def attempt() -> bytes:
        with files.open(path, "rb") as file:
            file.seek(start)
            content: bytes = file.read() if stop is None else file.read(stop - start)
        return content

    return retried(address, attempt, num_attempts=NUM_ATTEMPTS)


def for_each(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Return what `work` returns for each of `items`, in order; done by some threads at a time."""
    if len(items) < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(max_workers=_NUM_THREADS) as threads:
        return list(threads.map(work, items))


def find(pattern: str) -> list[str]:
    """Return the addresses that a glob means, sorted; one without wildcards means itself.

    Raises: DataError if a remote folder cannot be listed.
    """
    if not glob.has_magic(pattern):
        return [pattern if is_remote(pattern) else str(Path(pattern).expanduser())]
    if not is_remote(pattern):
        return sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))  # noqa: PTH207 - any root
    files, path = filesystem(pattern)
    found = retried(pattern, lambda: list(files.glob(path)), num_attempts=NUM_ATTEMPTS)
    return sorted(str(files.unstrip_protocol(match)) for match in found)
