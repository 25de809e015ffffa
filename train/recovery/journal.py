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
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from train.data.units import rescale_range
from train.durable import fsync_folder
from train.errors import JournalError
from train.recovery.policy import Rung
from train.state import BatchRange

logger = logging.getLogger(__name__)


class Phase(StrEnum):
    """How far an act is. What has no parts, such as a refused update, is `done` at once."""

    INTENT = "intent"
    DONE = "done"
    OBSERVED = "observed"
    """What would have been done, had the rule been allowed to act."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Incident:
    """One journal record: one attempt at an incident, or an operator's act.

    `incident` numbers the troubles from 1 (0: a refused update, which was none), `attempt` the
    tries at each, `rewinds` all rewinds of the run, this one included. `skip` is `[start, stop)`
    in positions of the data sequence; `returned` is `(position, start, stop)`: what was skipped
    comes again there. `quarantine` names the checkpoints younger than the target, `kept` those
    that attribution will need. `clock` is where the run's clock stood, and goes on from. The
    learning rate is multiplied by `lr_scale` from `lr_from_step` to `lr_until_step`, and is whole
    again at `lr_return_step`. `request` is the operator's request that this fulfils. `suspects` are
    hosts and devices that gave wrong bits. Positions are of samples of `sequence_length` tokens; 0
    is that of the run.
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
    rung: Rung = Rung.SKIP
    attempt: int = 1
    rewinds: int = 0
    code: str = ""
    lr_scale: float = 1.0
    lr_from_step: int = 0
    lr_until_step: int = 0
    lr_return_step: int = 0
    returned: tuple[int, int, int] | None = None
    kept: tuple[str, ...] = ()
    request: str = ""
    suspects: tuple[str, ...] = ()
    sequence_length: int = 0

    @property
    def skip_range(self) -> BatchRange:
        """The skipped samples as a range."""
        return BatchRange(start=self.skip[0], stop=self.skip[1])

    @property
    def is_rewind(self) -> bool:
        """True if it goes, or went, back to a checkpoint."""
        return bool(self.target_checkpoint) and self.phase is not Phase.OBSERVED


def now_utc() -> str:
    """Return the present time, ISO 8601 in UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class Journal:
    """The journal of one run folder.

    `sequence_length`: of the samples that positions count now. Records that were written at
    another one are mapped by tokens when they are read.
    """

    def __init__(self, path: Path, *, sequence_length: int = 0) -> None:
        self.path = path
        self._sequence_length = sequence_length
        self._is_begun = False

    def append(self, incident: Incident) -> None:
        """Write one record and return when it is durable. Called on rank 0 alone."""
        incident = replace(incident, sequence_length=self._sequence_length)
        body = json.dumps(asdict(incident), sort_keys=True)
        record = {**json.loads(body), "crc": f"{zlib.crc32(body.encode()):08x}"}
        # A journal that was there and is gone (the folder was moved) must not be begun anew.
        is_new = not self._is_begun and not self.path.exists()
        line = json.dumps(record, sort_keys=True) + "\n"
        if not is_new and not self._ends_with_newline():
            line = "\n" + line
        how = os.O_WRONLY | os.O_APPEND | (os.O_CREAT if is_new else 0)
        descriptor = os.open(self.path, how, 0o644)
        try:
            view = memoryview(line.encode())
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self._is_begun = True
        if is_new:
            fsync_folder(self.path.parent)

    def read(self) -> list[Incident]:
        """Return all whole records in order; a torn line is logged and left out.

        Torn is a line that begins as a record and ends before its closing bracket, perhaps in the
        zeros of a block that never reached the disk: a write that was cut short.
        Raises: JournalError if any other line is no record of this version, whole and unchanged.
        """
        incidents = []
        try:
            lines = self.path.read_bytes().split(b"\n")
            self._is_begun = True
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
        written = line.rstrip(b"\0")
        if written[:1] in (b"{", b"") and not written.endswith(b"}"):
            logger.warning("%s:%d is torn and was left out", self.path, number)
            return None
        try:
            record = json.loads(line)
            crc = record.pop("crc")
            body = json.dumps(record, sort_keys=True)
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            record, crc, body = {}, "", "damaged"
        if crc != f"{zlib.crc32(body.encode()):08x}":
            raise JournalError(
                f"{self.path}:{number} fails its checksum: it was changed after it was "
                "written, and the data that it skips would be trained on; bring the line back "
                "from a copy, or remove it to accept that"
            )
        try:
            for key, convert in _FROM_JSON.items():
                if key in record and not (key == "returned" and record[key] is None):
                    record[key] = convert(record[key])
            return self._mapped(Incident(**record))
        except (TypeError, ValueError, LookupError) as error:
            raise JournalError(
                f"{self.path}:{number} is whole but not a record of this version ({error}); "
                "it was written by another version of Trimtab: use that one to go on"
            ) from error

    def _mapped(self, incident: Incident) -> Incident:
        """Return a record in samples of the present length. Raises: JournalError if none fit."""
        old, new = incident.sequence_length, self._sequence_length
        if old in (0, new) or new == 0:
            return incident
        if incident.returned is not None:
            raise JournalError(
                f"{self.path}: samples of {old} tokens were put back by incident "
                f"{incident.incident}, and data.sequence_length={new} has other samples; go on "
                f"with data.sequence_length={old}"
            )
        skip = rescale_range(*incident.skip, old, new)
        return replace(incident, skip=skip, sequence_length=new)

    def _ends_with_newline(self) -> bool:
        with self.path.open("rb") as file:
            if file.seek(0, os.SEEK_END) == 0:
                return True
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"


_FROM_JSON: dict[str, Callable[[Any], object]] = {
    "phase": Phase,
    "rung": Rung,
    "skip": lambda pair: (int(pair[0]), int(pair[1])),
    "returned": lambda triple: (int(triple[0]), int(triple[1]), int(triple[2])),
    "quarantine": tuple,
    "kept": tuple,
    "suspects": tuple,
}


def pending(incidents: Iterable[Incident]) -> Incident | None:
    """Return the intent that has no done yet, or None."""
    open_intent: Incident | None = None
    for incident in incidents:
        if incident.is_rewind:
            open_intent = incident if incident.phase is Phase.INTENT else None
    return open_intent
