"""What a rank is doing right now, written by the loop and read by threads.

Owns the phases, and how long each has taken at most. Writing it costs a microsecond: no lock, no
collective; a reader gets a whole `Beat`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import StrEnum


class Phase(StrEnum):
    """Where a rank is. The first step of an attempt, in which kernels are built, is `compile`."""

    START = "start"
    COMPILE = "compile"
    DATA = "data"
    STEP = "step"
    SAVE = "save"
    EVALUATION = "evaluation"
    REWIND = "rewind"
    END = "end"


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """A rank is in `phase` of `step` since `since` (`time.monotonic()`)."""

    phase: Phase
    step: int
    since: float


class Pulse:
    """The present beat of this rank."""

    def __init__(self) -> None:
        self.now = Beat(phase=Phase.START, step=0, since=time.monotonic())
        self.longest_seconds: dict[Phase, float] = {}
        """Of the phases that have ended in this attempt."""
        self.seconds: dict[Phase, float] = {}
        """All that a phase has taken so far in this attempt."""

    @property
    def has_stepped(self) -> bool:
        """True once a step of this attempt is done."""
        return Phase.COMPILE in self.longest_seconds

    def enter(self, phase: Phase, step: int) -> None:
        """Say that `phase` begins; the one before ends."""
        if phase is Phase.STEP and not self.has_stepped:
            phase = Phase.COMPILE
        before, now = self.now, time.monotonic()
        self.now = Beat(phase=phase, step=step, since=now)
        spent = now - before.since
        longest = self.longest_seconds.get(before.phase, 0.0)
        self.longest_seconds[before.phase] = max(longest, spent)
        self.seconds[before.phase] = self.seconds.get(before.phase, 0.0) + spent
