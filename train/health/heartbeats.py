"""What ranks tell each other beside the collectives: that they live, where they are, last words.

Through the launcher's key-value store, over a connection of its own and on a thread of its own: a
call may block for ever when the process behind the store is stopped, so nobody waits for it. Costs
two small messages a rank and interval, whatever the number of ranks.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from train.health.pulse import Phase, Pulse

logger = logging.getLogger(__name__)

_ALARM, _DONE, _WORDS = "alarm", "done", "words"
_CONNECT_SECONDS = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """What a rank says of itself; `count` grows with each beat, `age` is that of its phase."""

    rank: int
    count: int
    phase: Phase
    step: int
    age: float
    host: str
    device: str
    pid: int
    started: str
    """When the process began, in the kernel's words: with the pid, it names it for good."""

    @classmethod
    def from_text(cls, text: bytes) -> Heartbeat:
        """Read what another rank has written."""
        fields: dict[str, Any] = json.loads(text)
        return cls(**{**fields, "phase": Phase(fields["phase"])})


def process_start(pid: int) -> str:
    """Return when a process began, in clock ticks since boot; empty if it is gone or unknown."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    fields = stat.rpartition(")")[2].split()
    return "" if fields[0] in ("Z", "X") else fields[19]


def connect(name: str) -> Store | None:
    """Return a connection of our own to the launcher's store, None without one."""
    if "MASTER_ADDR" not in os.environ:
        return None
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=_CONNECT_SECONDS),
    )
    return PrefixStore(f"trimtab-health/{name}", store)


class Heartbeats:
    """This rank's beats, and what it hears of the others."""

    def __init__(
        self,
        make_store: Callable[[], Store | None],
        *,
        rank: int,
        size: int,
        device: str,
        pulse: Pulse,
        interval_seconds: float,
    ) -> None:
        self._make_store = make_store
        self._rank = rank
        self._size = size
        self._pulse = pulse
        self._interval_seconds = interval_seconds
        self._place = {
            "rank": rank,
            "host": socket.gethostname(),
            "device": device,
            "pid": os.getpid(),
            "started": process_start(os.getpid()),
        }
        self._store: Store | None = None
        self._is_closed = threading.Event()
        self._wake = threading.Event()
        self._wants: dict[str, Mapping[str, object]] = {}
        self.heard: dict[str, dict[str, Any]] = {}
        """`alarm`, `done` and `words`, once a rank has said them."""
        self.beats: dict[int, Heartbeat] = {}
        self.reads = 0
        """How often all beats have been read since `read_all` was asked for."""
        self.last_answer = time.monotonic()
        self._reads_all = False
        self._thread = threading.Thread(target=self._live, name="heartbeats", daemon=True)

    def start(self) -> None:
        """Begin to beat."""
        self._thread.start()

    def close(self) -> None:
        """Stop; a call that blocks is left behind."""
        self._is_closed.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2 * self._interval_seconds)

    def own(self, count: int = 0) -> Heartbeat:
        """Return what this rank says of itself now."""
        now = self._pulse.now
        place: dict[str, Any] = self._place
        return Heartbeat(
            count=count,
            phase=now.phase,
            step=now.step,
            age=time.monotonic() - now.since,
            **place,
        )

    def say(self, key: str, value: Mapping[str, object]) -> None:
        """Say `alarm`, `done` or `words` to all; whoever said it first stands."""
        self._wants.setdefault(key, {**value, "rank": self._rank})
        self._wake.set()

    def read_all(self) -> None:
        """Read everybody's beats from now on, at each beat."""
        self._reads_all = True
        self._wake.set()

    def _live(self) -> None:
        count = 0
        while not self._is_closed.is_set():
            try:
                if self._store is None:
                    self._store = self._make_store()
                if self._store is None:
                    return
                count += 1
                self._beat(self._store, count)
                self.last_answer = time.monotonic()
            except Exception as error:  # noqa: BLE001 - torch raises many classes
                logger.debug("no answer of the store: %s", error)
            self._wake.wait(self._interval_seconds / (4 if self._reads_all else 1))
            self._wake.clear()

    def _beat(self, store: Store, count: int) -> None:
        store.set(f"beat/{self._rank}", json.dumps(asdict(self.own(count))))
        for key, value in list(self._wants.items()):
            if key not in self.heard:
                self.heard[key] = json.loads(store.compare_set(key, "", json.dumps(value)))
        for key in (_ALARM, _DONE, _WORDS):
            if key not in self.heard and store.check([key]):
                self.heard[key] = json.loads(store.get(key))
        if self._reads_all or 0 not in self.beats:
            # Rank 0 may hold the store: were it stopped, nobody could look up who it is.
            for rank in range(self._size if self._reads_all else 1):
                if store.check([f"beat/{rank}"]):
                    self.beats[rank] = Heartbeat.from_text(store.get(f"beat/{rank}"))
            self.reads += self._reads_all

    def hear(self, key: str, seconds: float) -> dict[str, Any] | None:
        """Wait up to so many seconds for a word of anybody."""
        deadline = time.monotonic() + seconds
        while key not in self.heard and time.monotonic() < deadline and self._thread.is_alive():
            time.sleep(0.02)
        return self.heard.get(key)


def end_process(beat: Heartbeat) -> bool:
    """SIGKILL the process of a beat of this host, if it is still the same; True if it was sent."""
    import signal

    if beat.host != socket.gethostname() or not beat.started:
        return False
    if process_start(beat.pid) != beat.started:
        return False
    with suppress(ProcessLookupError, PermissionError):
        os.kill(beat.pid, signal.SIGKILL)
        return True
    return False
