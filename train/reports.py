"""From device signals to reports, one step late, so that the hot path never waits for the host."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from monitoring.clocks import Moment, now
from train.compile_time import compile_seconds
from train.recovery.detector import CALM_KINDS
from train.signals import Gate, StepReport, StepSignals
from train.state import TrainState


@dataclass(slots=True, kw_only=True)
class _Pending:
    vector: Tensor
    copied: torch.cuda.Event | None
    state: TrainState
    lr: float
    num_samples: int
    num_tokens: int
    data_seconds: float
    gate: Gate
    step_seconds: float
    compile_seconds: float
    finished: Moment


class ReportPipeline:
    """Holds the signals of the last step until the next one is under way."""

    def __init__(self) -> None:
        self._pending: _Pending | None = None
        self._compiled_seconds = compile_seconds()

    def push(
        self,
        state: TrainState,
        vector: Tensor,
        *,
        lr: float,
        num_samples: int,
        num_tokens: int,
        started: float,
        data_seconds: float,
        gate: Gate,
        is_flushed: bool,
    ) -> list[StepReport]:
        """Take the signals of a step, and return the reports that are ready, oldest first.

        `started`: `time.perf_counter()` when the step had its data. `is_flushed`: wait for this
        step's own report too (a host sync).
        """
        copied = None
        if vector.is_cuda:
            host = torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True)
            host.copy_(vector, non_blocking=True)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch lacks the annotation
            copied.record()
            vector = host
        before, self._pending = self._pending, None
        reports = [_resolve(before)] if before is not None else []
        if is_flushed and copied is not None:
            copied.synchronize()  # host sync, asked for
        compiled_before, self._compiled_seconds = self._compiled_seconds, compile_seconds()
        pending = _Pending(
            vector=vector,
            copied=copied,
            state=state,
            lr=lr,
            num_samples=num_samples,
            num_tokens=num_tokens,
            data_seconds=data_seconds,
            gate=gate,
            step_seconds=time.perf_counter() - started,
            compile_seconds=self._compiled_seconds - compiled_before,
            finished=now(),
        )
        if is_flushed:
            return [*reports, _resolve(pending)]
        self._pending = pending
        return reports

    def drain(self) -> list[StepReport]:
        """Return what is still held (a host sync)."""
        before, self._pending = self._pending, None
        return [_resolve(before)] if before is not None else []

    def clear(self) -> None:
        """Forget what is held: it belongs to steps that were rewound."""
        self._pending = None


def _resolve(pending: _Pending) -> StepReport:
    if pending.copied is not None:
        pending.copied.synchronize()  # waits for a copy that was issued a step ago
    values = pending.vector.tolist()
    return StepReport(
        state=pending.state,
        signals=StepSignals.from_vector(values),
        lr=pending.lr,
        num_samples=pending.num_samples,
        num_tokens=pending.num_tokens,
        step_seconds=pending.step_seconds,
        data_seconds=pending.data_seconds,
        finished_unix_seconds=pending.finished.unix_seconds,
        finished_uptime_seconds=pending.finished.uptime_seconds,
        compile_seconds=pending.compile_seconds,
        gate=pending.gate,
    )


_TAIL_BYTES = 4 * 2**20
_NUM_STEPS_AFTER = 4


def was_calm_after(clock: int, metrics: Path) -> bool:
    """True unless the metrics know of trouble in the first steps after `clock`.

    A run that was cut short right after a checkpoint has seen those steps before: if they were
    troubled then, the same trouble after the resume does not mean that the resume went wrong.
    """
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, metrics.stat().st_size - _TAIL_BYTES))
            lines = file.read().split(b"\n")
    except OSError:
        return True
    for line in lines:
        try:
            record = json.loads(line)
            is_near = clock < record["clock"] <= clock + _NUM_STEPS_AFTER
            if is_near and record["verdict"] not in (*CALM_KINDS, None):
                return False
        except (ValueError, KeyError, TypeError):
            continue  # torn, or the rest of a line
    return True
