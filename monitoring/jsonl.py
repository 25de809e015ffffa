"""The tracker that writes `metrics.jsonl` in the run folder: the source of every report.

Owns one line a step. Refuses events and evaluations: the training loop writes `events.jsonl`
itself. Called on rank 0 through the reporting callback.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from monitoring.records import METRICS_FILE, JsonLinesWriter
from monitoring.trackers import MetricValue


class JsonlTracker:
    """Appends each step's metrics to `<folder>/metrics.jsonl`; non-finite numbers become null.

    What has no `step` is left out. Held-out losses come between the steps, at the clock of one, and
    readers take each line for a step, the last of a clock winning: such a line would hide the
    step's own. Nothing is lost, as `events.jsonl` has the evaluations.
    """

    def __init__(self) -> None:
        self._writer: JsonLinesWriter | None = None

    def start(self, config: Mapping[str, object], name: str, run_id: str, folder: Path) -> None:
        """Open the file for appending; a torn last line is ended first."""
        self._writer = JsonLinesWriter(folder / METRICS_FILE)

    def log(self, metrics: Mapping[str, MetricValue], clock: int) -> None:
        """Write one line, the metrics of a step and their clock; other metrics are left out."""
        if self._writer is None:
            raise RuntimeError("metrics.jsonl is not open; start() failed or was not called")
        if "step" in metrics:
            self._writer.write({**metrics, "clock": clock})

    def event(self, kind: str, message: str, clock: int) -> None:
        """Nothing: events have their own file and writer."""

    def finish(self, summary: Mapping[str, object]) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
