"""Which checkpoint is being loaded, on disk: a load that ended the process is known at the next.

A checkpoint can be whole and still end every process that loads it. Two such ends are enough: it is
then called hopeless, and whoever loads takes the one before. Rank 0 writes; all ranks learn.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from train.distributed import World
from train.durable import write_json
from train.errors import TrimtabError
from train.health.out_of_memory import is_out_of_memory

logger = logging.getLogger(__name__)

MAX_FAILED_LOADS = 2
_FILE = ".loading.json"


class LoadMarks:
    """The mark of one folder of checkpoints."""

    def __init__(self, folder: Path, world: World) -> None:
        self._path = folder / _FILE
        self._world = world

    def is_hopeless(self, name: str) -> bool:
        """Return whether loads of it have ended in failure too often. A collective."""
        is_it = self._world.is_main and self._failures(name) >= MAX_FAILED_LOADS
        return bool(self._world.broadcast(is_it))

    @contextmanager
    def loading(self, name: str) -> Iterator[None]:
        """Mark a load; the mark stays if the process ends in it, or something unforeseen happens.

        Our own errors and a lack of memory say nothing against the checkpoint. No collective.
        """
        if not self._world.is_main:
            yield
            return
        self._write({"name": name, "failures": self._failures(name) + 1})
        try:
            yield
        except Exception as error:
            if isinstance(error, TrimtabError) or is_out_of_memory(error):
                self.clear()
            raise
        self.clear()

    def clear(self) -> None:
        """Forget the mark. Writes on rank 0 alone."""
        if self._world.is_main:
            self._path.unlink(missing_ok=True)

    def has_hopeless(self) -> bool:
        """Return whether the next start will give a checkpoint up. For rank 0."""
        return self._failures(None) >= MAX_FAILED_LOADS

    def _failures(self, name: str | None) -> int:
        try:
            mark = json.loads(self._path.read_text())
            return int(mark["failures"]) if name in (None, mark["name"]) else 0
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    def _write(self, mark: dict[str, object]) -> None:
        try:
            write_json(self._path, mark)
        except OSError as error:
            logger.warning("%s cannot be written (%s)", self._path, error.strerror)
