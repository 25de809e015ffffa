"""Copies of a run's checkpoints behind an fsspec address: s3://, gs://, file://, memory://.

A thread of each rank brings the address up to the catalogue, beside training and beside saves, and
without a collective: each rank its share of the files, rank 0 the manifest when all of them have
arrived with their sizes. So a copy with a manifest is whole. What a disk still has is never read
from here; a start that finds no checkpoint at all fetches the newest, and checks every digest.

What the catalogue has let go of is deleted here too, once a younger good one is whole here.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.checkpoint.info import (
    HEALTH,
    MANIFEST,
    NAME,
    CheckpointInfo,
    Health,
    verify_digests,
    verify_sizes,
)
from train.data.addresses import filesystem
from train.distributed import World
from train.durable import fsync_file, fsync_folder
from train.errors import CheckpointError

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.5
_OTHERS_SECONDS = 1800.0
_FETCHING = ".saving-fetched-"


class RemoteCopies:
    """The copies of the checkpoints in `folder`, which all ranks see, at `address`."""

    def __init__(
        self, address: str, folder: Path, world: World, *, retry_seconds: Sequence[float] = ()
    ) -> None:
        self._address = address
        self._files, self._root = filesystem(address)
        self._folder = folder
        self._world = world
        self._retry_seconds = tuple(retry_seconds)
        self._healths: dict[str, Health] = {}
        self._wanted: tuple[CheckpointInfo, ...] | None = None
        self._is_idle = threading.Event()
        self._is_idle.set()
        self._has_work = threading.Event()
        self._is_closed = threading.Event()
        self._thread: threading.Thread | None = None

    def update(self, catalogue: Sequence[CheckpointInfo]) -> None:
        """Begin to bring the address up to `catalogue`. Returns at once; no collective."""
        self._wanted = tuple(catalogue)
        self._is_idle.clear()
        self._has_work.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="remote-copies", daemon=True)
            self._thread.start()

    def finish(self, seconds: float) -> bool:
        """Wait until this rank has nothing left to do, or that long; return whether it has not."""
        return self._is_idle.wait(seconds)

    def close(self) -> None:
        """Begin nothing more. No collective."""
        self._is_closed.set()
        self._has_work.set()

    def clear(self) -> None:
        """Delete all copies, for a run that starts over. A collective. Raises: CheckpointError."""
        problem: str | None = None
        if self._world.is_main:
            try:
                for name in self._names():
                    self._delete(name)
            except Exception as error:  # noqa: BLE001 - each backend has its own
                problem = f"{self._address} cannot be cleared ({type(error).__name__}: {error})"
        problem = self._world.broadcast(problem)
        if problem is not None:
            raise CheckpointError(f"{problem}; see to checkpoint.remote, or set it to null")

    def fetch(self) -> str | None:
        """Bring the newest copy that is whole into the folder; return its name. A collective.

        None if there is none. What is not whole is passed over, and said so.
        Raises: CheckpointError, on all ranks, if the address cannot be read.
        """
        found: tuple[list[str], str | None] = ([], None)
        if self._world.is_main:
            try:
                found = self._usable(), None
            except Exception as error:  # noqa: BLE001 - each backend has its own
                found = [], f"{type(error).__name__}: {error}"
        names, problem = self._world.broadcast(found)
        if problem is not None:
            raise CheckpointError(
                f"{self._address} cannot be read ({problem}); see to checkpoint.remote, or set it "
                "to null to start without what may be there"
            )
        for name in names:
            temporary = self._folder / f"{_FETCHING}{name}"
            if self._world.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            self._world.barrier()
            problems = [
                answer for answer in self._world.gather(self._take(name, temporary)) if answer
            ]
            if self._world.is_main and not problems:
                temporary.rename(self._folder / name)
                fsync_folder(self._folder)
            self._world.barrier()
            if not problems:
                logger.info("fetched %s from %s", name, self._address)
                return str(name)
            logger.warning("%s/%s is passed over (%s)", self._address, name, "; ".join(problems))
        return None

    # What the thread does.

    def _work(self) -> None:
        while True:
            self._has_work.wait()
            if self._is_closed.is_set():
                self._is_idle.set()
                return
            self._has_work.clear()
            wanted = self._wanted or ()
            for seconds in (*self._retry_seconds, None):
                try:
                    self._bring_up_to(wanted)
                    break
                except Exception as error:  # noqa: BLE001 - each backend has its own
                    logger.warning(
                        "copies at %s could not be made (%s: %s); %s",
                        *(self._address, type(error).__name__, error),
                        "with the next save again"
                        if seconds is None
                        else f"again in {seconds:g} s",
                    )
                if seconds is None or self._is_closed.wait(seconds) or self._has_work.is_set():
                    break
            if not self._has_work.is_set():
                self._is_idle.set()

    def _bring_up_to(self, wanted: Sequence[CheckpointInfo]) -> None:
        there = set(self._names())
        whole = {name for name in there if self._is_whole(name)}
        for info in reversed(wanted):  # the newest is the one that matters
            if self._is_closed.is_set() or self._has_work.is_set():
                return
            if info.health is Health.QUARANTINED and info.name not in whole:
                continue
            if info.name not in whole and self._upload(info):
                whole.add(info.name)
            if self._world.is_main and info.name in whole:
                self._tell_health(info)
        if self._world.is_main:
            self._retire(there, whole, wanted)

    def _upload(self, info: CheckpointInfo) -> bool:
        """Copy this rank's share; on rank 0, then the rest. Return whether it is whole now."""
        try:
            files = json.loads((info.path / MANIFEST).read_text())["files"]
            for name in sorted(files)[self._world.rank :: self._world.size]:
                if self._size(f"{info.name}/{name}") != files[name]["bytes"]:
                    self._put(info.path / name, f"{info.name}/{name}")
        except FileNotFoundError:
            if info.path.exists():
                raise
            return False  # retention was faster
        if not self._world.is_main:
            return False
        deadline = time.monotonic() + _OTHERS_SECONDS
        for name, entry in files.items():
            while self._size(f"{info.name}/{name}") != entry["bytes"]:
                if self._has_work.wait(_POLL_SECONDS) or time.monotonic() > deadline:
                    return False  # another rank is behind; the next update finds it done
        self._tell_health(info)
        self._put(info.path / MANIFEST, f"{info.name}/{MANIFEST}")
        return True

    def _tell_health(self, info: CheckpointInfo) -> None:
        if self._healths.get(info.name) is not info.health:
            text = json.dumps({"health": str(info.health), "reason": ""})
            self._files.pipe_file(f"{self._root}/{info.name}/{HEALTH}", text.encode())
            self._healths[info.name] = info.health

    def _retire(self, there: set[str], whole: set[str], wanted: Sequence[CheckpointInfo]) -> None:
        good = [i.clock for i in wanted if i.health is Health.GOOD and i.name in whole]
        names = {info.name for info in wanted}
        for name in there - names:
            if _clock_of(name) < max(good, default=-1) or name not in whole:
                self._delete(name)

    # What is there.

    def _names(self) -> list[str]:
        """Return the names of all copies, whole or not, oldest clock first."""
        self._files.invalidate_cache()
        try:
            listed = self._files.ls(self._root, detail=False)
        except FileNotFoundError:
            return []
        names = {str(path).rstrip("/").rpartition("/")[2] for path in listed}
        return sorted((name for name in names if NAME.match(name)), key=_clock_of)

    def _usable(self) -> list[str]:
        """Return the names of the copies that are whole and may be loaded, newest first."""
        whole = [name for name in self._names() if self._is_whole(name)]
        return [
            name
            for name in reversed(whole)
            if json.loads(self._files.cat_file(f"{self._root}/{name}/{HEALTH}"))["health"]
            != Health.QUARANTINED
        ]

    def _is_whole(self, name: str) -> bool:
        return self._size(f"{name}/{MANIFEST}") is not None

    def _size(self, path: str) -> int | None:
        self._files.invalidate_cache()
        try:
            return int(self._files.info(f"{self._root}/{path}")["size"])
        except FileNotFoundError:
            return None

    def _put(self, local: Path, path: str) -> None:
        target = f"{self._root}/{path}"
        self._files.makedirs(target.rpartition("/")[0], exist_ok=True)
        self._files.put_file(str(local), target)
        size = self._size(path)
        if size != local.stat().st_size:
            raise CheckpointError(f"{path} has {size} bytes there, {local} {local.stat().st_size}")

    def _delete(self, name: str) -> None:
        """Delete a copy, its manifest first: what is left of a kill is not whole."""
        if self._is_whole(name):
            self._files.rm_file(f"{self._root}/{name}/{MANIFEST}")
        self._files.rm(f"{self._root}/{name}", recursive=True)
        self._healths.pop(name, None)

    def _take(self, name: str, temporary: Path) -> str | None:
        """Fetch this rank's share and check its digests; return the problem, if any."""
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            text = self._files.cat_file(f"{self._root}/{name}/{MANIFEST}")
            files: dict[str, Any] = json.loads(text)["files"]
            mine = {n: files[n] for n in sorted(files)[self._world.rank :: self._world.size]}
            others = (HEALTH, MANIFEST) if self._world.is_main else ()
            for file in (*mine, *others):
                (temporary / file).parent.mkdir(parents=True, exist_ok=True)
                self._files.get_file(f"{self._root}/{name}/{file}", str(temporary / file))
                fsync_file(temporary / file)
            verify_sizes(temporary, mine)
            verify_digests(temporary, mine)
        except Exception as error:  # noqa: BLE001 - each backend has its own
            return f"rank {self._world.rank}: {type(error).__name__}: {error}"
        return None


def _clock_of(name: str) -> int:
    return int(name.rpartition("-")[2])
