"""Reports one step late, and whether a run was calm after the checkpoint that it goes on from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from monitoring.clocks import now
from train.reports import ReportPipeline, was_calm_after
from train.signals import NUM_FIXED_SIGNALS, Gate, StepReport
from train.state import TrainState


def push(pipeline: ReportPipeline, step: int, *, is_flushed: bool = False) -> list[StepReport]:
    vector = torch.zeros(NUM_FIXED_SIGNALS, dtype=torch.float64)
    vector[0] = float(step)
    return pipeline.push(
        TrainState(step=step, cursor=16 * step, clock=step),
        vector,
        lr=1e-3,
        gate=Gate(max_loss_nats=float(step)),
        num_samples=16,
        num_tokens=2048,
        started=0.0,
        data_seconds=0.25,
        is_flushed=is_flushed,
    )


def steps(reports: list[StepReport]) -> list[int]:
    assert all(report.signals.loss_nats == report.state.step for report in reports)
    return [report.state.step for report in reports]


# One step late.


def test_report_comes_when_the_next_step_is_under_way() -> None:
    pipeline = ReportPipeline()
    assert [steps(push(pipeline, step)) for step in (1, 2, 3)] == [[], [1], [2]]
    assert steps(pipeline.drain()) == [3]
    assert pipeline.drain() == []


def test_report_that_is_asked_for_comes_at_once_behind_the_one_before() -> None:
    pipeline = ReportPipeline()
    assert steps(push(pipeline, 1)) == []
    assert steps(push(pipeline, 2, is_flushed=True)) == [1, 2]
    assert steps(push(pipeline, 3)) == []
    assert steps(push(pipeline, 4, is_flushed=True)) == [3, 4]


def test_what_was_rewound_is_forgotten() -> None:
    pipeline = ReportPipeline()
    push(pipeline, 1)
    pipeline.clear()
    assert steps(push(pipeline, 2)) == []
    assert steps(pipeline.drain()) == [2]


def test_report_says_what_the_loop_knew() -> None:
    (report,) = push(ReportPipeline(), 5, is_flushed=True)
    assert (report.lr, report.num_samples, report.num_tokens) == (1e-3, 16, 2048)
    assert report.gate == Gate(max_loss_nats=5.0)
    assert report.data_seconds == 0.25
    assert report.verdict is None
    assert report.step_seconds > 0
    assert report.finished_unix_seconds > 0


# Calm after a checkpoint.


def line(clock: Any, verdict: Any = "ok", **fields: object) -> str:
    return json.dumps({"clock": clock, "step": clock, "verdict": verdict, **fields})


def metrics_of(folder: Path, *lines: str) -> Path:
    path = folder / "metrics.jsonl"
    path.write_text("".join(f"{text}\n" for text in lines))
    return path


def test_run_without_metrics_was_calm(tmp_path: Path) -> None:
    assert was_calm_after(0, tmp_path / "metrics.jsonl")
    assert was_calm_after(5, tmp_path)  # a folder in its place


def test_run_without_a_step_after_it_was_calm(tmp_path: Path) -> None:
    assert was_calm_after(3, metrics_of(tmp_path))
    assert was_calm_after(3, metrics_of(tmp_path, line(2, "spike"), line(3, "spike")))


@pytest.mark.parametrize("verdict", ["ok", "warmup", "level_shift", None])
def test_calm_steps_are_calm(verdict: str | None, tmp_path: Path) -> None:
    metrics = metrics_of(tmp_path, *(line(clock, verdict) for clock in range(1, 20)))
    assert was_calm_after(10, metrics)


@pytest.mark.parametrize("verdict", ["outlier", "spike", "divergence", "nonfinite"])
@pytest.mark.parametrize(("clock", "is_calm"), [(10, True), (11, False), (14, False), (15, True)])
def test_trouble_in_the_first_steps_after_it_counts(
    clock: int, is_calm: bool, verdict: str, tmp_path: Path
) -> None:
    lines = [line(at, verdict if at == clock else "ok") for at in range(1, 30)]
    assert was_calm_after(10, metrics_of(tmp_path, *lines)) is is_calm


def test_trouble_in_any_attempt_counts(tmp_path: Path) -> None:
    lines = [line(11, "spike", attempt=0), line(11, "ok", attempt=1)]
    assert not was_calm_after(10, metrics_of(tmp_path, *lines))


@pytest.mark.parametrize(
    "torn",
    [
        '{"clock": 12, "verd',
        "",
        "5",
        "[]",
        "null",
        "{}",
        '{"clock": 12}',
        '{"clock": null, "verdict": "spike"}',
        '{"clock": "12", "verdict": "spike"}',
        "\x00\x00",
    ],
)
def test_torn_line_is_passed_over(torn: str, tmp_path: Path) -> None:
    assert was_calm_after(10, metrics_of(tmp_path, line(11), torn))
    assert not was_calm_after(10, metrics_of(tmp_path, torn, line(12, "spike")))


def test_bytes_that_are_no_text_are_passed_over(tmp_path: Path) -> None:
    path = metrics_of(tmp_path, line(11))
    with path.open("ab") as file:
        file.write(b"\xff\xfe\n" + line(12, "spike").encode())
    assert not was_calm_after(10, path)


def test_long_history_costs_only_its_tail(tmp_path: Path) -> None:
    filler = json.dumps({"clock": 1, "verdict": "spike", "text": "x" * 1000})
    path = tmp_path / "metrics.jsonl"
    with path.open("w") as file:
        file.write(f"{line(2, 'spike')}\n")
        file.writelines(f"{filler}\n" for _ in range(5000))
        file.write(f"{line(100_001)}\n{line(100_002, 'spike')}\n")
    assert path.stat().st_size > 4 * 2**20
    assert not was_calm_after(100_000, path)
    assert was_calm_after(100_002, path)
    assert was_calm_after(1, path), "what lies before the tail is not looked at"


# When, and what of it was compiling.


def test_step_is_stamped_when_it_ends_on_both_clocks() -> None:
    pipeline = ReportPipeline()
    before = now()
    push(pipeline, 1)
    after = now()
    (report,) = push(pipeline, 2)
    assert before.unix_seconds <= report.finished_unix_seconds <= after.unix_seconds
    assert report.finished_uptime_seconds is not None
    assert before.uptime_seconds <= report.finished_uptime_seconds <= after.uptime_seconds


def test_compiling_belongs_to_the_step_in_which_it_happened(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    total = 5.0  # what a run before in this process took
    monkeypatch.setattr("train.reports.compile_seconds", lambda: total)
    pipeline = ReportPipeline()
    found = []
    for step, compiled in enumerate([3.0, 0.0, 0.5, 0.0], start=1):
        total += compiled
        found += push(pipeline, step)
    assert [report.compile_seconds for report in [*found, *pipeline.drain()]] == [3.0, 0, 0.5, 0]
