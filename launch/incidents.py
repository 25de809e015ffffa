"""The incidents of a run, as `trimtab incidents` lists them.

Owns which files of the run folder are read: the journal, the timeline, the config for the length
of a sample, and where evidence lies; not the metrics, which can be large.
Refuses to interpret them: `monitoring.incidents` joins the records.
Called by `launch.cli` and `launch.control`. Reads only, so it is safe beside a run in progress.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.errors import LaunchError


@dataclass(frozen=True, slots=True, kw_only=True)
class IncidentList:
    """The attempts by incident, the refused updates, and how many torn lines were left out.

    `notices`: what the starts found beside them (bad shards, changed settings), a line each.
    """

    rows: Sequence[Mapping[str, object]]
    vetoes: Sequence[Mapping[str, object]]
    num_skipped_lines: int
    notices: Sequence[str] = ()


def read_incidents(run_folder: Path) -> IncidentList:
    """Return the run's incidents; a run without a journal has none.

    A row has the keys of `monitoring.incidents.collect_incidents`, and `num_skipped_tokens` (None
    if the config does not tell) and `capsule` (the path of the evidence, or None).

    Raises:
        LaunchError: a file is there and cannot be read, or the folder is no run's.
    """
    from monitoring.incidents import collect_incidents, collect_notices, collect_vetoes, in_words
    from monitoring.records import (
        EVENTS_FILE,
        JOURNAL_FILE,
        RUN_FILE,
        RunRecords,
        UnreadableRecordsError,
        read_json_lines,
    )

    if not any((run_folder / name).exists() for name in (RUN_FILE, JOURNAL_FILE, EVENTS_FILE)):
        raise LaunchError(f"{run_folder} is no run folder: it has no {RUN_FILE}")
    try:
        journal = read_json_lines(run_folder / JOURNAL_FILE)
        events = read_json_lines(run_folder / EVENTS_FILE)
    except UnreadableRecordsError as error:
        raise LaunchError(str(error)) from error
    run = RunRecords(
        folder=run_folder,
        name=run_folder.name,
        run_id="",
        events=events.records,
        journal=journal.records,
    )
    length = _sequence_length(run_folder)
    rows = [
        {
            **row,
            "num_skipped_tokens": _product(row["num_skipped_samples"], length),
            "capsule": _capsule(run_folder, row),
        }
        for row in collect_incidents(run)
    ]
    return IncidentList(
        rows=rows,
        vetoes=collect_vetoes(run),
        num_skipped_lines=journal.num_skipped,
        notices=[
            f"{in_words(found.kind)}{_at(found.step)}: {line}"
            for found in collect_notices(run)
            for line in found.lines
        ],
    )


def _at(step: int | None) -> str:
    return "" if step is None else f" at step {step}"


def _product(count: object, length: int | None) -> int | None:
    return count * length if isinstance(count, int) and length is not None else None


def _capsule(run_folder: Path, row: Mapping[str, object]) -> str | None:
    incident, attempt = row.get("incident"), row.get("attempt")
    if not isinstance(incident, int) or not isinstance(attempt, int):
        return None
    path = run_folder / "incidents" / f"{incident:04d}-{attempt}" / "capsule.json"
    return str(path) if row.get("is_rewind") and path.is_file() else None


def _sequence_length(run_folder: Path) -> int | None:
    """Return how many tokens a sample has, or None if the config cannot be read."""
    import yaml

    try:
        config = yaml.safe_load((run_folder / "config.yaml").read_text(encoding="utf-8"))
        length = config["data"]["sequence_length"]
    except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError, RecursionError):
        return None
    return length if isinstance(length, int) else None
