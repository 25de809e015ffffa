"""The Weights & Biases tracker: files to upload later, or online.

Owns the only import of `wandb`. Refuses anything but numbers, and refuses to let the SDK capture
the terminal or copy code. Called on rank 0 through `GuardedTracker`.

What a restart does: the same id with `resume="allow"` goes on with the same run, online at once and
offline when the folders are synced.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from monitoring.trackers import MetricValue, TrackerConfig, numeric

if TYPE_CHECKING:
    import wandb

Mode = Literal["offline", "online", "disabled"]

_MODES: Mapping[str, Mode] = {"offline": "offline", "online": "online", "disabled": "disabled"}


class WandbTracker:
    """Feeds one W&B run; its files lie under `<folder>/wandb`."""

    def __init__(self, config: TrackerConfig) -> None:
        self._config = config
        self._run: wandb.Run | None = None
        self._num_events: Counter[str] = Counter()

    def start(self, config: Mapping[str, object], name: str, run_id: str, folder: Path) -> None:
        """Open the run and make `clock` the x-axis. Offline and disabled need no network.

        Raises:
            ImportError: `wandb` is not installed.
            Exception: whatever the SDK raises, such as a missing login in online mode.
        """
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            mode=_MODES[self._config.mode],
            dir=str(folder),
            project=self._config.project,
            name=name,
            id=run_id,
            resume="allow",
            config=dict(config),
            settings=wandb.Settings(silent=True, console="off", disable_git=True, save_code=False),
        )
        self._run.define_metric("clock", hidden=True)
        self._run.define_metric("*", step_metric="clock")

    def log(self, metrics: Mapping[str, MetricValue], clock: int) -> None:
        """Log the numbers at `step=clock`; W&B merges what comes before the next step."""
        self._open_run().log({**numeric(metrics), "clock": clock}, step=clock)

    def event(self, kind: str, message: str, clock: int) -> None:
        """Count the event in the chart `events/<kind>` and keep its text in the run's summary."""
        run = self._open_run()
        self._num_events[kind] += 1
        run.log({f"events/{kind}": self._num_events[kind], "clock": clock}, step=clock)
        run.summary[f"events/last_{kind}"] = f"clock {clock}: {message}"

    def finish(self, summary: Mapping[str, object]) -> None:
        """Store the summary's plain values and close the run."""
        if self._run is None:
            return
        run, self._run = self._run, None
        for key, value in summary.items():
            if isinstance(value, int | float | str | bool):
                run.summary[f"final/{key}"] = value
        run.finish(exit_code=0)

    def _open_run(self) -> wandb.Run:
        if self._run is None:
            raise RuntimeError("the W&B run is not open; start() failed or was not called")
        return self._run
