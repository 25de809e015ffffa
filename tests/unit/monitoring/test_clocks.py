"""The two clocks: what records are stamped with, and when a process was born."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from monitoring import clocks
from monitoring.clocks import Moment, birth, boot_id, now, process_start


def test_age_is_told_by_the_time_since_boot_alone() -> None:
    earlier = Moment(unix_seconds=9e9, uptime_seconds=10.0)
    later = Moment(unix_seconds=0.0, uptime_seconds=12.5)
    assert later.seconds_since(earlier) == 2.5
    assert earlier.seconds_since(later) == 0.0


def test_process_began_when_the_kernel_says() -> None:
    before = now()
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        after = now()
        time.sleep(0.1)
        found = process_start(child.pid).uptime_seconds
        # The kernel counts in hundredths of a second.
        assert before.uptime_seconds - 0.02 <= found <= after.uptime_seconds + 0.02
    finally:
        child.communicate(b"\n")
    assert process_start().uptime_seconds < before.uptime_seconds


def test_process_that_is_gone_began_now() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert now().seconds_since(process_start(child.pid)) < 1.0


def test_launcher_is_the_parent_under_torchrun_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert birth().launcher is None
    assert birth().process.uptime_seconds < now().uptime_seconds
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    found = birth().launcher
    assert found is not None
    parent = process_start(os.getppid())
    assert found.uptime_seconds == pytest.approx(parent.uptime_seconds, abs=0.02)


def test_boot_has_a_name() -> None:
    assert boot_id() == boot_id() != ""
    assert clocks.now().uptime_seconds > 0
