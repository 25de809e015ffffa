"""What becomes of a run's turns in `events.jsonl`, in trackers and on the console."""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import at

from monitoring.clocks import Birth, Moment, boot_id, now
from monitoring.console import ConsoleProgress
from monitoring.records import JsonLinesWriter
from monitoring.trackers import TrackerConfig
from train.actions import Note
from train.callbacks.tracking import Telemetry, Tracking
from train.events import RunStart
from train.health.corruption import Check, Corruption, Vote
from train.recovery.journal import Incident, Phase
from train.recovery.policy import Rung

REWIND = Incident(
    incident=2,
    attempt=3,
    rewinds=5,
    phase=Phase.DONE,
    time="",
    rule="ladder",
    rung=Rung.COOL,
    reason="spike at step 58",
    verdict="spike",
    onset_step=58,
    detected_step=60,
    clock=71,
    target_checkpoint="step-00000040-clock-00000040",
    target_step=40,
    skip=(640, 976),
    quarantine=(),
    lr_scale=0.5,
)
SKIP_AHEAD = replace(REWIND, rung=Rung.SKIP_AHEAD, target_checkpoint="", lr_scale=1.0)
UNSKIP = replace(SKIP_AHEAD, rung=Rung.UNSKIP, skip=(640, 640), returned=(9000, 640, 976))
NOTE = Note(
    rule="observe",
    rung=Rung.SKIP,
    incident=2,
    attempt=1,
    is_observed=True,
    verdict="spike",
    onset_step=58,
    detected_step=60,
    clock=71,
    reason="spike at step 58; would skip from step 40",
)


class ListTracker:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str, int]] = []

    def start(self, *arguments: object) -> None:
        pass

    def log(self, metrics: Mapping[str, object], step: int) -> None:
        pass

    def event(self, kind: str, text: str, step: int) -> None:
        self.events.append((kind, text, step))

    def finish(self, summary: Mapping[str, object]) -> None:
        pass


@pytest.fixture
def tracker() -> ListTracker:
    return ListTracker()


@pytest.fixture
def tracking(tmp_path: Path, tracker: ListTracker) -> Tracking:
    telemetry = Telemetry(
        folder=tmp_path,
        run_id="r",
        attempt=4,
        birth=Birth(process=Moment(unix_seconds=0.0, uptime_seconds=0.0)),
        world_size=2,
        engine="ddp",
        host="h",
        config={},
        flops_per_token=10.0,
        peak_flops=None,
        group_names=(),
    )
    console = ConsoleProgress(1, "r", is_terminal=False)
    trackers: Any = [tracker]
    return Tracking(telemetry, trackers, TrackerConfig(), console)


def written(tracking: Tracking, folder: Path) -> dict[str, Any]:
    """Return the one event that was written."""
    tracking.close()
    (line,) = (folder / "events.jsonl").read_text().splitlines()
    event: dict[str, Any] = json.loads(line)
    assert event["attempt"] == 4, "the start of the process, not the attempt at the incident"
    return event


def test_rewind_is_recorded_and_told(
    tracking: Tracking, tracker: ListTracker, tmp_path: Path
) -> None:
    tracking.on_rewind(REWIND, at(40, clock=71), 1.25)
    event = written(tracking, tmp_path)
    expected = {
        "kind": "rewind",
        "incident": 2,
        "incident_attempt": 3,
        "rung": "cool",
        "from_step": 60,
        "to_step": 40,
        "from_clock": 71,
        "clock": 71,
        "step": 40,
        "skip": [640, 976],
        "seconds": 1.25,
    }
    assert event.items() >= {**expected, "skip": [640, 976]}.items()
    ((kind, text, clock),) = tracker.events
    assert (kind, clock) == ("rewind", 71)
    assert text == (
        "incident 2, cool: spike at step 58; back to step 40, 336 samples skipped, "
        "learning rate x 0.5, 1.25 s"
    )


def test_rewind_that_cools_nothing_speaks_of_no_learning_rate(
    tracking: Tracking, tracker: ListTracker
) -> None:
    tracking.on_rewind(replace(REWIND, rung=Rung.SKIP, lr_scale=1.0), at(40), 0.1)
    tracking.close()
    assert "learning rate" not in tracker.events[0][1]


