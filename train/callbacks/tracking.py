"""Tell people and files what happens: metrics, the timeline, the progress line, the end.

Runs on rank 0 alone, last, and never holds up training: trackers are guarded, and a failure here
is logged.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from monitoring.clocks import Birth, boot_id, now
from monitoring.console import ConsoleProgress, print_summary
from monitoring.goodput import compute_goodput
from monitoring.incidents import collect_incidents
from monitoring.records import JsonLinesWriter, finite, number, read_run
from monitoring.trackers import GuardedTracker, Tracker, TrackerConfig, dashboard_command
from train.actions import Note
from train.checkpoint.info import CheckpointInfo
from train.data.validation import Evaluation
from train.durable import write_json
from train.events import Alert, Callback, CallbackPhase, RunStart
from train.health.corruption import Check, Corruption
from train.recovery.journal import Incident
from train.signals import StepReport
from train.state import TrainState

logger = logging.getLogger(__name__)

_NUM_FINAL_STEPS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Telemetry:
    """What tracking needs to know of the run, fixed at its start."""

    folder: Path
    run_id: str
    attempt: int
    birth: Birth
    world_size: int
    engine: str
    host: str
    config: Mapping[str, object]
    flops_per_token: float
    peak_flops: float | None
    group_names: tuple[str, ...]
    data: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    """Of each source: tokens, samples, share at the start."""
    bad_shards: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    """Of each source: numbers of files that cannot be used, and why."""
    changed_settings: tuple[str, ...] = ()


class Tracking(Callback):
    """Feeds trackers, console and `events.jsonl`."""

    phase = CallbackPhase.REPORT
    is_main_only = True

    def __init__(
        self,
        telemetry: Telemetry,
        trackers: list[Tracker],
        tracker_config: TrackerConfig,
        console: ConsoleProgress,
    ) -> None:
        self._telemetry = telemetry
        self._trackers = trackers
        self._tracker_config = tracker_config
        self._console = console
        self._events = JsonLinesWriter(telemetry.folder / "events.jsonl")
        self._has_started = False
        self._has_stepped = False
        self._is_losing_events = False
        self._peak_flops = telemetry.peak_flops

    def on_run_start(self, start: RunStart) -> None:
        """Open everything."""
        telemetry = self._telemetry
        self._has_started = True
        born, moment = telemetry.birth, now()
        launcher = None if born.launcher is None else moment.seconds_since(born.launcher)
        self._event(
            "run_start",
            start.state,
            process_start_time=born.process.unix_seconds,
            process_seconds=moment.seconds_since(born.process),
            launcher_seconds=launcher,
            boot_id=boot_id(),
            world_size=telemetry.world_size,
            engine=telemetry.engine,
            host=telemetry.host,
            data=telemetry.data,
        )
        if telemetry.changed_settings:
            self._event("settings_changed", start.state, lines=list(telemetry.changed_settings))
        bad = [line for lines in telemetry.bad_shards.values() for line in lines.values()]
        if bad:
            numbers = {name: list(found) for name, found in telemetry.bad_shards.items()}
            self._event("bad_shards", start.state, lines=bad, numbers=numbers)
        for tracker in self._trackers:
            tracker.start(telemetry.config, start.name, telemetry.run_id, telemetry.folder)
        self._console.start()
        verb = f"resumed at step {start.state.step}" if start.is_resumed else "started"
        self._console.message(
            f"{start.name} {verb}: {start.num_parameters / 1e6:,.2f}M parameters, "
            f"{telemetry.engine} on {telemetry.world_size} rank(s), {start.last_step:,} steps, "
            f"folder {telemetry.folder}"
        )
        if bad:
            self._console.incident(
                f"{len(bad)} files of tokens cannot be used, their samples go into the skip "
                f"ledger: {bad[0]}",
                f"{len(bad)} bad files of tokens",
            )

    def after_update(self, report: StepReport) -> None:
        """Record one step."""
        state, signals = report.state, report.signals
        if not self._has_stepped:
            self._has_stepped = True
            when = {"uptime": report.finished_uptime_seconds}
            self._event("first_step", state, time=report.finished_unix_seconds, **when)
        speed = report.num_tokens / max(1e-9, report.step_seconds + report.data_seconds)
        mfu = self._mfu(speed)
        metrics: dict[str, float | int | str | bool | None] = {
            "loss_nats": signals.loss_nats,  # dashboards show charts in this order
            "grad_norm": signals.grad_norm,
            "update_norm": signals.update_norm,
            "lr": report.lr,
            "tokens_per_second": speed,
            **state.as_dict(),
            "batch_samples": report.num_samples,
            "is_finite": signals.is_finite,
            "nonfinite_share": signals.nonfinite_share,
            "bad_rank": signals.bad_rank,
            "update": str(report.update),
            "step_seconds": report.step_seconds,
            "data_seconds": report.data_seconds,
            "mfu": mfu,
            "verdict": str(report.verdict.kind) if report.verdict is not None else None,
            "time": report.finished_unix_seconds,
            "uptime": report.finished_uptime_seconds,
            "attempt": self._telemetry.attempt,
        }
        if report.compile_seconds > 0:
            metrics["compile_seconds"] = report.compile_seconds
        for name, norm in zip(self._telemetry.group_names, signals.group_norms, strict=False):
            metrics[f"grad_norm/{name}"] = norm
        for tracker in self._trackers:
            tracker.log(metrics, state.clock)
        self._console.update(metrics)

    def on_checkpoint_saved(
        self, info: CheckpointInfo, seconds: float, background_seconds: float
    ) -> None:
        """Record a save."""
        self._write(
            "checkpoint_saved",
            clock=info.clock,
            step=info.step,
            seconds=seconds,
            background_seconds=background_seconds,
            bytes=info.num_bytes,
            path=str(info.path),
        )

    def on_checkpoint_failed(self, step: int, reason: str, seconds: float) -> None:
        """Record and show a failed save."""
        self._write("checkpoint_failed", step=step, reason=reason, seconds=seconds)
        self._console.incident(
            f"the checkpoint of step {step} failed: {reason}", f"save of step {step} failed"
        )

    def on_rewind(self, incident: Incident, state: TrainState, seconds: float) -> None:
        """Record and show a rewind."""
        self._event(
            "rewind",
            state,
            seconds=seconds,
            incident=incident.incident,
            incident_attempt=incident.attempt,
            rung=str(incident.rung),
            from_step=incident.detected_step,
            to_step=incident.target_step,
            from_clock=incident.clock,
            skip=list(incident.skip),
            reason=incident.reason,
        )
        cooled = f", learning rate x {incident.lr_scale:g}" if incident.lr_scale != 1.0 else ""
        text = (
            f"incident {incident.incident}, {incident.rung}: {incident.reason}; back to step "
            f"{incident.target_step}, {len(incident.skip_range):,} samples skipped{cooled}, "
            f"{seconds:.2f} s"
        )
        short = f"{incident.verdict} at {incident.onset_step}, back to {incident.target_step}"
        self._tell("rewind", text, short, state)

    def on_ledger_change(self, incident: Incident, state: TrainState) -> None:
        """Record and show what an operator skipped or put back."""
        self._event(
            "ledger_change",
            state,
            incident=incident.incident,
            incident_attempt=incident.attempt,
            rung=str(incident.rung),
            skip=list(incident.skip),
            returned=list(incident.returned) if incident.returned else None,
            reason=incident.reason,
        )
        where = (
            f"samples {incident.returned[1]} to {incident.returned[2]} come again at "
            f"{incident.returned[0]}"
            if incident.returned
            else f"{len(incident.skip_range):,} samples skipped"
        )
        text = f"incident {incident.incident}, {incident.rung}: {incident.reason}; {where}"
        self._tell("ledger_change", text, f"{incident.rung} at {state.step}", state)

    def on_evaluation(self, evaluation: Evaluation, state: TrainState, seconds: float) -> None:
        """Record and show the held-out losses."""
        by_source = dict(evaluation.by_source)
        self._event(
            "evaluation",
            state,
            seconds=seconds,
            loss_nats=evaluation.loss_nats,
            by_source=by_source,
        )
        metrics: dict[str, float | int | str | bool | None] = {
            "validation_loss_nats": evaluation.loss_nats
        }
        for name, loss in by_source.items() if len(by_source) > 1 else ():
            metrics[f"validation_loss_nats/{name}"] = loss
        for tracker in self._trackers:
            tracker.log(metrics, state.clock)
        parts = ", ".join(f"{name} {loss:.3f}" for name, loss in by_source.items())
        detail = f" ({parts})" if len(by_source) > 1 else ""
        self._console.message(
            f"step {state.step:,}: validation loss {evaluation.loss_nats:.3f} nats{detail}"
        )

    def on_integrity_check(
        self, check: Check, found: Corruption | None, state: TrainState, seconds: float
    ) -> None:
        """Record a check, and show what it found."""
        ranks = [] if found is None else list(found.vote.ranks)
        tensors = [] if found is None else list(found.tensors)
        text = "" if found is None else found.in_words()
        fields = {"check": str(check), "ranks": ranks, "tensors": tensors, "reason": text}
        self._event("integrity_check", state, seconds=seconds, **fields)
        if found is not None:
            words = f"silent corruption: {text}"
            self._tell("corruption", words, f"corruption at {state.step}", state)

    def on_note(self, note: Note, state: TrainState) -> None:
        """Record what was borne or observed, and show what was observed."""
        self._event(
            "note",
            state,
            incident=note.incident,
            incident_attempt=note.attempt,
            rung=str(note.rung),
            reason=note.reason,
        )
        if note.is_observed:
            text = f"incident {note.incident}, observed: {note.reason}"
            self._tell("observed", text, f"{note.verdict} at {note.onset_step}, observed", state)

    def on_alert(self, alert: Alert, state: TrainState) -> None:
        """Record and show it."""
        self._event(alert.kind, state, text=alert.text, **alert.fields)
        self._tell(alert.kind, alert.text, alert.short, state)

    def on_snapshot_taken(self, state: TrainState, seconds: float) -> None:
        """Record a snapshot."""
        self._event("snapshot", state, seconds=seconds)

    def _tell(self, kind: str, text: str, short: str, state: TrainState) -> None:
        self._console.incident(text, short)
        for tracker in self._trackers:
            tracker.event(kind, text, state.clock)

    def on_run_end(self, summary: Mapping[str, object]) -> None:
        """Write the summary and the report, and show both."""
        from monitoring.report import write_report

        folder = self._telemetry.folder
        place = {key: summary[key] for key in ("clock", "step")}
        self._write("run_end", **place, reason=summary["reason"])
        records = read_run(folder)
        losses = [number(record, "loss_nats") for record in records.curve]
        final = [math.nan if loss is None else loss for loss in losses[-_NUM_FINAL_STEPS:]]
        speeds = [number(record, "tokens_per_second") or 0.0 for record in records.curve]
        goodput = compute_goodput(records.metrics, records.events)
        full = {
            **summary,
            "steps": summary["step"],
            "final_loss_nats": fmean(final) if final else None,
            "num_vetoed": sum(record.get("update") == "vetoed" for record in records.curve),
            "tokens_per_second": fmean(speeds) if speeds else None,
            "wall_seconds": goodput.wall_seconds,
            "goodput": goodput.as_dict(),
            "report": str(folder / "report.html"),
        }
        write_json(folder / "summary.json", finite(full))
        write_report(folder)
        for tracker in self._trackers:
            tracker.finish(full)
        self._console.stop()
        print_summary(full, collect_incidents(records))
        command = dashboard_command(self._tracker_config, folder)
        is_tracked = not any(
            isinstance(tracker, GuardedTracker) and tracker.is_off for tracker in self._trackers
        )
        if command is not None and is_tracked:
            self._console.message(f"dashboard: {command}")

    def close(self) -> None:
        """Leave the terminal and the file as they should be."""
        self._console.stop()
        if self._has_started:
            self._write("exit")  # the last sign of life, also of a run that failed
        self._events.close()

    def _mfu(self, tokens_per_second: float) -> float | None:
        """Return the share of the peak, None if the peak is not known or has proved too low."""
        if self._peak_flops is None:
            return None
        reached = tokens_per_second * self._telemetry.flops_per_token
        mfu = reached / (self._peak_flops * self._telemetry.world_size)
        if mfu <= 1.0:
            return mfu
        self._peak_flops = None
        logger.warning(
            "MFU came out at %.0f%%: the peak of %.3g FLOP/s is too low (was the machine busy when "
            "it was measured?), so none is shown; set engine.peak_tflops",
            100 * mfu,
            reached / mfu,
        )
        return None

    def _event(self, kind: str, state: TrainState, **fields: object) -> None:
        self._write(kind, clock=state.clock, step=state.step, **fields)

    def _write(self, kind: str, **fields: object) -> None:
        """Write an event, stamped now unless the fields say otherwise, and bring it to the disk."""
        moment = now()
        record = {
            "kind": kind,
            "time": moment.unix_seconds,
            "uptime": moment.uptime_seconds,
            "attempt": self._telemetry.attempt,
            **fields,
        }
        try:
            self._events.write(record, is_urgent=True)
            self._is_losing_events = False
        except OSError as error:
            if not self._is_losing_events:  # one line, however long the disk stays full
                logger.warning("events.jsonl cannot be written (%s)", error.strerror or error)
            self._is_losing_events = True
