"""When something happened, on two clocks: the wall clock, and the seconds since the host booted.

Owns what records are stamped with. The wall clock can be set, by hours; the time since boot cannot,
but it means nothing on another host or behind a reboot: it counts beside a `boot_id`. Refuses to
guess: what the kernel does not tell is now. Linux alone; the standard library alone.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

_STARTED_AT = 19
"""Which field behind the command's name in `/proc/PID/stat` is the start, in ticks since boot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """One instant: `unix_seconds` of the wall clock, `uptime_seconds` since the host booted."""

    unix_seconds: float
    uptime_seconds: float

    def before(self, seconds: float) -> Moment:
        """The moment so many seconds earlier."""
        return Moment(
            unix_seconds=self.unix_seconds - seconds, uptime_seconds=self.uptime_seconds - seconds
        )

    def seconds_since(self, earlier: Moment) -> float:
        """Seconds since an earlier moment of this boot, 0 at least; the wall clock has no say."""
        return max(0.0, self.uptime_seconds - earlier.uptime_seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Birth:
    """When a job began: its process, or its turn in a process of several; and what launched it."""

    process: Moment
    launcher: Moment | None = None


def now() -> Moment:
    """This moment; time that the host was suspended counts on both clocks."""
    return Moment(unix_seconds=time.time(), uptime_seconds=time.clock_gettime(time.CLOCK_BOOTTIME))


def boot_id() -> str:
    """What is equal between two processes if, and only if, they share the time since boot."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def process_start(pid: int | None = None) -> Moment:
    """When the kernel started this process, or that of a `pid`, to a hundredth of a second."""
    moment = now()
    try:
        text = Path(f"/proc/{os.getpid() if pid is None else pid}/stat").read_text()
        ticks = int(text.rpartition(")")[2].split()[_STARTED_AT])
    except (OSError, ValueError, IndexError):
        return moment
    age = moment.uptime_seconds - ticks / os.sysconf("SC_CLK_TCK")
    return moment.before(max(0.0, age))


def birth() -> Birth:
    """Of this process: its own start, and that of the torchrun that started it, if one did."""
    has_launcher = "TORCHELASTIC_RUN_ID" in os.environ
    return Birth(
        process=process_start(), launcher=process_start(os.getppid()) if has_launcher else None
    )
