"""Who hears how far a preparation is: nobody, a bar on a terminal, or lines in a log.

Owns what is shown and how often. Called by `job` through `Listener`.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol, TextIO

from train.data.prepare.documents import Advance

if TYPE_CHECKING:
    from rich.progress import Progress

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_BARS = 0.1


class Listener(Protocol):
    """Hears how far a preparation is."""

    def stage(self, name: str) -> None:
        """Something begins that is not counted."""

    def start(self, *, num_bytes: int, num_bytes_done: int) -> None:
        """Tasks begin; so many bytes of input were done by an earlier call."""

    def advance(self, done: Advance) -> None:
        """A part of a task is done."""


class Silence:
    """Nobody listens."""

    def stage(self, name: str) -> None:
        """Do nothing."""

    def start(self, *, num_bytes: int, num_bytes_done: int) -> None:
        """Do nothing."""

    def advance(self, done: Advance) -> None:
        """Do nothing."""


class Tally:
    """Sums up what is done, and puts it in words."""

    def __init__(self) -> None:
        self._num_bytes = 0
        self._bytes_before = 0
        self._started = time.monotonic()
        self.done = Advance(0, 0, 0, 0)

    def start(self, *, num_bytes: int, num_bytes_done: int) -> None:
        """Begin to count."""
        self._num_bytes, self._bytes_before = num_bytes, num_bytes_done
        self._started = time.monotonic()

    def add(self, done: Advance) -> None:
        """Count."""
        self.done = Advance(*map(sum, zip(self.done, done, strict=True)))

    @property
    def share(self) -> float:
        """How much of the input is done, from 0 to 1."""
        done = self._bytes_before + self.done.source_bytes
        return min(1.0, done / self._num_bytes) if self._num_bytes else 1.0

    @property
    def counts(self) -> str:
        """Documents, tokens and speed."""
        seconds = max(time.monotonic() - self._started, 1e-9)
        return (
            f"{self.done.documents:,} documents, {self.done.tokens:,} tokens, "
            f"{self.done.text_bytes / seconds / 1e6:.1f} MB/s"
        )

    @property
    def seconds_left(self) -> float:
        """How long it will take, at the speed so far."""
        seconds = time.monotonic() - self._started
        own = self.done.source_bytes
        left = max(0, self._num_bytes - self._bytes_before - own)
        return seconds * left / own if own else float("inf")

    @property
    def remaining(self) -> str:
        """The same in words."""
        seconds = self.seconds_left
        if seconds == float("inf"):
            return "--:-- left"
        hours, minutes = divmod(round(seconds) // 60, 60)
        if hours:
            return f"{hours}:{minutes:02d}:{round(seconds) % 60:02d} left"
        return f"{minutes}:{round(seconds) % 60:02d} left"


class Lines:
    """A line now and then, for logs."""

    def __init__(self, output: TextIO, seconds_between: float = _SECONDS_BETWEEN_LINES) -> None:
        self._output = output
        self._seconds_between = seconds_between
        self._tally = Tally()
        self._said = time.monotonic()

    def stage(self, name: str) -> None:
        """Say what begins."""
        self._output.write(f"{name}\n")
        self._output.flush()

    def start(self, *, num_bytes: int, num_bytes_done: int) -> None:
        """Say what is to be done."""
        self._tally.start(num_bytes=num_bytes, num_bytes_done=num_bytes_done)
        kept = f", {num_bytes_done / 1e6:,.1f} MB of them done before" if num_bytes_done else ""
        self.stage(f"tokenising {num_bytes / 1e6:,.1f} MB of files{kept}")

    def advance(self, done: Advance) -> None:
        """Count, and say so if it is time."""
        self._tally.add(done)
        now = time.monotonic()
        if now - self._said >= self._seconds_between:
            self._said = now
            tally = self._tally
            self.stage(f"{100 * tally.share:.1f}%: {tally.counts}, {tally.remaining}")


class Bar:
    """A bar on a terminal; a context manager."""

    def __init__(self, output: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._tally = Tally()
        self._bar: Progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.percentage:>5.1f}%"),
            TextColumn("{task.fields[counts]}"),
            console=Console(file=output),
            transient=True,
        )
        self._task = self._bar.add_task("starting", total=1.0, counts="")
        self._drawn = 0.0

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def stage(self, name: str) -> None:
        """Show what begins."""
        self._bar.update(self._task, description=name)

    def start(self, *, num_bytes: int, num_bytes_done: int) -> None:
        """Show that tasks begin."""
        self._tally.start(num_bytes=num_bytes, num_bytes_done=num_bytes_done)
        self._bar.update(self._task, description="tokenising", completed=self._tally.share)

    def advance(self, done: Advance) -> None:
        """Count and draw."""
        self._tally.add(done)
        now = time.monotonic()
        if now - self._drawn < _SECONDS_BETWEEN_BARS and self._tally.share < 1:
            return
        self._drawn = now
        counts = f"{self._tally.counts}, {self._tally.remaining}"
        self._bar.update(self._task, completed=self._tally.share, counts=counts)
