"""What a replay of an incident needs, from the journal and the checkpoints that are left.

Owns the choice of checkpoints and the refusal, with the reason, of what cannot be replayed. Reads
manifests and nothing else; changes nothing, so it is safe beside a run in progress. Called by the
CLI, before anything is started, and by the replay itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from monitoring.records import JOURNAL_FILE, Record, integer, read_json_lines, sample_range

CHECKPOINTS_FOLDER = "checkpoints"
INCIDENTS_FOLDER = "incidents"
_NOT_OF_THE_LOSS = {"operator": "an operator's wish", "integrity": "wrong bits"}
_NAME = re.compile(r"^step-(\d{8})-clock-(\d{8})$")


class NoReplayError(Exception):
    """An incident that cannot be replayed; the message says why and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFacts:
    """A checkpoint on disk, by its manifest."""

    name: str
    path: Path
    step: int
    cursor: int
    clock: int
    num_ranks: int
    format: str
    is_quarantined: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayPlan:
    """The first attempt at one incident, and where its replay begins.

    `num_records_before`: how many journal records precede it: the run's history at the time.
    `start`: the target itself, or, if that lay in memory alone, the last checkpoint before it.
    `earlier`: another, older state, None if none is left. `skip_stop`: the end of all data that any
    attempt at the incident skipped, 0 if none did.
    """

    incident: int
    attempt: int
    num_records_before: int
    verdict: str
    reason: str
    onset_step: int
    detected_step: int
    clock: int
    target_name: str
    target_step: int
    skip_stop: int
    start: CheckpointFacts
    earlier: CheckpointFacts | None

    @property
    def folder_name(self) -> str:
        """The folder of the incident's evidence."""
        return f"{self.incident:04d}-{self.attempt}"


def read_plan(run_folder: Path, incident: int) -> ReplayPlan:
    """Return the plan for one incident of a run folder.

    Raises: NoReplayError; UnreadableRecordsError if the journal cannot be read.
    """
    journal = read_json_lines(run_folder / JOURNAL_FILE).records
    return make_plan(journal, checkpoints_of(run_folder), incident)


def checkpoints_of(run_folder: Path) -> dict[str, CheckpointFacts]:
    """Return the checkpoints whose manifests can be read, by name, oldest clock first."""
    try:
        paths = [p for p in (run_folder / CHECKPOINTS_FOLDER).iterdir() if _NAME.match(p.name)]
    except OSError:
        return {}
    found = [facts for path in paths if (facts := _read_facts(path)) is not None]
    return {facts.name: facts for facts in sorted(found, key=lambda facts: facts.clock)}


def make_plan(
    journal: Sequence[Record], checkpoints: Mapping[str, CheckpointFacts], incident: int
) -> ReplayPlan:
    """Return the plan for `incident`. Raises: NoReplayError."""
    number, record = _first_attempt(journal, incident)
    target = str(record["target_checkpoint"])
    start, earlier = _choose(record, target, checkpoints)
    attempts = [entry for entry in journal if integer(entry, "incident") == incident]
    ranges = [found for entry in attempts if (found := sample_range(entry)) is not None]
    return ReplayPlan(
        incident=incident,
        attempt=integer(record, "attempt") or 1,
        num_records_before=number,
        verdict=str(record.get("verdict", "")),
        reason=str(record.get("reason", "")),
        onset_step=_needed(record, "onset_step"),
        detected_step=_needed(record, "detected_step"),
        clock=_needed(record, "clock"),
        target_name=target,
        target_step=int(_match(target)[1]),
        skip_stop=max((stop for start_, stop in ranges if stop > start_), default=0),
        start=start,
        earlier=earlier,
    )


def _first_attempt(journal: Sequence[Record], incident: int) -> tuple[int, Record]:
    mine = [(n, entry) for n, entry in enumerate(journal) if integer(entry, "incident") == incident]
    known = sorted({found for entry in journal if (found := integer(entry, "incident"))})
    if incident == 0 and mine:
        raise NoReplayError(
            "incident 0 stands for updates that were refused on the device and did no harm; "
            f"incidents of this run: {_listed(known)}"
        )
    if not mine:
        raise NoReplayError(
            f"there is no incident {incident}; incidents of this run: {_listed(known)}"
        )
    if all(entry.get("rule") in _NOT_OF_THE_LOSS for _, entry in mine):
        what = _NOT_OF_THE_LOSS[str(mine[0][1]["rule"])]
        raise NoReplayError(
            f"incident {incident} was {what} ({mine[0][1].get('reason')}): no detector "
            "found anything that a replay could explain"
        )
    for number, entry in mine:
        if entry.get("target_checkpoint") and entry.get("rule") not in _NOT_OF_THE_LOSS:
            return number, entry
    raise NoReplayError(
        f"incident {incident} ended the run before anything was tried "
        f"({mine[0][1].get('reason')}); there is no checkpoint to replay it from"
    )


def _choose(
    record: Record, target: str, checkpoints: Mapping[str, CheckpointFacts]
) -> tuple[CheckpointFacts, CheckpointFacts | None]:
    """Return where to start, and an earlier state if there is one."""
    clock = int(_match(target)[2])
    kept = record.get("kept")
    wanted = [str(name) for name in kept] if isinstance(kept, list | tuple) else []
    gone = [name for name in wanted if name not in checkpoints]
    before = [
        facts
        for facts in checkpoints.values()
        if facts.clock <= clock and (facts.name in wanted or not facts.is_quarantined)
    ]
    if (wanted and wanted[-1] in gone) or not before:
        raise NoReplayError(
            f"the checkpoint to replay from, {(wanted or [target])[-1]}, is gone: retention keeps "
            "those of the last incidents alone (checkpoint.keep_incidents); bring it back from a "
            "copy, or replay a later incident"
        )
    start = checkpoints[wanted[-1]] if wanted else before[-1]
    if start.name != target:
        return start, start  # the target is younger, so this is an earlier state
    older = [facts for facts in before if facts.clock < start.clock]
    return start, older[-1] if older else None


def _read_facts(path: Path) -> CheckpointFacts | None:
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        health = json.loads((path / "health.json").read_text())
        if str(health.get("reason", "")).startswith("corrupt"):
            return None
        return CheckpointFacts(
            name=path.name,
            path=path,
            step=int(manifest["step"]),
            cursor=int(manifest["cursor"]),
            clock=int(manifest["clock"]),
            num_ranks=int(manifest["world_size"]),
            format=str(manifest["format"]),
            is_quarantined=health["health"] == "quarantined",
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _match(name: str) -> re.Match[str]:
    match = _NAME.match(name)
    if match is None:
        raise NoReplayError(f"the journal names a checkpoint {name!r}, which is no name of one")
    return match


def _needed(record: Record, key: str) -> int:
    value = integer(record, key)
    if value is None:
        raise NoReplayError(f"the journal's record of this incident has no {key}; is it damaged?")
    return value


def _listed(incidents: Sequence[int]) -> str:
    return ", ".join(str(number) for number in incidents) or "none"
