"""Where a run's wall time went: classes of seconds that add up to the wall time.

Owns the classes and their sums. Refuses a second truth: there is no ledger beside the records that
each attempt appends to its run folder, so it cannot disagree with them, cannot be lost without
them, and is merged over restarts by reading on. `attempts` cuts each attempt into pieces; a gap
between two is measured here. Called by the report, the CLI and the end of a run.

    attempt 0                                      attempt 1
    |startup|step step step [rewind] step step|     |startup|step step ...
                                              restart
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from monitoring.attempts import Attempt, split_attempts
from monitoring.records import EVENTS_FILE, METRICS_FILE, Record, check_run, read_json_lines

_KEYS = (
    "step",
    "clock",
    "cursor",
    "attempt",
    "batch_samples",
    "update",
    "step_seconds",
    "data_seconds",
    "compile_seconds",
    "time",
    "uptime",
)
"""What of a step's metrics says where its time went."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Goodput:
    """Seconds of wall time a class; the classes add up to `wall_seconds`, which is summed apart.

    `restart`: from the last sign of life of an attempt to the start of the next process: the time
    in a queue, too. `startup`: from there to the first step. `compile`: torch.compile, at any time.
    `data_wait`: waiting for batches, in any step. `checkpoint_stall` and `evaluation`: what the
    loop stood still for. `hang_detection`: from the last progress of an attempt that hung to the
    moment the watchdog found it. `rewind`: going back. `recomputed`: steps that were thrown away
    by a rewind or a crash and whose samples came again, and refused updates. `skipped_tokens`:
    steps that a rewind threw away together with their samples. `idle`: what no record explains,
    and the time between a completed run and its continuation. `training`: steps that are part of
    the final model.
    """

    restart: float = 0.0
    startup: float = 0.0
    compile: float = 0.0
    data_wait: float = 0.0
    checkpoint_stall: float = 0.0
    evaluation: float = 0.0
    hang_detection: float = 0.0
    rewind: float = 0.0
    recomputed: float = 0.0
    skipped_tokens: float = 0.0
    idle: float = 0.0
    training: float = 0.0
    wall_seconds: float = 0.0
    num_attempts: int = 0

    @property
    def goodput(self) -> float:
        """Training time over wall time, in [0, 1]; 0 for a run without records."""
        return self.training / self.wall_seconds if self.wall_seconds > 0 else 0.0

    def seconds_by_class(self) -> dict[str, float]:
        """The classes in display order, training last, without the wall time."""
        names = [item.name for item in fields(self) if item.type == "float"]
        return {name: float(getattr(self, name)) for name in names if name != "wall_seconds"}

    def as_table(self) -> list[tuple[str, float, float]]:
        """Rows of (class, seconds, share of the wall time), in display order."""
        wall = self.wall_seconds or 1.0
        return [(name, value, value / wall) for name, value in self.seconds_by_class().items()]

    def as_dict(self) -> dict[str, float]:
        """Plain values for `summary.json`: seconds a class, the wall time and the goodput."""
        return {
            **self.seconds_by_class(),
            "wall_seconds": self.wall_seconds,
            "num_attempts": self.num_attempts,
            "goodput": self.goodput,
        }


def goodput_of_run(folder: Path) -> Goodput:
    """Account for a run folder, finished or not, also while the run goes on.

    Raises:
        UnreadableRecordsError: the folder does not exist or cannot be read.
    """
    check_run(folder)
    metrics = read_json_lines(folder / METRICS_FILE, _KEYS)
    return compute_goodput(metrics.records, read_json_lines(folder / EVENTS_FILE).records)


def compute_goodput(metrics: Sequence[Record], events: Sequence[Record]) -> Goodput:
    """Account for a run from all its metrics lines, repeated clocks included, and its events.

    Attempts may come in any order, so files of several hosts can be chained. The wall time goes
    from the first process start to the last record. Clocks that were set make no difference where
    records carry the time since boot; elsewhere, going backwards counts as no time.
    """
    seconds: defaultdict[str, float] = defaultdict(float)
    wall_seconds = 0.0
    before: Attempt | None = None
    attempts = split_attempts(metrics, events)
    for attempt in attempts:
        if before is not None:
            gap = attempt.seconds_since(before)
            seconds["idle" if before.is_completed else "restart"] += gap
            wall_seconds += gap
        attempt.charge(seconds, after=before)
        wall_seconds += attempt.seconds(after=before)
        before = attempt
    return Goodput(**seconds, wall_seconds=wall_seconds, num_attempts=len(attempts))


def total(parts: Iterable[Goodput]) -> Goodput:
    """The sum of several runs: of all their classes, wall times and attempts."""
    listed = list(parts)
    sums = {item.name: sum(getattr(one, item.name) for one in listed) for item in fields(Goodput)}
    return Goodput(**sums)
