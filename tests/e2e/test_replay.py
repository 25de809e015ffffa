"""Whole runs with a known fault, and what a replay of their incident puts it down to.

The model is tiny; its batches are four times as large as in other tests, so that the detector knows
its noise. The fault strikes in the step that makes update 61.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from harness import ROOT, TIMEOUT_SECONDS, TINY, Launch, Result, environment, journal, run

ONSET_STEP = 61
BATCH = 32
FAULTY = (
    *TINY,
    "recovery=ladder",
    "run.steps=75",
    "checkpoint.interval_steps=10",
    "checkpoint.keep_snapshots=0",
    f"schedule.batch_samples={BATCH}",
    "recovery.window_steps=24",
    "recovery.warmup_steps=12",
    "recovery.threshold_sigma=6",
    "recovery.margin=2 batches",
    "recovery.rewind_steps=5",
    "recovery.cooldown_steps=20",
    "recovery.cool_steps=20",
    "chaos.start=60 steps",
)
BAD_DATA = ("chaos=bad_data", "chaos.length=5 batches", "recovery.ladder=[skip]")


def _replay(arguments: list[str]) -> int:
    from train.attribution.command import main

    sys.argv = ["train/replay.py", *arguments]
    return main()


def replay(folder: Path, *arguments: str, num_ranks: int = 1) -> Result:
    """Replay incident 1 in forked ranks."""
    log = folder.parent / f"{folder.name}.replay"
    everything = [str(folder), "--incident", "1", *arguments]
    launch = Launch(_replay, everything, log=log, num_ranks=num_ranks)
    exit_codes = launch.wait()
    return Result(exit_codes=exit_codes, output=launch.output(), folder=folder)


def attribution(folder: Path) -> dict[str, Any]:
    path = folder / "incidents" / "0001-1" / "attribution.json"
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


def spiked(found: dict[str, Any]) -> dict[str, bool | None]:
    return {trial["name"]: trial["has_spiked"] for trial in found["trials"]}


def content(folder: Path) -> dict[str, bytes]:
    """Return all that the run itself has written."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock" and "attribution" not in path.name
    }


@pytest.fixture(scope="module")
def bad_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has met five foreign batches and left them behind."""
    folder = tmp_path_factory.mktemp("replay") / "bad-data"
    run([*FAULTY, *BAD_DATA], folder).expect(0)
    return folder


def test_bad_data_are_found_guilty_by_the_command_line(bad_data: Path) -> None:
    before = content(bad_data)
    done = subprocess.run(
        [
            *(sys.executable, "-c", "from launch.cli import main; main()"),
            *("replay", str(bad_data), "--incident", "1"),
        ],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "cause: data" in done.stdout and "attribution.svg" in done.stdout
    assert "step 61" in done.stdout
    assert re.search(r"replay of incident 1 +step", done.stderr), "progress goes to stderr"
    found = attribution(bad_data)
    assert found["cause"] == "data"
    assert spiked(found) == {"A": True, "B": True, "C": False}
    assert found["repeat"]["differs"] is False and found["repeat"]["steps"] == [60, 61]
    assert found["original"]["first_other_step"] is None, "A is the run again, bit for bit"
    assert found["original"]["num_equal_steps"] > 5
    assert (bad_data / "incidents" / "0001-1" / "attribution.svg").exists()
    assert content(bad_data) == before, "a replay changes nothing of the run"


def test_capsule_of_bad_data_names_bad_samples(bad_data: Path) -> None:
    path = bad_data / "incidents" / "0001-1" / "capsule.json"
    capsule = json.loads(path.read_text())
    first = next(r["cursor"] for r in capsule["reports"] if r["step"] == ONSET_STEP - 1)
    bad = range(first, first + 5 * BATCH)
    worst = capsule["suspects"][:8]
    assert {suspect["order_index"] for suspect in worst} <= set(bad)
    assert all(suspect["text"] and suspect["origins"] for suspect in capsule["suspects"])
    by_step = {report["step"]: report["loss_nats"] for report in capsule["reports"]}
    known = {entry["step"]: entry for entry in capsule["ranks"]["losses"] if entry["is_reported"]}
    assert ONSET_STEP in known
    for step, entry in known.items():
        assert entry["loss_nats"] == pytest.approx(by_step[step], rel=1e-6), "paired with its step"
    assert path.stat().st_size < 512 * 1024


def test_replay_on_other_ranks_comes_to_the_same_and_says_that_it_was_on_others(
    bad_data: Path, tmp_path: Path
) -> None:
    output = tmp_path / "elsewhere.json"
    result = replay(bad_data, "--output", str(output), "--steps", "2", num_ranks=2).expect(0)
    found = json.loads(output.read_text())
    assert found["cause"] == "data"
    assert not found["original"]["is_comparable"]
    assert any("2 rank(s), the run had 1" in caveat for caveat in found["caveats"])
    assert str(output) in result.output.replace("\n", "")
    assert output.with_suffix(".svg").exists()


def test_target_that_lay_in_memory_alone_is_reached_from_disk(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    memory = ["checkpoint.keep_snapshots=2", "checkpoint.snapshot_interval_steps=4"]
    run([*FAULTY, *BAD_DATA, *memory], folder).expect(0)
    replay(folder).expect(0)
    found = attribution(folder)
    assert found["target_step"] == 56 and found["trials"][0]["from_step"] == 50
    assert found["cause"] == "data"
    assert spiked(found) == {"A": True, "B": True, "C": False}
    assert found["original"]["first_other_step"] is None, "A came to the target as the run did"
    a, b, c = (trial["data"] for trial in found["trials"])
    assert a == b and c[0] >= a[1]
    assert any("lay in memory alone" in caveat for caveat in found["caveats"])


def test_wrong_learning_rate_is_in_the_state(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shock = ["chaos=lr_shock", "chaos.length=5 steps", "chaos.factor=50"]
    run([*FAULTY, *shock, "recovery.ladder=[skip,cool]", "recovery.cool_factor=0.2"], folder)
    replay(folder).expect(0)
    found = attribution(folder)
    assert found["cause"] == "state"
    assert spiked(found)["A"] and spiked(found)["C"]


def test_flipped_bit_does_not_come_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run([*FAULTY, "chaos=bit_flip"], folder).expect(0)
    result = replay(folder).expect(0)
    found = attribution(folder)
    assert found["cause"] == "not reproducible: suspect hardware"
    assert spiked(found)["A"] is False
    assert found["original"]["first_other_step"] == ONSET_STEP, "the step in which it struck"
    assert found["suspect_hardware"]["hosts"] == [socket.gethostname()]
    assert "look first at: rank 0" in result.output


def test_failing_rank_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    fault = ["chaos=nan_on_one_rank", "chaos.length=5 steps", "chaos.rank=1", "engine=ddp"]
    run([*FAULTY, *fault], folder, num_ranks=2).expect(0)
    replay(folder).expect(0)
    found = attribution(folder)
    assert found["cause"] == "not reproducible: suspect hardware"
    assert found["suspect_hardware"]["ranks"] == [1]


def test_incident_whose_checkpoint_is_gone_is_refused(bad_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(bad_data, folder)
    target = next(record["kept"][-1] for record in journal(folder) if record["kept"])
    shutil.rmtree(folder / "checkpoints" / target)
    result = replay(folder).expect(2)
    assert target in result.output and "is gone" in result.output


def test_step_that_does_not_give_the_same_bits_twice_names_its_host(
    bad_data: Path, tmp_path: Path
) -> None:
    """A device that computes wrongly now and then."""
    output = tmp_path / "unsound.json"
    arguments = [str(bad_data), "--incident", "1", "--output", str(output)]
    launch = Launch(_replay_on_an_unsound_device, arguments, log=tmp_path / "replay.output")
    assert launch.wait() == (0,), launch.output()
    found = json.loads(output.read_text())
    assert found["cause"] == "not reproducible: suspect hardware"
    assert found["repeat"]["differs"] is True
    assert "in the repeated step" in found["suspect_hardware"]["words"]


def _replay_on_an_unsound_device(arguments: list[str]) -> int:
    import torch

    from train.engines.torch_engine import TorchEngine

    original = TorchEngine.restore
    count = 0

    def restore(self: Any, snapshot: Any) -> None:
        nonlocal count
        original(self, snapshot)
        count += 1
        if count % 2 == 0:
            with torch.no_grad():
                next(self.model.parameters()).view(-1)[0] += 1e-3

    TorchEngine.restore = restore  # type: ignore[method-assign]
    return _replay(arguments)
