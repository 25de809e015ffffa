"""What a person sees in the terminal: one progress line while training, one table at the end.

Owns the live use of `rich` in this package. Refuses to write progress to stdout (it goes to stderr;
the summary goes to stdout) and refuses to render on the training thread: `update` only stores the
numbers. Called on rank 0 by the reporting callback and the CLI.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from monitoring.incidents import in_words, returned_samples, short_count
from monitoring.records import Record, integer, number, sample_range

if TYPE_CHECKING:
    from rich.live import Live
    from rich.text import Text

PLAIN_INTERVAL_SECONDS = 5.0
_REFRESHES_PER_SECOND = 4
_BAR_CHARACTERS = 24
_SMOOTHING = 0.05
_INCIDENT_HEADINGS = (
    "#",
    "what",
    "found at",
    "verdict",
    "back to",
    "samples skipped",
    "state",
    "recovery",
)


class ConsoleProgress:
    """A live line on a terminal; elsewhere one plain line at most every five seconds.

    `is_terminal=None` asks stderr. `update` costs a few dictionary reads; the line is drawn by
    rich's own thread four times a second.
    """

    def __init__(self, total_steps: int, name: str, is_terminal: bool | None = None) -> None:
        self._total_steps = total_steps
        self._name = name
        self._is_terminal = sys.stderr.isatty() if is_terminal is None else is_terminal
        self._latest: Record = {}
        self._last_incident = ""
        self._seconds_per_update: float | None = None
        self._updated_at: float | None = None
        self._printed_at: float | None = None
        self._live: Live | None = None

    def start(self) -> None:
        """Begin to draw; without a terminal, nothing."""
        if not self._is_terminal or self._live is not None:
            return
        from rich.console import Console
        from rich.live import Live

        self._live = Live(
            get_renderable=self._render,
            console=Console(file=sys.stderr, force_terminal=True),
            refresh_per_second=_REFRESHES_PER_SECOND,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._live.start()

    def update(self, metrics: Mapping[str, object]) -> None:
        """Take one step's metrics (the keys of `metrics.jsonl`)."""
        now = time.monotonic()
        if self._updated_at is not None:
            seconds = now - self._updated_at
            average = self._seconds_per_update
            self._seconds_per_update = (
                seconds if average is None else average + _SMOOTHING * (seconds - average)
            )
        self._updated_at = now
        self._latest = metrics
        if self._live is None and not self._is_terminal:
            is_due = self._printed_at is None or now - self._printed_at >= PLAIN_INTERVAL_SECONDS
            if is_due:
                self._printed_at = now
                self._write(self.line())

    def incident(self, text: str, short: str | None = None) -> None:
        """Show an incident at once, and keep it (`short`) at the end of the progress line."""
        self._last_incident = short or text
        self._say(f"! {text}", "bold red")

    def message(self, text: str) -> None:
        """Show a line of text above the progress line."""
        self._say(text, "")

    def stop(self) -> None:
        """Draw the last state and leave the terminal; a second call does nothing."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        elif not self._is_terminal and self._latest:
            self._write(self.line())
            self._latest = {}

    def line(self) -> str:
        """The progress as one plain line of text."""
        step = integer(self._latest, "step") or 0
        parts = [f"{self._name}  step {step:,}/{self._total_steps:,}", *self._numbers()]
        if self._last_incident:
            parts.append(f"last: {self._last_incident}")
        return "  ".join(parts)

    def _numbers(self) -> list[str]:
        parts: list[str] = []
        loss = number(self._latest, "loss_nats")
        if loss is not None:
            parts.append(f"loss {loss:.4f}")
        elif "loss_nats" in self._latest:
            parts.append("loss not finite")
        speed = number(self._latest, "tokens_per_second")
        if speed is not None:
            parts.append(f"{short_count(speed)} tok/s")
        mfu = number(self._latest, "mfu")
        if mfu is not None:
            parts.append(f"MFU {mfu:.1%}")
        if self._seconds_per_update is not None:
            steps_left = self._total_steps - (integer(self._latest, "step") or 0)
            parts.append(f"ETA {clock_time(max(0, steps_left) * self._seconds_per_update)}")
        return parts

    def _render(self) -> Text:
        from rich.text import Text

        step = integer(self._latest, "step") or 0
        share = min(1.0, step / self._total_steps) if self._total_steps > 0 else 1.0
        num_full = round(share * _BAR_CHARACTERS)
        line = Text(no_wrap=True, overflow="ellipsis")
        line.append(f"{self._name} ", style="bold")
        line.append("\u2501" * num_full, style="green")
        line.append("\u2501" * (_BAR_CHARACTERS - num_full), style="bright_black")
        line.append(f" {step:,}/{self._total_steps:,}")
        for part in self._numbers():
            line.append(f"  {part}", style="cyan")
        if self._last_incident:
            line.append(f"  {self._last_incident}", style="red")
        return line

    def _say(self, text: str, style: str) -> None:
        if self._live is None:
            self._write(text)
            return
        self._live.console.print(text, style=style or None, markup=False, highlight=False)

    def _write(self, text: str) -> None:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def print_summary(summary: Mapping[str, object], incidents: Sequence[Record]) -> None:
    """Print how a run ended to stdout: `summary.json`, then one row an attempt."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=sys.stdout)
    table = Table(title=Text(str(summary.get("name", "run"))), show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for label, value in _summary_rows(summary):
        table.add_row(Text(label), Text(value))
    console.print(table)
    if not incidents:
        return
    rows = Table(title="Incidents")
    for heading in (
        "#",
        "what",
        "found at",
        "verdict",
        "back to",
        "samples skipped",
        "state",
        "recovery",
    ):
        rows.add_column(heading, overflow="fold")
    for incident in incidents:
        rows.add_row(*(Text(cell) for cell in _incident_cells(incident)))
    console.print(rows)


def clock_time(seconds: float) -> str:
    """Seconds as `0:42`, `12:05` or `3:07:30`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _summary_rows(summary: Mapping[str, object]) -> list[tuple[str, str]]:
    rows = [("ended", "completed" if summary.get("finished") else str(summary.get("reason", "")))]
    formats = (
        ("steps", "steps", "{:,.0f}"),
        ("tokens_seen", "tokens", "{:,.0f}"),
        ("final_loss_nats", "final loss (nats)", "{:.4f}"),
        ("validation_loss_nats", "validation loss (nats)", "{:.4f}"),
        ("tokens_per_second", "tokens per second", "{:,.0f}"),
        ("rewinds", "rewinds", "{:,.0f}"),
        ("num_vetoed", "vetoed updates", "{:,.0f}"),
        ("skipped_samples", "samples skipped", "{:,.0f}"),
        ("skipped_tokens", "tokens skipped", "{:,.0f}"),
    )
    for key, label, form in formats:
        value = number(summary, key)
        if value is not None:
            detail = _by_source(summary) if key == "validation_loss_nats" else ""
            rows.append((label, form.format(value) + detail))
        elif isinstance(summary.get(key), float):
            rows.append((label, "not finite"))
    wall_seconds = number(summary, "wall_seconds")
    if wall_seconds is not None:
        rows.append(("wall time", clock_time(wall_seconds)))
    goodput = summary.get("goodput")
    share = number(goodput, "goodput") if isinstance(goodput, Mapping) else None
    if share is not None:
        rows.append(("goodput", f"{share:.1%}"))
    if summary.get("report"):
        rows.append(("report", str(summary["report"])))
    return rows


def _by_source(summary: Mapping[str, object]) -> str:
    """` (web 3.1000, code 3.4000)`, or nothing if there is one source."""
    losses = summary.get("validation_by_source")
    if not isinstance(losses, Mapping) or len(losses) < 2:
        return ""
    known = {name: number(losses, name) for name in losses}
    parts = [
        f"{name} {'not finite' if loss is None else f'{loss:.4f}'}" for name, loss in known.items()
    ]
    return f" ({', '.join(parts)})"


def _incident_cells(incident: Record) -> list[str]:
    skip, back = sample_range(incident), returned_samples(incident)
    seconds, scale = number(incident, "seconds"), number(incident, "lr_scale")
    target = None
    if incident.get("is_rewind") or incident.get("state") == "observed":
        target = incident.get("target_step", incident.get("to_step"))
    start, stop = back[1:] if back else skip or (0, 0)
    count = start - stop if back else stop - start
    cooled = "" if scale in (None, 1.0) else f", rate x {scale:g}"
    return [
        f"{incident.get('incident', '')}.{incident.get('attempt', 1)}",
        in_words(incident.get("rung")) + cooled,
        f"step {incident.get('detected_step', incident.get('from_step', ''))}",
        in_words(incident.get("verdict")),
        "" if target is None else f"step {target}",
        f"{count:,} [{start:,}, {stop:,})" if count else "",
        str(incident.get("state", "")),
        "" if seconds is None else f"{seconds:.2f} s",
    ]
