"""Real signals to this process and to real children."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from train.health.interruption import Interruption, Wish

SCRIPT = """
import os, signal, sys, threading, time
from train.health.interruption import Interruption
interruption = Interruption()
interruption.has_begun = lambda: {has_begun}
interruption.on_leave.append(lambda *what: print(*what, flush=True))
with interruption.installed():
    print("ready", flush=True)
    {body}
    print(interruption.wish, interruption.is_final, flush=True)
"""


def child(body: str, *, has_begun: bool) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(body=body, has_begun=has_begun)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def wait_until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("number", "wish", "is_final"),
    [
        (signal.SIGTERM, Wish.PREEMPTED, False),
        (signal.SIGUSR1, Wish.PREEMPTED, True),
        (signal.SIGINT, Wish.INTERRUPTED, True),
    ],
)
def test_a_signal_raises_the_flag_and_nothing_else(
    number: signal.Signals, wish: Wish, is_final: bool
) -> None:
    interruption = Interruption()
    interruption.has_begun = lambda: True
    before = signal.getsignal(number)
    with interruption.installed():
        assert not interruption.is_waiting()
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # once more, as a launcher may pass it on twice
        wait_until(interruption.is_waiting)
    assert interruption.wish is wish
    assert interruption.is_final is is_final
    assert signal.getsignal(number) is before
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize(
    ("number", "exit_code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)]
)
def test_before_the_first_step_the_process_leaves_at_once(
    number: signal.Signals, exit_code: int
) -> None:
    # The main thread is deep in a call that never comes back to Python, as in a collective.
    process = child("os.read(os.pipe()[0], 1)", has_begun=False)
    process.send_signal(number)
    output, _ = process.communicate(timeout=10)
    assert process.returncode == exit_code
    assert f"{number.name} came before the first step was done" in output


def test_a_second_interrupt_stops_at_once_even_in_a_call_that_never_returns() -> None:
    body = "lock = threading.Lock(); lock.acquire(); signal.pthread_sigmask(0, []); "
    process = child(body + "[os.read(os.pipe()[0], 1) for _ in range(9)]", has_begun=True)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)  # the same Ctrl-C, passed on twice
    time.sleep(1.0)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "interrupted 130 SIGINT came twice" in output


def test_a_forked_child_dies_of_a_signal_and_the_parent_does_not_hear_of_it() -> None:
    body = (
        "pid = os.fork() or time.sleep(60); os.kill(pid, signal.SIGTERM); "
        "print(os.waitpid(pid, 0)[1], flush=True)"
    )
    process = child(body, has_begun=True)
    output, _ = process.communicate(timeout=20)
    assert output.splitlines() == [str(int(signal.SIGTERM)), "None False"]


def test_the_wish_of_a_person_wins_and_what_one_rank_knows_holds_for_all() -> None:
    term, usr1, interrupt = (Wish.PREEMPTED, False), (Wish.PREEMPTED, True), Wish.INTERRUPTED
    none = (None, False)
    interruption = Interruption()
    assert interruption.agree([none, none]) is None
    assert (interruption.agree([term, none]), interruption.is_final) == (Wish.PREEMPTED, False)
    assert (interruption.agree([none, usr1]), interruption.is_final) == (Wish.PREEMPTED, True)
    assert interruption.agree([term, (interrupt, True)]) is interrupt
