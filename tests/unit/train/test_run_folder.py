"""The run folder: made, taken up again, refused, started over."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from train.errors import RunFolderError
from train.run_folder import (
    FolderLock,
    RunFolder,
    check_folder,
    launch_id,
    open_folder,
    will_overwrite,
)

NODE: dict[str, Any] = {
    "run": {"name": "r", "seed": 1, "overwrite": False},
    "optim": {"lr": 3e-3, "betas": [0.9, 0.95], "epsilon": 1e-8},
    "engine": {"kind": "auto", "deepspeed": {}},
    "data": {"paths": ["a b", "1e-3", "null", "~"], "cache_dir": None},
}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (
        "SLURM_JOB_ID",
        "SLURM_STEP_ID",
        "SLURM_RESTART_COUNT",
        "TORCHELASTIC_RUN_ID",
        "TORCHELASTIC_RESTART_COUNT",
    ):
        monkeypatch.delenv(variable, raising=False)


def changed(**groups: dict[str, Any]) -> dict[str, Any]:
    return {name: {**NODE[name], **groups.get(name, {})} for name in NODE}


def start(
    path: Path, node: dict[str, Any] = NODE, *, overwrite: bool = False, digest: str = "d" * 64
) -> RunFolder:
    check_folder(path, node, overwrite=overwrite)
    return open_folder(path, "r", node, overwrite=overwrite, data_digests={"text": digest})


def test_folder_is_made_with_its_config_and_identity(tmp_path: Path) -> None:
    folder = start(tmp_path / "runs" / "r")
    assert folder.attempt == 0
    assert folder.path == tmp_path / "runs" / "r"
    identity = json.loads((folder.path / "run.json").read_text())
    assert identity["run_id"] == folder.run_id
    assert identity["name"] == "r"
    assert (folder.path / "config.yaml").exists()
    parts = (folder.checkpoints, folder.journal, folder.metrics, folder.incidents, folder.control)
    assert {part.parent for part in parts} == {folder.path}
    assert len({part.name for part in parts}) == len(parts)


def test_same_config_takes_the_run_up_again(tmp_path: Path) -> None:
    first = start(tmp_path / "r")
    (first.path / "metrics.jsonl").write_text("kept")
    second, third = start(tmp_path / "r"), start(tmp_path / "r")
    assert (first.attempt, second.attempt, third.attempt) == (0, 1, 2)
    assert first.run_id == second.run_id == third.run_id
    assert (first.path / "metrics.jsonl").read_text() == "kept"


def test_runs_have_ids_of_their_own(tmp_path: Path) -> None:
    assert start(tmp_path / "a").run_id != start(tmp_path / "b").run_id


def test_keys_that_change_nothing_learnt_may_differ(tmp_path: Path) -> None:
    start(tmp_path / "r")
    node = changed(engine={"kind": "fsdp"}, data={"cache_dir": "/elsewhere"})
    folder = start(tmp_path / "r", node)
    assert folder.attempt == 1
    folder.take_up(node)
    assert "fsdp" in (tmp_path / "r" / "config.yaml").read_text()
    assert "auto" in (tmp_path / "r" / "configs" / "until-000001.yaml").read_text()


def test_another_config_is_refused_with_each_key_that_differs(tmp_path: Path) -> None:
    start(tmp_path / "r")
    node = changed(run={"seed": 2}, optim={"betas": [0.9, 0.99]}, engine={"kind": "ddp"})
    with pytest.raises(RunFolderError) as caught:
        check_folder(tmp_path / "r", node, overwrite=False)
    first, *keys = caught.value.problems
    assert "holds a run with another config: use another run.name, or run.overwrite=true" in first
    assert keys == [
        "optim.betas: the folder has [0.9, 0.95], now [0.9, 0.99]",
        "run.seed: the folder has 1, now 2",
    ]
    assert caught.value.exit_code == 2


def test_refusal_changes_nothing(tmp_path: Path) -> None:
    start(tmp_path / "r")
    before = {path: path.read_bytes() for path in (tmp_path / "r").iterdir()}
    with pytest.raises(RunFolderError):
        start(tmp_path / "r", changed(run={"seed": 2}))
    assert {path: path.read_bytes() for path in (tmp_path / "r").iterdir()} == before


def test_overwrite_removes_what_a_run_writes_and_nothing_else(tmp_path: Path) -> None:
    first = start(tmp_path / "r")
    first.checkpoints.mkdir()
    (first.checkpoints / "old").write_text("old")
    (first.path / "metrics.jsonl").write_text("old")
    first.journal.write_text("old")
    (first.incidents / "1").mkdir(parents=True)
    (first.control / "requests").mkdir(parents=True)
    (first.control / "requests" / "a.json").write_text("for the old run")
    (first.path / "wandb").symlink_to(tmp_path)
    (first.path / "notes.txt").write_text("mine")
    (first.path / "logs").mkdir()
    (first.path / "logs" / "1.out").write_text("kept")
    second = start(tmp_path / "r", changed(run={"seed": 2}), overwrite=True)
    assert second.attempt == 0
    assert second.run_id != first.run_id
    names = sorted(path.name for path in second.path.iterdir())
    assert names == ["config.yaml", "logs", "notes.txt", "run.json"]
    assert (second.path / "logs" / "1.out").read_text() == "kept"
    assert tmp_path.exists()


@pytest.mark.parametrize("variable", ["SLURM_STEP_ID", "TORCHELASTIC_RUN_ID"])
def test_overwrite_within_the_launch_that_made_it_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv(variable, "launch-1")
    first = start(tmp_path / "r", overwrite=True)
    again = start(tmp_path / "r", overwrite=True)
    assert (again.attempt, again.run_id) == (1, first.run_id)
    monkeypatch.setenv(variable, "launch-2")
    assert start(tmp_path / "r", overwrite=True).attempt == 0


def test_elastic_restart_without_a_run_id_does_not_start_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    first = start(tmp_path / "r", overwrite=True)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    again = start(tmp_path / "r", overwrite=True)
    assert (again.attempt, again.run_id) == (1, first.run_id)


def test_launch_resumed_by_another_launch_is_then_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    start(tmp_path / "r")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "2")
    assert start(tmp_path / "r").attempt == 1
    assert start(tmp_path / "r", overwrite=True).attempt == 2


def test_launch_without_a_name_of_its_own_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch_id() == ""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert launch_id() == ""
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert launch_id() == "", "one allocation can hold several launches"
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert launch_id() == "77.0"


def test_requeued_job_resumes_whatever_the_flag_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(tmp_path / "r", overwrite=True)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert start(tmp_path / "r", overwrite=True).attempt == 1


def test_folder_without_a_run_is_not_overwritten_but_used(tmp_path: Path) -> None:
    (tmp_path / "r" / "logs").mkdir(parents=True)
    assert not will_overwrite(tmp_path / "r", overwrite=True)
    assert start(tmp_path / "r", overwrite=True).attempt == 0


def test_run_killed_while_it_was_cleared_does_not_look_like_a_run(tmp_path: Path) -> None:
    first = start(tmp_path / "r")
    (first.path / "run.json").unlink()
    check_folder(first.path, changed(run={"seed": 2}), overwrite=False)


def test_changed_corpus_is_refused(tmp_path: Path) -> None:
    start(tmp_path / "r")
    with pytest.raises(RunFolderError, match="of source text has changed since") as caught:
        start(tmp_path / "r", digest="e" * 64)
    assert "(digest dddddddddddd, now eeeeeeeeeeee)" in str(caught.value)
    assert start(tmp_path / "r", digest="e" * 64, overwrite=True).attempt == 0


def test_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r").write_text("")
    with pytest.raises(RunFolderError, match=r"is a file; choose another run\.name or run\.dir"):
        check_folder(tmp_path / "r", NODE, overwrite=False)


def test_run_without_its_config_is_refused_with_a_way_out(tmp_path: Path) -> None:
    start(tmp_path / "r")
    (tmp_path / "r" / "config.yaml").unlink()
    with pytest.raises(RunFolderError, match=r"start over with run\.overwrite=true"):
        check_folder(tmp_path / "r", NODE, overwrite=False)


def test_starting_over_that_was_killed_is_finished_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = start(tmp_path / "r")
    first.checkpoints.mkdir()
    first.journal.write_text("old")

    def die(path: Path) -> None:
        raise KeyboardInterrupt(path)

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            start(tmp_path / "r", overwrite=True)
    second = start(tmp_path / "r")
    assert second.run_id != first.run_id
    assert not second.checkpoints.exists()
    assert not second.journal.exists()


def test_checkpoints_that_belong_to_no_run_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "r" / "checkpoints" / "step-00000000-clock-00000000").mkdir(parents=True)
    with pytest.raises(RunFolderError, match=r"but no run\.json that says whose they are"):
        check_folder(tmp_path / "r", NODE, overwrite=True)


@pytest.mark.parametrize("damage", ["a: [", "- 1", ""])
def test_damaged_config_is_refused_with_a_way_out(tmp_path: Path, damage: str) -> None:
    start(tmp_path / "r")
    (tmp_path / "r" / "config.yaml").write_text(damage)
    with pytest.raises(RunFolderError):
        check_folder(tmp_path / "r", NODE, overwrite=False)


def test_folder_in_use_is_refused_and_says_by_whom(tmp_path: Path) -> None:
    first, second = FolderLock(tmp_path / "r"), FolderLock(tmp_path / "r")
    first.acquire()
    with pytest.raises(RunFolderError, match=rf"in use by process {os.getpid()} on "):
        second.acquire()
    first.close()
    second.acquire()
    second.close()


def test_lock_survives_starting_over(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path / "r")
    lock.acquire()
    start(tmp_path / "r")
    start(tmp_path / "r", overwrite=True)
    with pytest.raises(RunFolderError, match="in use"):
        FolderLock(tmp_path / "r").acquire()
    lock.close()


def test_settings_that_may_change_are_said_when_a_run_is_taken_up(tmp_path: Path) -> None:
    start(tmp_path / "r")
    longer = {**NODE, "run": {**NODE["run"], "steps": NODE["run"].get("steps", 0) + 7}}
    folder = start(tmp_path / "r", longer)
    folder.take_up(longer)
    assert len(folder.changes) == 1 and folder.changes[0].startswith("run.steps: the folder has")
    assert start(tmp_path / "r", longer).changes == ()


def test_a_source_may_be_added_and_none_may_go_or_change(tmp_path: Path) -> None:
    def begin(digests: dict[str, str]) -> RunFolder:
        return open_folder(tmp_path / "r", "r", NODE, overwrite=False, data_digests=digests)

    begin({"web": "a" * 64})
    begin({"web": "a" * 64, "code": "b" * 64}).take_up(NODE)
    with pytest.raises(RunFolderError, match="the corpus of source code has changed"):
        begin({"web": "a" * 64, "code": "c" * 64})
    with pytest.raises(RunFolderError, match=r"source code .*, now gone"):
        begin({"web": "a" * 64})


def test_another_version_of_the_order_is_refused(tmp_path: Path) -> None:
    start(tmp_path / "r")
    path = tmp_path / "r" / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "order_version": 0}))
    with pytest.raises(RunFolderError, match="begun with version 0 of the order of samples"):
        start(tmp_path / "r")


def test_a_start_that_is_refused_leaves_config_and_corpora_as_they_were(tmp_path: Path) -> None:
    start(tmp_path / "r")
    longer = {**NODE, "run": {**NODE["run"], "steps": 7}}
    added = {"text": "d" * 64, "math": "e" * 64}
    path = tmp_path / "r"
    folder = open_folder(path, "r", longer, overwrite=False, data_digests=added)
    assert start(path).changes == (), "what was not taken up is not there"
    folder.take_up(longer)
    identity = json.loads((path / "run.json").read_text())
    assert identity["data_digests"] == added and identity["attempts"] == 3
