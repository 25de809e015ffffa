"""MFU is a share: a peak that was measured too low is given up, not shown as 286%."""

from __future__ import annotations

from pathlib import Path

import pytest

from monitoring.clocks import Birth, Moment
from monitoring.console import ConsoleProgress
from monitoring.trackers import TrackerConfig
from train.callbacks.tracking import Telemetry, Tracking


def test_impossible_share_is_not_shown_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    telemetry = Telemetry(
        folder=tmp_path,
        run_id="r",
        attempt=0,
        birth=Birth(process=Moment(unix_seconds=0.0, uptime_seconds=0.0)),
        world_size=2,
        engine="ddp",
        host="h",
        config={},
        flops_per_token=10.0,
        peak_flops=100.0,
        group_names=(),
    )
    tracking = Tracking(telemetry, [], TrackerConfig(), ConsoleProgress(1, "r", is_terminal=False))
    assert tracking._mfu(10.0) == 0.5
    assert tracking._mfu(30.0) is None
    assert tracking._mfu(10.0) is None
    assert caplog.text.count("set engine.peak_tflops") == 1
    tracking.close()
