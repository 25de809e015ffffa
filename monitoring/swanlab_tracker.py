"""The SwanLab tracker: a dashboard on this machine, in a file to upload later, or in the cloud.

Owns the only import of `swanlab`. Refuses anything but numbers, and refuses to let the SDK take the
terminal or Ctrl-C: its banners go to the log at DEBUG, its capture of the terminal is off, and the
SIGINT handler that was there before stays. Called on rank 0 through `GuardedTracker`.

What a restart does: in the cloud the same run goes on. SwanLab 0.10 cannot reopen a local run, so
there a restarted process adds a second curve with the same name and a number, on the same clock.
"""

from __future__ import annotations

import contextlib
import io
import logging
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from monitoring.trackers import MetricValue, TrackerConfig, numeric

logger = logging.getLogger(__name__)

Mode = Literal["local", "offline", "online", "disabled"]

LOG_FOLDER = "swanlog"
_MODES: Mapping[str, Mode] = {
    "local": "local",
    "offline": "offline",
    "cloud": "online",
    "disabled": "disabled",
}


class SwanLabTracker:
    """Feeds one SwanLab run; its files lie under `<folder>/swanlog`."""

    def __init__(self, config: TrackerConfig) -> None:
        self._config = config
        self._is_started = False
        self._num_events: Counter[str] = Counter()

    def start(self, config: Mapping[str, object], name: str, run_id: str, folder: Path) -> None:
        """Open the run. Local, offline and disabled need no network; cloud needs a stored login.

        Raises:
            ImportError: `swanlab` is not installed.
            Exception: whatever the SDK raises, such as a missing login in cloud mode.
        """
        import swanlab

        log_folder = folder / LOG_FOLDER
        log_folder.mkdir(parents=True, exist_ok=True)
        settings = swanlab.Settings(interactive=False, terminal={"proxy_type": "none"})
        is_cloud = self._config.mode == "cloud"
        with _quiet():
            swanlab.init(
                mode=_MODES[self._config.mode],
                log_dir=str(log_folder),
                project=self._config.project,
                name=name,
                id=run_id,
                resume="allow" if is_cloud else "never",
                config=dict(config),
                settings=settings,
            )
        self._is_started = True

    def log(self, metrics: Mapping[str, MetricValue], clock: int) -> None:
        """Log the numbers at `step=clock`; SwanLab keeps a step's values key by key."""
        import swanlab

        self._require_started()
        values = numeric(metrics)
        if values:
            swanlab.log(values, step=clock)

    def event(self, kind: str, message: str, clock: int) -> None:
        """Count the event in the chart `events/<kind>`; the text stays in the run folder."""
        import swanlab

        self._require_started()
        self._num_events[kind] += 1
        swanlab.log({f"events/{kind}": self._num_events[kind]}, step=clock)

    def finish(self, summary: Mapping[str, object]) -> None:
        """Close the run, as crashed unless the summary says that it finished or was stopped."""
        import swanlab

        if not self._is_started:
            return
        self._is_started = False
        with _quiet():
            swanlab.finish(state="success" if summary.get("finished") else "aborted")

    def _require_started(self) -> None:
        if not self._is_started:
            raise RuntimeError("the SwanLab run is not open; start() failed or was not called")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Send what the SDK prints to the log at DEBUG, and keep this process's SIGINT handler."""
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT) if is_main else None
    banner = io.StringIO()
    try:
        with contextlib.redirect_stdout(banner):
            yield
    finally:
        if handler is not None:
            signal.signal(signal.SIGINT, handler)
        for line in filter(None, map(str.strip, banner.getvalue().splitlines())):
            logger.debug("%s", line)
