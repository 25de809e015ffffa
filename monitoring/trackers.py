"""The tracker contract, its configuration, and the guard that keeps a tracker from hurting a run.

Owns `Tracker`, `TrackerConfig` and the choice of implementation. Refuses to import any tracker SDK:
each is imported inside the one module that wraps it, and only when chosen. Called on rank 0 alone,
by the composition root and the reporting callback; no collective.
"""

from __future__ import annotations

import enum
import logging
import math
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from pydantic import ConfigDict

logger = logging.getLogger(__name__)

MetricValue = float | int | str | bool | None


class Tracker(Protocol):
    """Somewhere that a run's numbers go. Every method may raise; wrap it in `GuardedTracker`."""

    def start(self, config: Mapping[str, object], name: str, run_id: str, folder: Path) -> None:
        """Open the run; called once a process, again with the same `run_id` after a restart."""

    def log(self, metrics: Mapping[str, MetricValue], clock: int) -> None:
        """Record metrics at a clock that never decreases within a process.

        A clock may come twice with other keys: a step's metrics, which have a `step`, and the
        held-out losses of the same state, without, in either order.
        """

    def event(self, kind: str, message: str, clock: int) -> None:
        """Record something that happened: a rewind, a failed checkpoint, a stop."""

    def finish(self, summary: Mapping[str, object]) -> None:
        """Close the run; nothing is logged afterwards."""


class TrackerKind(enum.Enum):
    """Which experiment tracker to feed beside the run folder's own files."""

    none = "none"
    swanlab = "swanlab"
    wandb = "wandb"


_MODES: Mapping[TrackerKind, tuple[str, ...]] = {
    TrackerKind.none: ("disabled",),
    TrackerKind.swanlab: ("local", "offline", "cloud", "disabled"),
    TrackerKind.wandb: ("offline", "online", "disabled"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackerConfig:
    """The `tracker` config group.

    Raises:
        ValueError: `mode` is not one of the kind's modes, or `project` is empty.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    kind: TrackerKind = TrackerKind.none
    mode: str = "disabled"
    project: str = "trimtab"

    def __post_init__(self) -> None:
        modes = _MODES[self.kind]
        if self.mode not in modes:
            raise ValueError(
                f"tracker.mode={self.mode!r} is not a mode of tracker.kind={self.kind.name}; "
                f"use {' or '.join(modes)}"
            )
        if not self.project:
            raise ValueError("tracker.project is empty; give the project a name, such as trimtab")


class GuardedTracker:
    """Passes every call on and turns the tracker off for good after `max_errors` exceptions.

    Each error is one warning, a failed start included; then one last warning says that the tracker
    is off. With `max_errors` None it stays on, and the 1st, 2nd, 4th, 8th error and so on is a
    warning. Nothing is ever raised.
    """

    def __init__(self, tracker: Tracker, max_errors: int | None = 3) -> None:
        self._tracker = tracker
        self._max_errors = max_errors
        self._num_errors = 0
        self._is_off = False

    @property
    def is_off(self) -> bool:
        """True once the tracker has been switched off."""
        return self._is_off

    @property
    def num_errors(self) -> int:
        """How many exceptions have been caught so far."""
        return self._num_errors

    def start(self, config: Mapping[str, object], name: str, run_id: str, folder: Path) -> None:
        """Start the tracker."""
        self._guard("start", lambda: self._tracker.start(config, name, run_id, folder))

    def log(self, metrics: Mapping[str, MetricValue], clock: int) -> None:
        """Log metrics."""
        self._guard("log", lambda: self._tracker.log(metrics, clock))

    def event(self, kind: str, message: str, clock: int) -> None:
        """Log one event."""
        self._guard("event", lambda: self._tracker.event(kind, message, clock))

    def finish(self, summary: Mapping[str, object]) -> None:
        """Finish the tracker."""
        self._guard("finish", lambda: self._tracker.finish(summary))

    def _guard(self, what: str, call: Callable[[], None]) -> None:
        if self._is_off:
            return
        try:
            call()
        except Exception as error:  # noqa: BLE001 - an SDK may raise anything; training goes on
            self._count(what, error)

    def _count(self, what: str, error: Exception) -> None:
        self._num_errors += 1
        name = type(self._tracker).__name__
        if self._max_errors is None:
            if self._num_errors & (self._num_errors - 1) == 0:
                message = "%s.%s failed (error %d): %s: %s"
                kind = type(error).__name__
                logger.warning(message, name, what, self._num_errors, kind, error)
            return
        logger.warning(
            "%s.%s failed (%d of %d): %s: %s",
            name,
            what,
            self._num_errors,
            self._max_errors,
            type(error).__name__,
            error,
        )
        if self._num_errors >= self._max_errors:
            self._is_off = True
            logger.warning("%s is switched off; the run folder keeps every number", name)


def build_trackers(config: TrackerConfig) -> list[Tracker]:
    """The trackers of a run, each guarded: always the run folder's own file, then the chosen one.

    A package that is not installed shows as a failed start, not here.
    """
    from monitoring.jsonl import JsonlTracker

    trackers: list[Tracker] = [GuardedTracker(JsonlTracker(), max_errors=None)]
    if config.kind is TrackerKind.swanlab:
        from monitoring.swanlab_tracker import SwanLabTracker

        trackers.append(GuardedTracker(SwanLabTracker(config)))
    elif config.kind is TrackerKind.wandb:
        from monitoring.wandb_tracker import WandbTracker

        trackers.append(GuardedTracker(WandbTracker(config)))
    return trackers


def dashboard_command(config: TrackerConfig, folder: Path) -> str | None:
    """The shell command that opens (or uploads) a run's dashboard, or None where there is none."""
    root = shlex.quote(str(folder))
    match (config.kind, config.mode):
        case (TrackerKind.swanlab, "local"):
            return f"{_command('swanlab')} watch {root}/swanlog"
        case (TrackerKind.swanlab, "offline"):
            return f"{_command('swanlab')} sync {root}/swanlog/run-*"
        case (TrackerKind.wandb, "offline"):
            return f"{_command('wandb')} sync {root}/wandb/offline-run-*"
        case _:
            return None


def _command(name: str) -> str:
    """How to call a package's command: by name where the shell finds it, else beside Python."""
    return name if shutil.which(name) else shlex.quote(str(Path(sys.executable).with_name(name)))


def numeric(metrics: Mapping[str, MetricValue]) -> dict[str, float]:
    """The entries that a chart can show: finite numbers; text, flags, None and NaN are left out."""
    return {
        key: float(value)
        for key, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }
