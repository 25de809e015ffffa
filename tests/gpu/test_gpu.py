"""A tiny model on one GPU: the engines over NCCL, the veto, and resume; skipped without CUDA."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import TINY, Fault, Launch, checkpoints, losses_by_clock, run, summary

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA"),
]

ENGINES = ("single", "ddp", "fsdp")
every_engine = pytest.mark.parametrize("engine", ENGINES)
every_precision = pytest.mark.parametrize("precision", ["fp32", "bf16"])


def arguments(engine: str, precision: str = "fp32") -> list[str]:
    return [*TINY, f"engine={engine}", "engine.device=cuda", f"engine.precision={precision}"]


@every_engine
@every_precision
def test_run_learns_and_resumes_where_it_was_killed(
    engine: str, precision: str, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(arguments(engine, precision), whole).expect(0)
    losses = losses_by_clock(whole)
    assert losses[40] < 0.8 * losses[1]
    run(arguments(engine, precision), killed, fault=Fault(kill_at="in_save_of_step_20")).expect(-9)
    run(arguments(engine, precision), killed).expect(0)
    assert losses_by_clock(killed) == losses, "bit for bit, with run.is_deterministic"
    assert checkpoints(killed)[-1].name == checkpoints(whole)[-1].name
    assert summary(killed)["validation_loss_nats"] == summary(whole)["validation_loss_nats"]


@every_engine
def test_vetoed_update_changes_nothing(engine: str, tmp_path: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parent.parent / "distributed"))
    try:
        import engine_tasks
    finally:
        sys.path.pop(0)
    log = tmp_path / "output"
    launch = Launch(engine_tasks.veto, str(tmp_path), "veto", engine, "cuda", log=log)
    assert launch.wait() == (0,), launch.output()
    found: dict[str, Any] = json.loads((tmp_path / "veto.0.json").read_text())
    for case in ("loss_gate", "norm_gate", "nan"):
        assert found[case]["is_vetoed"]
        assert found[case]["changed"] == []
    assert found["clean"]["is_as_control"]
    assert found["unguarded"]["is_nan"]
