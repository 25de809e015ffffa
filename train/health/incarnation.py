"""A name that the ranks of one start share, and no start before: restarts meet in the same store.

torchrun keeps its store when it starts the ranks again. A rank that is early would read there where
the ranks of before could be reached, and wait for them in vain. So rank 0 makes a name up, and
gives it only to a rank that has just asked for it.
"""

from __future__ import annotations

import time
import uuid

from torch._C._distributed_c10d import Store

_POLL_SECONDS = 0.005


def agree_on_name(store: Store, rank: int, size: int, *, timeout_seconds: float) -> str:
    """Return the name of this start, the same on all of its ranks. Called on all ranks.

    Raises: TimeoutError if a rank does not come.
    """
    mine = uuid.uuid4().hex
    deadline = time.monotonic() + timeout_seconds
    if rank == 0:
        waited_for = set(range(1, size))
        while waited_for:
            for other in sorted(waited_for):
                asked = _read(store, f"asks/{other}")
                if asked:
                    # If that is from a start before, the rank asks again, and is answered again.
                    store.set(f"answer/{other}", f"{asked} {mine}")
                if _read(store, f"heard/{other}") == mine:
                    waited_for.discard(other)
            _wait(deadline, f"ranks {sorted(waited_for)[:8]} did not come")
        return mine
    store.set(f"asks/{rank}", mine)
    while True:
        asked, _, name = _read(store, f"answer/{rank}").partition(" ")
        if asked == mine:
            store.set(f"heard/{rank}", name)
            return name
        _wait(deadline, "rank 0 did not come")


def _read(store: Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def _wait(deadline: float, problem: str) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError(f"the ranks of this start did not meet: {problem}")
    time.sleep(_POLL_SECONDS)
