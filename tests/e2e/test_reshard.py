"""One run that is taken up by another engine on other ranks each time it is killed."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from harness import TINY, Fault, losses_by_clock, metrics, run, start, summary, wait_for_step
from typer.testing import CliRunner

from launch import cli

AUTO = (
    "checkpoint.interval_steps=auto",
    "checkpoint.failures_per_day=1e6",
    "checkpoint.max_interval_steps=8",
)


def test_run_goes_from_engine_to_engine_and_its_losses_go_on(
    tmp_path: Path, clean_single: Any
) -> None:
    folder = tmp_path / "run"
    has_deepspeed = find_spec("deepspeed") is not None
    first = ("engine=deepspeed", "engine.zero_stage=3") if has_deepspeed else ("engine=fsdp",)
    launch = start((*TINY, *first), folder, num_ranks=2, fault=Fault(seconds_a_batch=0.05))
    wait_for_step(launch, folder, 7, attempt=0)
    launch.kill()
    launch.wait()
    run(TINY, folder, fault=Fault(kill_at="in_save_of_step_20")).expect(-9)
    run((*TINY, "engine=fsdp", *AUTO), folder, num_ranks=2).expect(0)
    expected = losses_by_clock(clean_single.folder)
    for record in metrics(folder):  # those that ran twice among them
        assert record["loss_nats"] == pytest.approx(expected[record["clock"]], rel=1e-5)
    assert {record["clock"] for record in metrics(folder)} == expected.keys()
    key = "validation_loss_nats"
    assert summary(folder)[key] == pytest.approx(summary(clean_single.folder)[key], rel=1e-5)
    assert "checkpoint.interval_steps=auto: a save every" in (folder / "train.log").read_text()
    arguments = ["checkpoints", str(folder), "--json"]
    listed = CliRunner().invoke(cli.build_app(), arguments, catch_exceptions=False)
    rows = [json.loads(line) for line in listed.output.splitlines()]
    assert rows[-1]["step"] == 40
    assert all(row["kept"] and row["files"] == "sizes fit" for row in rows)
