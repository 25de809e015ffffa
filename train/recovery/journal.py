"""The recovery journal: an append-only file that outlives checkpoints and processes.

Each line is one record with a checksum, written whole and fsynced before the run goes on. A rewind
writes an *intent* (everything that is needed to do it) and, when all of it is done, a *done*. After
any crash, an intent without its done is finished first, so a kill at any point leads to the same
decision. A torn last line is a record that was never written.

Rank 0 writes; every rank reads what rank 0 read.
"""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

from train.durable import fsync_folder
from train.errors import JournalError
from train.state import BatchRange

logger = logging.getLogger(__name__)


class Phase(StrEnum):
    """How far a rewind is."""

    INTENT = "intent"
    DONE = "done"


@dataclass(frozen=True, slots=True, kw_only=True)
class Incident:
    """One journal record.

    `skip` is `[start, stop)` in global sample indices; `quarantine` names the checkpoints younger
    than the target; `clock` is where the run's clock stood, and goes on from.
    """

    incident: int
    phase: Phase
    time: str
    rule: str
    reason: str
    verdict: str
    onset_step: int
    detected_step: int
    clock: int
    target_checkpoint: str
    target_step: int
    skip: tuple[int, int]
    quarantine: tuple[str, ...]

    @property
    def skip_range(self) -> BatchRange:
        """The skipped samples as a range."""
        return BatchRange(start=self.skip[0], stop=self.skip[1])


def now_utc() -> str:
    """Return the present time, ISO 8601 in UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class Journal:
    """The journal of one run folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, incident: Incident) -> None:
        """Write one record and return when it is durable. Called on rank 0 alone."""
        body = json.dumps(asdict(incident), sort_keys=True)
        record = {**json.loads(body), "crc": f"{zlib.crc32(body.encode()):08x}"}
        is_new = not self.path.exists()
        line = json.dumps(record, sort_keys=True) + "\n"
        if not is_new and not self._ends_with_newline():
            line = "\n" + line
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            view = memoryview(line.encode())
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if is_new:
            fsync_folder(self.path.parent)

    def read(self) -> list[Incident]:
        """Return all whole records in order; a torn line is logged and left out.

        Raises: JournalError if a whole line fails its checksum or contradicts the format.
        """
        incidents = []
        try:
            lines = self.path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise JournalError(f"{self.path} cannot be read ({error.strerror})") from error
        for number, line in enumerate(lines, start=1):
            if line.strip():
                incident = self._parse(number, line)
                if incident is not None:
                    incidents.append(incident)
        return incidents

    def _parse(self, number: int, line: bytes) -> Incident | None:
        try:
            record = json.loads(line)
            crc = record.pop("crc")
            body = json.dumps(record, sort_keys=True)
        except (ValueError, KeyError, AttributeError, TypeError):
            logger.warning("%s:%d is torn and was left out", self.path, number)
            return None
        if crc != f"{zlib.crc32(body.encode()):08x}":
            raise JournalError(
                f"{self.path}:{number} is whole but fails its checksum: it was changed after it "
                "was written, and the data that it skips would be trained on; bring the line back "
                "from a copy, or remove it to accept that"
            )
        try:
            record["phase"] = Phase(record["phase"])
            record["skip"] = (int(record["skip"][0]), int(record["skip"][1]))
            record["quarantine"] = tuple(record["quarantine"])
            return Incident(**record)
        except (TypeError, ValueError, LookupError) as error:
            raise JournalError(
                f"{self.path}:{number} is whole but not a record of this version ({error}); "
                "it was written by another version of Trimtab: use that one to go on"
            ) from error

    def _ends_with_newline(self) -> bool:
        with self.path.open("rb") as file:
            if file.seek(0, os.SEEK_END) == 0:
                return True
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"


def pending(incidents: Iterable[Incident]) -> Incident | None:
    """Return the intent that has no done yet, or None."""
    open_intent: Incident | None = None
    for incident in incidents:
        open_intent = incident if incident.phase is Phase.INTENT else None
    return open_intent


def finished(incidents: Iterable[Incident]) -> list[Incident]:
    """Return the done records in order."""
    return [incident for incident in incidents if incident.phase is Phase.DONE]
