"""The command that `trimtab replay` starts, and what it refuses before it starts anything."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from launch.compose import compose
from launch.errors import LaunchError
from launch.replay import command, environment, replay_entry

NAME = "step-00000015-clock-00000015"


def make_run(folder: Path, *, num_ranks: int = 1, format_: str = "dcp") -> Path:
    checkpoint = folder / "checkpoints" / NAME
    checkpoint.mkdir(parents=True)
    manifest = {"step": 15, "cursor": 120, "clock": 15, "world_size": num_ranks, "format": format_}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    (checkpoint / "health.json").write_text(json.dumps({"health": "good", "reason": ""}))
    record = {
        "incident": 1,
        "attempt": 1,
        "rule": "ladder",
        "onset_step": 21,
        "detected_step": 22,
        "clock": 23,
        "target_checkpoint": NAME,
        "kept": [NAME],
        "skip": [0, 0],
    }
    (folder / "journal.jsonl").write_text(json.dumps(record) + "\n")
    cluster = OmegaConf.to_container(compose([]).cluster)
    OmegaConf.save(OmegaConf.create({"cluster": cluster}), folder / "config.yaml")
    return folder


def write_capsule(run: Path, hosts: dict[str, str]) -> None:
    folder = run / "incidents" / "0001-1"
    folder.mkdir(parents=True)
    (folder / "capsule.json").write_text(json.dumps({"environment": {"hosts": hosts}}))


def test_one_rank_needs_no_launcher(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert command(run, 1, num_steps=8, output=Path("out.json")) == [
        *(sys.executable, str(replay_entry()), str(run), "--incident", "1"),
        *("--steps", "8", "--output", "out.json"),
    ]
    assert replay_entry().is_file()


def test_ranks_are_by_default_those_of_the_run_on_one_host(tmp_path: Path) -> None:
    run = make_run(tmp_path, num_ranks=16)
    assert "--nproc-per-node=16" in command(run, 1)
    write_capsule(run, {"node-1": "0-7", "node-2": "8-15"})
    assert "--nproc-per-node=8" in command(run, 1)
    assert "--nproc-per-node=2" in command(run, 1, num_ranks=2)


def test_environment_is_the_run_s_unless_the_caller_has_set_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert "OMP_NUM_THREADS" in environment(run)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert "OMP_NUM_THREADS" not in environment(run)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"incident": 7}, "no incident 7"),
        ({"incident": 1, "num_ranks": 0}, "--nproc=0"),
        ({"incident": 1, "num_steps": -1}, "--steps=-1"),
        ({"incident": 1, "num_ranks": 1}, "use --nproc 4"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, arguments: dict[str, Any], words: str) -> None:
    run = make_run(tmp_path, num_ranks=4, format_="deepspeed-zero3-4-ranks")
    with pytest.raises(LaunchError, match=words):
        command(run, **arguments)


def test_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="no run folder"):
        command(tmp_path, 1)
