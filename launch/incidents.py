"""The incidents of a run, as `trimtab incidents` lists them.

Owns which files of the run folder are read: the journal and the timeline, not the metrics, which
can be large.
Refuses to interpret them: `monitoring.incidents` joins the records.
Called by `launch.cli`. Reads only, so it is safe beside a run in progress.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.errors import LaunchError


@dataclass(frozen=True, slots=True, kw_only=True)
class IncidentList:
    """The incidents by number, and how many torn lines were left out."""

    rows: Sequence[Mapping[str, object]]
    num_skipped_lines: int


def read_incidents(run_folder: Path) -> IncidentList:
    """Return the run's incidents; a run without a journal has none.

    Raises:
        LaunchError: a file is there and cannot be read.
    """
    from monitoring.incidents import collect_incidents
    from monitoring.records import (
        EVENTS_FILE,
        JOURNAL_FILE,
        RunRecords,
        UnreadableRecordsError,
        read_json_lines,
    )

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
    return IncidentList(rows=collect_incidents(run), num_skipped_lines=journal.num_skipped)
