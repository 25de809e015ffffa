"""Fixtures of the monitoring tests: synthetic run folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from synthetic_run import START, Json, RunScript, play_ladder_run, play_recovered_run


@pytest.fixture
def script(tmp_path: Path) -> RunScript:
    return RunScript(folder=tmp_path / "runs" / "falcon_like")


@pytest.fixture
def recovered_run(script: RunScript) -> RunScript:
    play_recovered_run(script)
    summary: Json = {
        "name": "falcon_like", "finished": True, "reason": "completed", "steps": 400,
        "clock": script.clock, "tokens_seen": script.clock * 8192, "final_loss_nats": 3.1034,
        "validation_loss_nats": 3.22, "rewinds": 1, "skipped_samples": 64,
        "skipped_tokens": 65536, "num_vetoed": 1, "wall_seconds": script.time - START,
        "tokens_per_second": 31_400.0, "goodput": {}, "report": "report.html",
    }  # fmt: skip
    script.write(summary=summary)
    return script


@pytest.fixture
def ladder_run(script: RunScript) -> RunScript:
    play_ladder_run(script)
    script.write()
    return script


@pytest.fixture
def add_torn_line() -> Callable[[Path], None]:
    def add(path: Path) -> None:
        with path.open("a") as file:
            file.write('{"clock": 12, "step"')

    return add
