"""The quick part of `make chaos`: a killed rank, a flipped bit, and a short soak."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from harness import ROOT, environment

TIMEOUT_SECONDS = 400


def test_quick_part_of_the_chaos_suite_recovers_from_everything(tmp_path: Path) -> None:
    found = tmp_path / "results.json"
    page = tmp_path / "reliability.md"
    page.write_text((ROOT / "docs" / "reliability.md").read_text())
    arguments = ["--quick", "--json", str(found), "--output", str(page)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos", *arguments, "--work", str(tmp_path / "work")],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    results = json.loads(found.read_text())["results"]
    assert results.keys() == {"kill_one_rank", "byte_flipped", "soak_single"}
    for result in results.values():
        assert result["is_bit_equal"] is True, result
        assert (result["samples"]["twice"], result["samples"]["skipped"]) == (0, 0), result
        assert result["samples"]["trained"] > 0
        assert result["recover_seconds"] > 0
    assert results["kill_one_rank"]["steps_lost"] <= 40
    assert "is corrupt" in results["byte_flipped"]["happened"]
    assert results["soak_single"]["samples"]["in_ledger"] > 0, "a recovery was under fire too"
    table = page.read_text()
    assert all(f"| {result['done']} |" in table for result in results.values())
