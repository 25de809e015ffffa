"""The line-oriented files of a run folder: one tolerant reader, one whole-line writer.

Owns the JSON-lines format of `metrics.jsonl`, `events.jsonl` and `journal.jsonl`: a process may be
killed in the middle of a line at any time, so a reader skips and counts what it cannot parse, and a
writer never appends to a torn line. Refuses to interpret the records, and to make a writer wait for
the disk: a thread fsyncs, so that a power loss costs seconds. Called by the training loop
(writer) and by the goodput, report and CLI code (reader); nothing here is collective.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from monitoring.background_sync import SYNC_SECONDS, BackgroundSync

Record = Mapping[str, object]

METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"
JOURNAL_FILE = "journal.jsonl"
SUMMARY_FILE = "summary.json"
RUN_FILE = "run.json"
CONFIG_FILE = "config.yaml"


class UnreadableRecordsError(Exception):
    """A file of a run folder exists but cannot be read at all (a folder, no permission)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonLines:
    """What could be read from one file: the records in file order, and how many lines could not."""

    records: tuple[Record, ...] = ()
    num_skipped: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecords:
    """Everything a run folder says about one run.

    `metrics` keeps every line, in file order, with the lines that a restart wrote again;
    `curve` is the same by clock with the last line winning, which is what charts want.
    """

    folder: Path
    name: str
    run_id: str
    created_utc: str = ""
    config_yaml: str = ""
    metrics: tuple[Record, ...] = ()
    events: tuple[Record, ...] = ()
    journal: tuple[Record, ...] = ()
    summary: Record = field(default_factory=dict)
    num_skipped_lines: int = 0

    @property
    def curve(self) -> tuple[Record, ...]:
        """The metrics by clock, each clock once, the last line written for it winning."""
        return latest_by_clock(self.metrics)


class JsonLinesWriter:
    """Appends one whole line a record, so that a kill can tear at most the line being written.

    Opening a file whose last line is torn first ends that line. Each record is a single write to a
    file in append mode; nothing is buffered in the process, and a thread brings it to the disk
    within `sync_seconds`. Not for several writers at once.

    Raises:
        OSError: the file cannot be opened or written (no space, no permission).
    """

    def __init__(self, path: Path, *, sync_seconds: float = SYNC_SECONDS) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._is_torn = _ends_torn(path)
        self._file = path.open("ab", buffering=0)
        self._sync = BackgroundSync(path, self._file.fileno(), sync_seconds)

    @property
    def path(self) -> Path:
        """The file that is written."""
        return self._path

    def write(self, record: Record, *, is_urgent: bool = False) -> None:
        """Append one record as one line; NaN and infinities become null, unknown types strings.

        `is_urgent`: the thread brings it to the disk now; nobody waits for that either.
        """
        text = json.dumps(finite(record), allow_nan=False, separators=(",", ":"), default=str)
        line = text.encode("utf-8") + b"\n"
        if self._is_torn:
            line = b"\n" + line
        num_written = self._file.write(line)
        self._is_torn = num_written != len(line)
        if self._is_torn:
            raise OSError(
                f"{self._path}: wrote {num_written} of {len(line)} bytes; is the disk full?"
            )
        self._sync.mark(is_urgent=is_urgent)

    def close(self) -> None:
        """Close the file when all of it is on disk; a second call does nothing."""
        self._sync.close()
        self._file.close()


def read_json_lines(path: Path, keys: Collection[str] | None = None) -> JsonLines:
    """Read every line that is a JSON object; a file that does not exist has no records.

    Blank lines are ignored. A line that is torn, is not UTF-8 or is not an object is skipped and
    counted in `num_skipped`. NaN and infinities read as None. With `keys`, nothing else of a
    record is kept, which takes a fraction of the memory.

    Raises:
        UnreadableRecordsError: the path is a folder or may not be read.
    """
    if not path.exists():
        return JsonLines()
    records: list[Record] = []
    num_skipped = 0
    try:
        with path.open("rb") as file:
            for line in file:
                record = _parse_object(line)
                if record is None:
                    num_skipped += bool(line.strip())
                elif keys is None:
                    records.append(record)
                else:
                    records.append({key: record[key] for key in keys if key in record})
    except OSError as error:
        raise UnreadableRecordsError(f"{path}: cannot be read: {error.strerror}") from error
    return JsonLines(records=tuple(records), num_skipped=num_skipped)


def check_run(folder: Path) -> None:
    """Refuse what is no folder.

    Raises:
        UnreadableRecordsError: the folder does not exist.
    """
    if not folder.is_dir():
        raise UnreadableRecordsError(f"{folder}: no such run folder; expected runs/<name>")


def read_run(folder: Path) -> RunRecords:
    """Read a run folder as far as it has been written; every file may still be missing.

    Raises:
        UnreadableRecordsError: the folder does not exist, or a file in it cannot be read.
    """
    check_run(folder)
    identity = _read_object(folder / RUN_FILE)
    metrics = read_json_lines(folder / METRICS_FILE)
    events = read_json_lines(folder / EVENTS_FILE)
    journal = read_json_lines(folder / JOURNAL_FILE)
    return RunRecords(
        folder=folder,
        name=str(identity.get("name") or folder.resolve().name),
        run_id=str(identity.get("run_id") or ""),
        created_utc=str(identity.get("created_utc") or ""),
        config_yaml=_read_text(folder / CONFIG_FILE),
        metrics=metrics.records,
        events=events.records,
        journal=journal.records,
        summary=_read_object(folder / SUMMARY_FILE),
        num_skipped_lines=metrics.num_skipped + events.num_skipped + journal.num_skipped,
    )


def latest_by_clock(records: Iterable[Record]) -> tuple[Record, ...]:
    """Keep one record a clock, the last one in file order, sorted by clock; others are dropped."""
    by_clock: dict[int, Record] = {}
    for record in records:
        clock = integer(record, "clock")
        if clock is not None:
            by_clock[clock] = record
    return tuple(by_clock[clock] for clock in sorted(by_clock))


def number(record: Record, key: str) -> float | None:
    """The finite number under a key, or None where it is missing, null, a bool or not a number."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def integer(record: Record, key: str) -> int | None:
    """The whole number under a key, or None; 3.0 counts as 3."""
    value = number(record, key)
    return None if value is None else int(value)


def sample_range(record: Record, key: str = "skip") -> tuple[int, int] | None:
    """The `[start, stop)` pair of global sample indices under a key, or None."""
    value = record.get(key)
    if not isinstance(value, list | tuple) or len(value) != 2:
        return None
    start, stop = value
    if not isinstance(start, int) or not isinstance(stop, int):
        return None
    return start, stop


def finite(value: object) -> object:
    """A copy in which every non-finite float, however deep, is None, and keys are strings."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def _parse_object(line: bytes) -> Record | None:
    try:
        value = json.loads(line, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _ends_torn(path: Path) -> bool:
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    except OSError as error:
        raise UnreadableRecordsError(f"{path}: cannot be read: {error.strerror}") from error


def _read_object(path: Path) -> Record:
    text = _read_text(path)
    return (_parse_object(text.encode("utf-8")) or {}) if text else {}
