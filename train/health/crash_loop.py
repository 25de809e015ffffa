"""The same failure, again and again: stop, and say which.

Owns the judgement over the ends of past attempts. A changed setting or a changed line of code makes
failures of before count no more: whoever fixed the cause gets through.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.health.outcome import (
    CRASH_LOOP,
    DIED,
    FAILED,
    HANG,
    INTERRUPTED,
    OUT_OF_MEMORY,
    PREEMPTED,
    Outcome,
)

_TRAIN = Path(__file__).resolve().parent.parent
_FAILURES = frozenset({FAILED, DIED, HANG, OUT_OF_MEMORY})
_NO_NEWS = frozenset({PREEMPTED, INTERRUPTED, CRASH_LOOP})


def signature(node: Mapping[str, Any]) -> str:
    """Return a digest of the settings and of the training code."""
    digest = hashlib.sha256(json.dumps(node, sort_keys=True, default=str).encode())
    for path in sorted(_TRAIN.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def same_failures(ends: Sequence[Outcome], signature: str) -> list[Outcome]:
    """Return the failures that came last, alike and at the same step, oldest first.

    Attempts that were told to stop say nothing. Failures of other settings or code do not count.
    """
    alike: list[Outcome] = []
    for end in reversed(ends):
        if end.code in _NO_NEWS:
            continue
        is_same = not alike or (end.fingerprint, end.step) == (
            alike[0].fingerprint,
            alike[0].step,
        )
        if end.code not in _FAILURES or end.signature != signature or not is_same:
            break
        alike.insert(0, end)
    return alike


def verdict(ends: Sequence[Outcome], signature: str, *, max_same_failures: int) -> str | None:
    """Return why another attempt would be in vain, None if it may help.

    `max_same_failures`: 0 lets every attempt through.
    """
    alike = same_failures(ends, signature)
    if not max_same_failures or len(alike) < max_same_failures:
        return None
    last = alike[-1]
    what = last.reason or "it died without a word (killed from outside, or a crash in native code)"
    return (
        f"the last {len(alike)} attempts all ended at step {last.step} in the same way: {what}. "
        "Remove the cause: once a setting or the code has changed, the same run goes on. If the "
        f"cause lay outside, set health.max_same_failures={max_same_failures + 1} to try again"
    )
