"""Signals that ask a run to stop: SIGTERM and SIGUSR1 (preemption, time limit), SIGINT (a person).

A signal only raises a flag; the next step's reduce tells all ranks, which then save and stop
together. Before the first step is done there is nothing to save, so the process leaves at once; so
it does at a second SIGINT. The kernel's news goes through a pipe to a thread: the main thread may
sit in a collective, where no handler of Python's would run.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum

from train.health.outcome import INTERRUPTED, PREEMPTED, REQUEUE_EXIT_CODE, tell_launcher

logger = logging.getLogger(__name__)

INTERRUPTED_EXIT_CODE = 130
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# A terminal and a launcher may both pass one Ctrl-C on.
_SAME_SECONDS = 1.0


class Wish(StrEnum):
    """What a signal asks for."""

    PREEMPTED = PREEMPTED
    INTERRUPTED = INTERRUPTED

    @property
    def exit_code(self) -> int:
        """What the launcher is to read."""
        return REQUEUE_EXIT_CODE if self is Wish.PREEMPTED else INTERRUPTED_EXIT_CODE


class Interruption:
    """What this process was asked for, from any thread.

    `has_begun`: whether there is something to save. `on_leave`: writes down the end of a process
    that leaves at once: code, exit code, reason.
    """

    def __init__(self) -> None:
        self.wish: Wish | None = None
        self.is_final = False
        """True if this launch must not start the run again. A SIGTERM is not: torchrun's agent
        sends it as well when a host joins, and starts the ranks again; if it was told to end
        itself, it does not."""
        self.has_begun: Callable[[], bool] = lambda: False
        self.on_leave: list[Callable[[str, int, str], None]] = []
        self._first_interrupt: float | None = None

    def is_waiting(self) -> bool:
        """True once a signal has come; costs nothing."""
        return self.wish is not None

    def own(self) -> tuple[Wish | None, bool]:
        """Return this rank's part of the agreement."""
        return self.wish, self.is_final

    def agree(self, answers: list[tuple[Wish | None, bool]]) -> Wish | None:
        """Return what all ranks do, from every rank's `own()`."""
        wishes = [wish for wish, _ in answers if wish is not None]
        self.is_final = any(is_final for _, is_final in answers)
        if not wishes:
            return None
        # A person's wish to stop is stronger: nobody shall start it again.
        return Wish.INTERRUPTED if Wish.INTERRUPTED in wishes else Wish.PREEMPTED

    @contextmanager
    def installed(self) -> Iterator[Interruption]:
        """Take the signals over, in the main thread; elsewhere do nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        handlers = {number: signal.signal(number, _ignore) for number in _SIGNALS}
        old_descriptor = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        thread = threading.Thread(target=self._listen, args=(reader,), name="signals", daemon=True)
        thread.start()
        owner = os.getpid()

        def give_back() -> None:
            signal.set_wakeup_fd(old_descriptor)
            for number, handler in handlers.items():
                signal.signal(number, handler)

        def give_back_in_child() -> None:
            if os.getppid() == owner and signal.getsignal(signal.SIGTERM) is _ignore:
                give_back()  # a child that is told to end ends
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

        os.register_at_fork(
            before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS),
            after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS),
            after_in_child=give_back_in_child,
        )
        try:
            yield self
        finally:
            give_back()
            os.write(writer, b"\0")
            thread.join()
            os.close(reader)
            os.close(writer)

    def _listen(self, reader: int) -> None:
        while True:
            for number in os.read(reader, 16):
                if number == 0:
                    return
                self._take(signal.Signals(number))

    def _take(self, number: signal.Signals) -> None:
        now = time.monotonic()
        is_again = False
        if number is signal.SIGINT:
            first = self._first_interrupt
            is_again = first is not None and now - first > _SAME_SECONDS
            self._first_interrupt = now if first is None else first
            self.wish = Wish.INTERRUPTED
        elif self.wish is None:
            self.wish = Wish.PREEMPTED
        self.is_final |= number is not signal.SIGTERM
        if is_again:
            self._leave(f"{number.name} came twice: stopped at once")
        if not self.has_begun():
            self._leave(f"{number.name} came before the first step was done")
        logger.warning("%s: saving and stopping at the end of this step", number.name)

    def _leave(self, reason: str) -> None:
        assert self.wish is not None
        logger.warning("%s; the same command goes on", reason)
        try:
            for write_down in self.on_leave:
                write_down(str(self.wish), self.wish.exit_code, reason)
            if os.environ.get("RANK", "0") == "0":
                tell_launcher(str(self.wish), self.wish.exit_code, reason)
        finally:
            os._exit(self.wish.exit_code)


def _ignore(number: int, frame: object) -> None:
    """Do nothing: the thread has the news already."""
    del number, frame