def test_operators_skip_is_recorded_and_told(
    tracking: Tracking, tracker: ListTracker, tmp_path: Path
) -> None:
    tracking.on_ledger_change(SKIP_AHEAD, at(61))
    event = written(tracking, tmp_path)
    assert (event["kind"], event["rung"], event["returned"]) == (
        "ledger_change",
        "skip_ahead",
        None,
    )
    assert tracker.events[0][1].endswith("336 samples skipped")


def test_operators_return_is_recorded_and_told(
    tracking: Tracking, tracker: ListTracker, tmp_path: Path
) -> None:
    tracking.on_ledger_change(UNSKIP, at(61))
    assert written(tracking, tmp_path)["returned"] == [9000, 640, 976]
    assert tracker.events[0][1].endswith("samples 640 to 976 come again at 9000")


def test_what_was_observed_is_recorded_and_told(
    tracking: Tracking, tracker: ListTracker, tmp_path: Path
) -> None:
    tracking.on_note(NOTE, at(60))
    event = written(tracking, tmp_path)
    assert (event["kind"], event["rung"], event["incident"]) == ("note", "skip", 2)
    assert tracker.events[0][0] == "observed"
    assert "would skip from step 40" in tracker.events[0][1]


def test_refused_update_is_recorded_and_not_told(
    tracking: Tracking, tracker: ListTracker, tmp_path: Path
) -> None:
    tracking.on_note(replace(NOTE, rung=Rung.VETO, is_observed=False), at(60))
    assert written(tracking, tmp_path)["rung"] == "veto"
    assert tracker.events == []


def test_snapshot_is_recorded_with_what_the_step_waited(tracking: Tracking, tmp_path: Path) -> None:
    tracking.on_snapshot_taken(at(60), 0.003)
    event = written(tracking, tmp_path)
    assert (event["kind"], event["step"], event["seconds"]) == ("snapshot", 60, 0.003)


def test_start_and_end_are_stamped_on_both_clocks(
    tracking: Tracking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    before = now()
    tracking.on_run_start(
        RunStart(name="r", state=at(0), last_step=9, num_parameters=1, is_resumed=False)
    )
    tracking.close()
    start, end = map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
    assert (start["kind"], end["kind"]) == ("run_start", "exit")
    assert start["boot_id"] == boot_id()
    assert start["process_seconds"] == pytest.approx(start["uptime"], abs=0.5), "began at boot"
    assert start["launcher_seconds"] is None
    for record in (start, end):
        assert record["uptime"] - before.uptime_seconds == pytest.approx(
            record["time"] - before.unix_seconds, abs=0.5
        )


def test_search_for_corruption_is_recorded_and_what_it_found_is_shown(
    tracking: Tracking, tracker: ListTracker, tmp_path: Path
) -> None:
    found = Corruption(
        check=Check.REPLICAS,
        vote=Vote(ranks=(3,), is_certain=True),
        places=("node7, cuda:3",),
        tensors=("w/parameter",),
        detail="another state",
    )
    tracking.on_integrity_check(Check.REPLICAS, None, at(50), 0.01)
    tracking.on_integrity_check(Check.REPLICAS, found, at(60), 0.02)
    tracking.close()
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    calm, corrupt = map(json.loads, lines)
    assert calm["kind"] == corrupt["kind"] == "integrity_check"
    assert (calm["ranks"], calm["seconds"], calm["step"]) == ([], 0.01, 50)
    assert (corrupt["ranks"], corrupt["tensors"]) == ([3], ["w/parameter"])
    words = "silent corruption: rank 3 (node7, cuda:3): another state"
    assert tracker.events == [("corruption", words, 60)]


def test_full_disk_is_one_line_and_the_event_is_told_all_the_same(
    tracking: Tracking,
    tracker: ListTracker,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(JsonLinesWriter, "write", fail)
        tracking.on_rewind(REWIND, at(40), 0.1)
        tracking.on_snapshot_taken(at(41), 0.1)
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ["events.jsonl cannot be written (No space left on device)"]
    assert [kind for kind, _, _ in tracker.events] == ["rewind"]
    tracking.on_snapshot_taken(at(42), 0.1)
    assert written(tracking, tmp_path)["step"] == 42
