"""Local copies of remote files, within a bound, shared by the processes of a host.

A copy appears under its name only when it is whole: it is written beside, its size and digest are
compared, it is flushed to the disk, and renamed. A file lock lets one process download while the
others wait. The least recently opened copies give way to new ones, never one that a process of
this host holds open: an open copy carries a shared lock. Called by the token store, and when a
remote corpus is opened.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import queue
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from train.data import addresses
from train.durable import fsync_folder
from train.errors import DataError

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 2**22
# Object stores answer each request after tens of milliseconds.
_REQUEST_BYTES = 2**25
# More would take the network from the ranks that wait for a shard now.
_NUM_PREFETCHING_THREADS = 2
_COPY = re.compile(r"\.?[0-9a-f]{24}-")
_Wanted = tuple[str, int | None, str | None]  # address, size, digest
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _DamagedDownloadError(Exception):
    """What came is not what was asked for; it may come right the next time."""


class ShardCache:
    """Local files of remote addresses; thread-safe.

    `max_bytes` bounds all files in `folder` together, those being downloaded included.
    """

    def __init__(
        self, folder: Path, *, max_bytes: int, num_attempts: int = addresses.NUM_ATTEMPTS
    ) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self._num_attempts = num_attempts
        self._lock = threading.Lock()
        self._releases: list[weakref.WeakMethod[Callable[[], bool]]] = []
        self._waiting: queue.SimpleQueue[_Wanted | None] = queue.SimpleQueue()
        self._announced: set[Path] = set()
        self._threads: list[threading.Thread] = []
        weakref.finalize(self, _end_threads, self._waiting)

    def path(self, address: str, num_bytes: int | None, sha256: str | None) -> Path:
        """Return the local copy of `address`, downloading it first if it is not there.

        `num_bytes`, `sha256`: what it must have; None is not compared. The copy may be removed
        for a newer one at any time: `open` it to keep it. Raises: DataError.
        """
        path = self._place(address, num_bytes, sha256)
        if not _is_there(path, num_bytes):
            with self._locked(path):
                if not _is_there(path, num_bytes):  # another process or thread may have done it
                    self._download(address, num_bytes, sha256, path)
        return path

    def open(self, address: str, num_bytes: int | None, sha256: str | None) -> int:
        """Return a descriptor of the local copy, which stays there until the last one is closed.

        A map of the file counts as one. Raises: DataError.
        """
        while True:
            path = self.path(address, num_bytes, sha256)
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:  # made room for another since
                continue
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if os.fstat(descriptor).st_nlink:
                os.utime(path)
                return descriptor
            os.close(descriptor)

    def discard(self, address: str, num_bytes: int | None, sha256: str | None) -> Path:
        """Remove a copy that was found to be damaged, so that it is fetched again; return it."""
        path = self._place(address, num_bytes, sha256)
        path.unlink(missing_ok=True)
        return path

    def prefetch(self, address: str, num_bytes: int | None, sha256: str | None) -> None:
        """Start to download `address` in the background; whoever opens it meanwhile waits for it.

        What goes wrong is left for that one to meet.
        """
        path = self._place(address, num_bytes, sha256)
        with self._lock:
            if path in self._announced or _is_there(path, num_bytes):
                return
            self._announced.add(path)
            self._waiting.put((address, num_bytes, sha256))
            if len(self._threads) < min(_NUM_PREFETCHING_THREADS, len(self._announced)):
                # Daemons: a download that hangs does not keep a stopped run from ending.
                thread = threading.Thread(
                    target=_prefetch_forever, args=(weakref.ref(self), self._waiting), daemon=True
                )
                self._threads.append(thread)
                thread.start()

    def add_release(self, release: Callable[[], bool]) -> None:
        """Have `release`, a bound method, called when there is no room, until it returns False.

        It closes the copy that its owner has not used for longest, if it holds any.
        """
        with self._lock:
            self._releases.append(weakref.WeakMethod(release))

    def _prefetch(self, address: str, num_bytes: int | None, sha256: str | None) -> None:
        try:
            self.path(address, num_bytes, sha256)
        except DataError as error:
            logger.debug("%s was not fetched ahead: %s", address, error)
        finally:
            with self._lock:
                self._announced.discard(self._place(address, num_bytes, sha256))

    def _place(self, address: str, num_bytes: int | None, sha256: str | None) -> Path:
        """A file that was replaced at its address has another place than the one before."""
        identity = hashlib.sha256(f"{address}\0{num_bytes}\0{sha256}".encode()).hexdigest()
        return self.folder / f"{identity[:24]}-{addresses.base_name(address)[-80:]}"

    @contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        """Hold the exclusive lock of `path`; it is freed when the process ends, however it ends."""
        lock = _lock_of(path)
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = lock.open("w")
        except OSError as error:
            raise DataError(
                f"{lock} cannot be written ({error.strerror}); set data.cache_dir to a folder that "
                "you may write to"
            ) from error
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _download(
        self, address: str, num_bytes: int | None, sha256: str | None, path: Path
    ) -> None:
        """Called with the lock of `path` held."""
        if num_bytes is None:
            num_bytes = addresses.num_bytes(address)
        temporary = path.with_name(f".{path.name}.tmp")
        files, path_there = addresses.filesystem(address)

        def attempt() -> None:
            self._make_room(temporary, num_bytes or 0, address)
            source = files.open(path_there, "rb", block_size=_REQUEST_BYTES)
            with source, temporary.open("r+b") as file:
                _copy(source, file, address, num_bytes, sha256)

        try:
            addresses.retried(address, attempt, num_attempts=self._num_attempts)
            with self._locked(self.folder / "room"):  # or whoever counts now may see neither name
                temporary.replace(path)
            fsync_folder(path.parent)
        except FileNotFoundError as error:
            raise DataError(
                f"{address} is missing; bring it back, or set data.on_bad_shard=skip"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)

    def _make_room(self, temporary: Path, num_bytes: int, address: str) -> None:
        """Remove what is used least until `num_bytes` fit, and take their place in `temporary`.

        The empty file already has its full size, so that others count it.
        """
        if num_bytes > self.max_bytes:
            raise DataError(
                f"{address} has {num_bytes:,} bytes, data.cache_bytes={self.max_bytes:,} holds no "
                f"single file of that size; set it to several times {num_bytes:,}"
            )
        temporary.unlink(missing_ok=True)
        for number in range(self._num_attempts):
            while True:
                with self._locked(self.folder / "room"):
                    if self._free(num_bytes) <= 0:
                        with _local_errors(temporary), temporary.open("wb") as file:
                            file.truncate(num_bytes)
                        return
                if not self._release():
                    break
            time.sleep(addresses.pause_seconds(number))  # others may finish with theirs
        raise DataError(
            f"there is no room for {address} ({num_bytes:,} bytes): processes of this host hold "
            f"more open than data.cache_bytes={self.max_bytes:,} less that; raise "
            "data.cache_bytes, or set data.block_samples so that fewer shards are read at a time"
        )

    def _release(self) -> bool:
        """Have each owner close one copy; return whether any did."""
        with self._lock:
            releases = [release for ref in self._releases if (release := ref()) is not None]
        return sum(release() for release in releases) > 0

    def _free(self, num_bytes: int) -> int:
        """Remove copies until `num_bytes` fit; return how many bytes still miss, if any."""
        found: list[tuple[float, int, Path]] = []
        for entry in self.folder.iterdir():
            if not _COPY.match(entry.name):
                continue  # somebody else's
            try:
                stat = entry.stat()
            except FileNotFoundError:
                continue
            found.append((stat.st_mtime, stat.st_size, entry))
        missing = sum(size for _, size, _ in found) + num_bytes - self.max_bytes
        for _, size, entry in sorted(found):
            if missing <= 0:
                break
            if _remove_unused(entry):
                logger.info("%s gave way to another file (%d bytes)", entry, size)
                missing -= size
        return missing


def _prefetch_forever(
    owner: weakref.ref[ShardCache], waiting: queue.SimpleQueue[_Wanted | None]
) -> None:
    """Download what waits, until the cache is gone."""
    while (wanted := waiting.get()) is not None:
        cache = owner()
        if cache is not None:
            cache._prefetch(*wanted)
        del cache


def _end_threads(waiting: queue.SimpleQueue[_Wanted | None]) -> None:
    for _ in range(_NUM_PREFETCHING_THREADS):
        waiting.put(None)


def _is_there(path: Path, num_bytes: int | None) -> bool:
    """Return whether a copy exists, and nothing cut it off."""
    try:
        return path.stat().st_size == num_bytes or num_bytes is None
    except OSError:
        return False  # whoever makes it will say why that cannot be


def _lock_of(path: Path) -> Path:
    return path.parent / "locks" / f"{path.name}.lock"


def _remove_unused(path: Path) -> bool:
    """Remove a copy that nobody holds open, or what a killed download left; else return False."""
    is_temporary = path.name.startswith(".") and path.suffix == ".tmp"
    guarded = _lock_of(path.with_name(path.name[1 : -len(".tmp")])) if is_temporary else path
    try:
        # NFS gives no exclusive lock to readers.
        descriptor = os.open(guarded, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


@contextmanager
def _local_errors(path: Path) -> Iterator[None]:
    """Tell a disk that fails here from a source that fails there, which alone is tried again."""
    try:
        yield
    except OSError as error:
        what = "free some space, lower data.cache_bytes" if error.errno in _FULL else "check it"
        raise DataError(
            f"{path} cannot be written ({error.strerror}); {what}, or set data.cache_dir to "
            "another disk"
        ) from error


def _copy(
    source: BinaryIO, file: BinaryIO, address: str, num_bytes: int | None, sha256: str | None
) -> None:
    """Copy all of `source`; return when it is on the disk and is what was asked for."""
    digest = hashlib.sha256()
    copied = 0
    while chunk := source.read(_CHUNK_BYTES):
        copied += len(chunk)
        if num_bytes is not None and copied > num_bytes:
            break
        digest.update(chunk)
        with _local_errors(Path(file.name)):
            file.write(chunk)
    if num_bytes is not None and copied != num_bytes:
        more = "at least " if copied > num_bytes else ""
        raise _DamagedDownloadError(f"{more}{copied:,} bytes came, expected {num_bytes:,}")
    if sha256 is not None and digest.hexdigest() != sha256:
        raise _DamagedDownloadError(
            f"digest {digest.hexdigest()} came, expected {sha256}; the file is damaged there, or "
            "is another one by now"
        )
    with _local_errors(Path(file.name)):
        file.flush()
        os.fsync(file.fileno())
