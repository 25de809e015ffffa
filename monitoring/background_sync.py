"""Brings what was appended to a file to the disk, in a thread of its own.

Owns when: every few seconds while there is something new, at once when asked, and at the end.
Refuses to make a writer wait: on a slow disk or a hanging network folder, an fsync may take
minutes. Called by the writer of records alone.
"""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

logger = logging.getLogger(__name__)

SYNC_SECONDS = 5.0
"""What a power loss costs, at most, of a run's records."""

_PATIENCE_SECONDS = 30.0


class BackgroundSync:
    """Fsyncs one open file. The thread starts with the first `mark`; a failure is one warning."""

    def __init__(self, path: Path, descriptor: int, interval_seconds: float = SYNC_SECONDS) -> None:
        self._path = path
        self._descriptor = descriptor
        self._interval_seconds = interval_seconds
        self._changed = threading.Event()
        self._hurry = threading.Event()
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def mark(self, *, is_urgent: bool) -> None:
        """Take note that something was written; the disk has it within seconds, or right away."""
        self._changed.set()
        if is_urgent:
            self._hurry.set()
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._run, name=f"sync-{self._path.name}", daemon=True
            )
            self._thread.start()

    def close(self) -> None:
        """Return when all that was written is on disk, or after 30 s of a disk that hangs."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._is_closed = True
            self._hurry.set()
            thread.join(_PATIENCE_SECONDS)

    def _run(self) -> None:
        is_new, is_last = True, False
        while not is_last:
            self._hurry.wait(self._interval_seconds)
            self._hurry.clear()
            is_last = self._is_closed
            if not self._changed.is_set():
                continue
            self._changed.clear()  # what comes from here on is for the next time
            try:
                os.fsync(self._descriptor)
                if is_new:
                    _sync_folder(self._path.parent)
                    is_new = False
            except OSError as error:
                logger.warning(
                    "%s could not be brought to the disk (%s): a power loss may cost its last "
                    "lines; nothing else is affected",
                    self._path,
                    error.strerror,
                )
                return


def _sync_folder(folder: Path) -> None:
    """Without this, a new file may be missing after a power loss, whatever was written to it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
