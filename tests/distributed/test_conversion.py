"""`trimtab convert`: DeepSpeed's own files become what all engines read, and nothing is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine_names import kind_and_stage

ROOT = Path(__file__).resolve().parent.parent.parent
Ask = Callable[..., list[dict[str, Any]]]
TRIMTAB = (sys.executable, "-c", "from launch.cli import main; main()")


def trimtab(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*TRIMTAB, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_own_files_of_deepspeed_become_readable_by_all(ask: Ask, engines_folder: Path) -> None:
    kind_and_stage("deepspeed-zero1")  # skips where it is not installed
    written = ask("conversion_tasks:own_files", "own", 2)[0]
    run = engines_folder / "own"
    result = trimtab("convert", run)
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(list((run / "checkpoints").glob("replaced-*"))) == 2, "the old ones are put aside"
    again = trimtab("convert", run, "--to", "fsdp")
    assert "2 of 2 checkpoints need no conversion: engine=fsdp can read them" in again.stdout
    assert trimtab("verify", run).stdout.count("ok: ") == 2
    read = ask("conversion_tasks:load_each", "own-single", 1, "own")[0]
    assert read.keys() == written.keys()
    for checkpoint, found in read.items():
        assert found["digest"] == written[checkpoint]["digest"]
        is_bf16 = checkpoint.endswith("18")
        assert found["losses"] == pytest.approx(
            written[checkpoint]["losses"], rel=2e-2 if is_bf16 else 1e-5, abs=0
        )
        assert found["extra"]["train_state"]["cursor"] == 7
        assert found["extra"]["ledger"] == [[1, 2]]
        assert found["health"] == "good"
