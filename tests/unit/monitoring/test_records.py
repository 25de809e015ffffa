"""The readers and the writer of a run folder's line-oriented files."""

from __future__ import annotations

import errno
import json
import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from monitoring.records import (
    JsonLinesWriter,
    UnreadableRecordsError,
    latest_by_clock,
    number,
    read_json_lines,
    read_run,
    sample_range,
)


def test_missing_file_has_no_records(tmp_path: Path) -> None:
    assert read_json_lines(tmp_path / "metrics.jsonl").records == ()


def test_torn_last_line_is_skipped_and_counted(
    tmp_path: Path, add_torn_line: Callable[[Path], None]
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"clock": 1}\n\n')
    add_torn_line(path)
    lines = read_json_lines(path)
    assert lines.records == ({"clock": 1},)
    assert lines.num_skipped == 1


def test_garbage_and_non_objects_in_the_middle_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"a": 1}\n[1, 2]\n\xff\xfe\x00\n{"b"\n{"a": 2}\n')
    lines = read_json_lines(path)
    assert [record["a"] for record in lines.records] == [1, 2]
    assert lines.num_skipped == 3


def test_folder_in_place_of_a_file_raises_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(UnreadableRecordsError, match=str(tmp_path)):
        read_json_lines(tmp_path)


def test_missing_run_folder_raises_with_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(UnreadableRecordsError, match="expected runs/<name>"):
        read_run(tmp_path / "nowhere")


def test_empty_run_folder_reads_as_a_run_that_did_nothing(tmp_path: Path) -> None:
    run = read_run(tmp_path)
    assert run.name == tmp_path.name
    assert run.metrics == run.events == run.journal == ()


def test_writer_turns_non_finite_numbers_into_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = JsonLinesWriter(path)
    writer.write({"loss_nats": math.nan, "deep": [math.inf, {"x": -math.inf}], "lr": 0.1})
    writer.close()
    assert json.loads(path.read_text()) == {
        "loss_nats": None,
        "deep": [None, {"x": None}],
        "lr": 0.1,
    }


def test_nan_written_by_others_reads_as_none(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"loss_nats": NaN}\n')
    assert number(read_json_lines(path).records[0], "loss_nats") is None


def test_writer_ends_a_torn_line_before_it_appends(
    tmp_path: Path, add_torn_line: Callable[[Path], None]
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"clock": 1}\n')
    add_torn_line(path)
    writer = JsonLinesWriter(path)
    writer.write({"clock": 2})
    writer.write({"clock": 3})
    writer.close()
    lines = read_json_lines(path)
    assert [record["clock"] for record in lines.records] == [1, 2, 3]
    assert lines.num_skipped == 1


def test_each_record_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "events.jsonl"
    writer = JsonLinesWriter(path)
    writer.write({"kind": "stop", "path": Path("a/b")})
    assert read_json_lines(path).records == ({"kind": "stop", "path": "a/b"},)
    writer.close()
    writer.close()


def test_last_line_of_a_clock_wins() -> None:
    records = [{"clock": 2, "a": 1}, {"clock": 1, "a": 2}, {"clock": 2, "a": 3}, {"a": 4}]
    assert [record["a"] for record in latest_by_clock(records)] == [2, 3]


@pytest.mark.parametrize("value", [None, [1], [1, "2"], "1,2", 3])
def test_malformed_sample_range_reads_as_none(value: object) -> None:
    assert sample_range({"skip": value}) is None


# What a power loss costs.


class SlowDisk:
    """Stands in for `os.fsync`: says what was synced, and takes as long as a test wants."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.synced: list[str] = []
        self.is_free = threading.Event()
        self.is_free.set()
        self.failure: OSError | None = None
        monkeypatch.setattr("monitoring.background_sync.os.fsync", self.sync)

    def sync(self, descriptor: int) -> None:
        self.synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        self.is_free.wait(10)
        if self.failure is not None:
            raise self.failure

    def wait_for(self, count: int) -> None:
        deadline = time.monotonic() + 10
        while len(self.synced) < count and time.monotonic() < deadline:
            time.sleep(0.001)
        assert len(self.synced) >= count


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> SlowDisk:
    return SlowDisk(monkeypatch)


def test_urgent_record_is_brought_to_the_disk_at_once_with_its_folder(
    tmp_path: Path, disk: SlowDisk
) -> None:
    writer = JsonLinesWriter(tmp_path / "events.jsonl", sync_seconds=3600.0)
    writer.write({"kind": "rewind"}, is_urgent=True)
    disk.wait_for(2)
    assert disk.synced == [str(tmp_path / "events.jsonl"), str(tmp_path)]
    writer.close()


def test_other_records_are_brought_to_the_disk_within_the_interval(
    tmp_path: Path, disk: SlowDisk
) -> None:
    writer = JsonLinesWriter(tmp_path / "metrics.jsonl", sync_seconds=0.01)
    for clock in range(5):
        writer.write({"clock": clock})
    disk.wait_for(1)
    time.sleep(0.1)
    num_synced = len(disk.synced)
    time.sleep(0.1)
    assert len(disk.synced) == num_synced, "nothing new, nothing to do"
    writer.close()


def test_writer_never_waits_for_a_disk_that_hangs(tmp_path: Path, disk: SlowDisk) -> None:
    disk.is_free.clear()
    writer = JsonLinesWriter(tmp_path / "events.jsonl")
    writer.write({"clock": 0}, is_urgent=True)
    disk.wait_for(1)
    for clock in range(1, 100):
        writer.write({"clock": clock}, is_urgent=True)
    assert len(read_json_lines(writer.path).records) == 100
    assert len(disk.synced) == 1, "still at the first one"
    disk.is_free.set()
    writer.close()


def test_close_brings_the_rest_to_the_disk(tmp_path: Path, disk: SlowDisk) -> None:
    writer = JsonLinesWriter(tmp_path / "metrics.jsonl", sync_seconds=3600.0)
    writer.write({"clock": 1})
    assert disk.synced == []
    writer.close()
    writer.close()
    assert disk.synced[0] == str(tmp_path / "metrics.jsonl")


def test_file_system_without_fsync_is_one_warning(
    tmp_path: Path, disk: SlowDisk, caplog: pytest.LogCaptureFixture
) -> None:
    disk.failure = OSError(errno.EINVAL, "Invalid argument")
    writer = JsonLinesWriter(tmp_path / "metrics.jsonl", sync_seconds=0.001)
    for clock in range(20):
        writer.write({"clock": clock}, is_urgent=True)
        time.sleep(0.002)
    writer.close()
    (message,) = [record.getMessage() for record in caplog.records]
    assert "metrics.jsonl could not be brought to the disk (Invalid argument)" in message
    assert len(read_json_lines(writer.path).records) == 20


def test_only_the_keys_that_are_asked_for_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"clock": 1, "lr": 2}\n\n{"lr": 3}\n{"clo')
    lines = read_json_lines(path, ("clock", "step"))
    assert lines.records == ({"clock": 1}, {})
    assert lines.num_skipped == 1
