"""The default recipe at its default size: with recovery, bad data costs next to nothing."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from harness import MAIN, ROOT, environment, place, summary

pytestmark = pytest.mark.slow

RUN_TIMEOUT_SECONDS = 400


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Return the summaries of the three runs."""
    folder = tmp_path_factory.mktemp("falcon-like")
    cases = {
        "clean": [],
        "recovered": ["chaos=bad_data"],
        "unrecovered": ["chaos=bad_data", "recovery=none"],
    }
    for name, arguments in cases.items():
        done = subprocess.run(
            [sys.executable, MAIN, "exp=falcon_like", *arguments, *place(folder / name)],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=RUN_TIMEOUT_SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stdout
    return {name: summary(folder / name) for name in cases}


def test_clean_run_has_no_rewind(recipe: dict[str, dict[str, Any]]) -> None:
    assert recipe["clean"]["rewinds"] == 0
    assert recipe["clean"]["skipped_samples"] == 0


def test_bad_data_costs_one_or_two_rewinds_and_at_most_two_percent(
    recipe: dict[str, dict[str, Any]],
) -> None:
    clean = recipe["clean"]["validation_loss_nats"]
    recovered = recipe["recovered"]["validation_loss_nats"]
    assert recipe["recovered"]["rewinds"] in (1, 2)
    assert recipe["recovered"]["steps"] == recipe["clean"]["steps"]
    assert abs(recovered - clean) <= 0.02 * clean


def test_without_recovery_bad_data_costs_at_least_three_times_as_much(
    recipe: dict[str, dict[str, Any]],
) -> None:
    clean = recipe["clean"]["validation_loss_nats"]
    recovered = recipe["recovered"]["validation_loss_nats"]
    unrecovered = recipe["unrecovered"]["validation_loss_nats"]
    assert recipe["unrecovered"]["rewinds"] == 0
    assert unrecovered > clean
    assert unrecovered - clean >= 3 * abs(recovered - clean)
