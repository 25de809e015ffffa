"""Maps the files of shards into memory, when they are first needed, a bounded number at a time.

Owns descriptors and maps. Refuses a file of another size, or with `verify=digests` of another
digest, when it opens it; a file that shrinks later kills the process that reads behind its new end
with SIGBUS, as every map does. Thread-safe: one thread may read while another announces.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import resource
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from train.data.addresses import is_remote
from train.data.cache import ShardCache
from train.data.shards import Shard
from train.errors import DataError

_MAX_OPEN = 1024
# Four stores that have all they may open leave half of the descriptors to everything else.
_SHARE_OF_A_STORE = 16


class MappedShard:
    """The tokens of one open shard. Its descriptor and map end with the last reference to it."""

    def __init__(self, shard: Shard, descriptor: int, dtype: np.dtype[np.integer]) -> None:
        self.descriptor = descriptor  # first: it is closed whatever fails below
        self.last_use = 0
        self._shard = shard
        self._dtype = dtype
        self._map = mmap.mmap(descriptor, shard.num_bytes, prot=mmap.PROT_READ)
        self.tokens = np.ndarray(
            (shard.num_tokens,), dtype, buffer=self._map, offset=shard.byte_offset
        )
        self._windows: dict[int, npt.NDArray[np.integer]] = {}

    def __del__(self) -> None:
        os.close(self.descriptor)

    def windows(self, length: int) -> npt.NDArray[np.integer]:
        """Return all stretches of `length` tokens as one view: row i begins at token i."""
        found = self._windows.get(length)
        if found is None:
            item_bytes = self._dtype.itemsize
            found = np.ndarray(
                (max(0, self._shard.num_tokens - length + 1), length),
                self._dtype,
                buffer=self._map,
                offset=self._shard.byte_offset,
                strides=(item_bytes, item_bytes),
            )
            self._windows[length] = found
        return found

    def announce(self, first: int, length: int) -> None:
        """Have the kernel read `length` tokens from `first` on; does not wait for them."""
        item_bytes = self._dtype.itemsize
        start = self._shard.byte_offset + first * item_bytes
        os.posix_fadvise(self.descriptor, start, length * item_bytes, os.POSIX_FADV_WILLNEED)


class MappedShards:
    """The shards of one split by number; `repair` is what messages tell a person to do."""

    def __init__(
        self,
        shards: Sequence[Shard],
        *,
        dtype: np.dtype[np.integer],
        cache: ShardCache | None,
        verifies_digests: bool,
        repair: str,
    ) -> None:
        self.verifies_digests = verifies_digests
        self._shards = shards
        self._dtype = dtype
        self._cache = cache
        self._repair = repair
        self._open: dict[int, MappedShard] = {}
        self._lock = threading.Lock()
        self._clock = 0
        self._max_open = _max_open()
        largest_bytes = max((shard.num_bytes for shard in shards), default=1)
        if cache is not None and any(is_remote(shard.address) for shard in shards):
            # The ranks of a host together must not hold all of the cache open.
            room = cache.max_bytes // (4 * max(1, largest_bytes))
            self._max_open = max(1, min(self._max_open, room))
            cache.add_release(self.close_one)

    def get(self, number: int) -> MappedShard:
        """Return an open shard. Raises: DataError if it is missing or is not what it should be."""
        shard = self._open.get(number)
        if shard is None:
            shard = self._map(number)
        self._clock += 1
        shard.last_use = self._clock
        return shard

    def get_if_open(self, number: int) -> MappedShard | None:
        """Return a shard if it is open already."""
        return self._open.get(number)

    def close_one(self) -> bool:
        """Close the shard that was not used for longest; return whether there was one."""
        with self._lock:
            return self._close_one()

    def close(self) -> None:
        """Close all shards; a later `get` opens them again."""
        with self._lock:
            self._open.clear()

    def _close_one(self) -> bool:
        if not self._open:
            return False
        del self._open[min(self._open, key=lambda number: self._open[number].last_use)]
        return True

    def _map(self, number: int) -> MappedShard:
        shard = self._shards[number]
        while True:
            try:
                # Outside the lock: a download makes room by closing shards.
                mapped = MappedShard(shard, self._descriptor(shard), self._dtype)
            except FileNotFoundError as error:
                raise DataError(f"{shard.address} is missing; {self._repair}") from error
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                    raise DataError(
                        f"{shard.address} cannot be opened ({error.strerror}); {self._repair}"
                    ) from error
                if not self.close_one():
                    raise DataError(
                        f"{shard.address} cannot be opened ({error.strerror}); raise `ulimit -n`, "
                        "or vm.max_map_count, on this host"
                    ) from error
                continue
            with self._lock:
                if (opened := self._open.get(number)) is not None:  # by another thread meanwhile
                    return opened
                while len(self._open) >= self._max_open:
                    self._close_one()
                self._open[number] = mapped
            return mapped

    def _descriptor(self, shard: Shard) -> int:
        """Return a descriptor of a file that was found to be what it should be."""
        if is_remote(shard.address):
            assert self._cache is not None, "a store of remote shards has a cache"
            descriptor = self._cache.open(shard.address, shard.num_bytes, shard.sha256)
        else:
            descriptor = os.open(shard.address, os.O_RDONLY | os.O_CLOEXEC)
        problem = size_problem(shard, os.fstat(descriptor).st_size)
        if problem is None and self.verifies_digests and shard.sha256 is not None:
            problem = digest_problem(
                shard.address, shard.sha256, Path(f"/proc/self/fd/{descriptor}")
            )
        if problem is None:
            return descriptor
        os.close(descriptor)
        if self._cache is not None and is_remote(shard.address):
            copy = self._cache.discard(shard.address, shard.num_bytes, shard.sha256)
            raise DataError(f"{problem}; its copy {copy} was removed: start again")
        raise DataError(f"{problem}; {self._repair}")


def size_problem(shard: Shard, num_bytes: int) -> str | None:
    """Say what is wrong with a shard that has `num_bytes`, None if nothing is."""
    if num_bytes == shard.num_bytes:
        return None
    return f"{shard.address} has {num_bytes:,} bytes, {shard.num_bytes:,} were expected"


def digest_problem(address: str, sha256: str, path: Path) -> str | None:
    """Read all of `path`, the local copy of `address`, and say what is wrong with it, if anything.

    Raises: OSError.
    """
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    return None if found == sha256 else f"{address} has the digest {found}, {sha256} was expected"


def _max_open() -> int:
    """Return how many shards one store may have open, with two descriptors each."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    share = _MAX_OPEN if soft == resource.RLIM_INFINITY else soft // _SHARE_OF_A_STORE
    return max(2, min(_MAX_OPEN, share))
