"""What users get wrong and what disks do, through the real command line: exit code and message."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import (
    ROOT,
    TINY,
    Fault,
    assert_same_tensors,
    checkpoints,
    command,
    environment,
    health,
    losses_by_clock,
    metrics,
    run,
    summary,
)

REFUSED = {
    "unknown key": (
        ["optim.learning_rate=1"],
        ["1 problem in the configuration", "optim.learning_rate=1: unknown key"],
    ),
    "misspelt key": (["+optim.weigth_decay=1"], ["unknown key; did you mean optim.weight_decay?"]),
    "unknown top-level key": (["+typo=3"], ["typo=3: unknown key"]),
    "wrong type": (["run.steps=many"], ["run.steps='many': should be a valid integer"]),
    "out of range": (["checkpoint.keep_good=1"], ["checkpoint.keep_good=1: should be"]),
    "unknown option of a group": (["engine=fsdpp"], ["fsdpp", "auto", "fsdp"]),
    "unknown experiment": (["exp=falcon_lik"], ["falcon_lik", "falcon_like"]),
    "bad syntax": (["optim.lr=[1"], ["no viable alternative at input '[1'"]),
    "bad amount": (["recovery.skip=lots"], ['such as "1B tokens", "300 batches"']),
    "several unknown and wrong": (
        ["optim.lrr=1", "run.steps=many", "model.layers=2"],
        ["3 problems", "optim.lrr=1", "did you mean optim.lr?", "run.steps", "model.layers=2"],
    ),
    "several impossible": (
        [
            "model.num_heads=3",
            "schedule.warmup_steps=1000",
            "engine=deepspeed",
            "recovery.veto=outlier",
        ],
        [
            "3 problems",
            "model.num_heads=3 does not divide model.hidden_size=32",
            "schedule.warmup_steps=1000 is longer than the run",
            "recovery.veto=outlier is impossible with engine=deepspeed",
        ],
    ),
    "missing file": (["data.paths=[/no/such]"], ["data.paths: /no/such does not exist"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_config_is_refused_with_exit_code_2(case: str, tmp_path: Path) -> None:
    arguments, expected = REFUSED[case]
    result = command([*TINY, *arguments], tmp_path / "run")
    assert result.exit_code == 2, result.output
    for text in expected:
        assert text in result.output
    assert "Traceback" not in result.output
    assert result.output.startswith("trimtab: "), "nothing but the message"
    assert not (tmp_path / "run").exists(), "nothing was made"


def test_bad_config_is_refused_before_torch_is_loaded(tmp_path: Path) -> None:
    """So no process group, device or tensor can have been made."""
    code = (
        "import sys; from train.main import main; code = main();"
        "print('torch' in sys.modules); sys.exit(code)"
    )
    arguments = [*TINY, "model.num_heads=3", f"run.dir={tmp_path}", "run.name=run"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (2, "False"), done.stderr


def test_bad_config_is_said_once_for_all_ranks(tmp_path: Path) -> None:
    result = command([*TINY, "schedule.batch_samples=9"], tmp_path / "run", num_ranks=2)
    assert result.exit_code != 0
    assert result.output.count("schedule.batch_samples=9 does not divide among 2 ranks") == 1


def _write(folder: Path, text: str) -> list[str]:
    (folder / "text.txt").write_text(text)
    return [f"data.paths=[{folder}/text.txt]", f"data.cache_dir={folder}/cache"]


BAD_TEXT: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "empty": (lambda folder: _write(folder, ""), "the corpus is empty: 1 files hold no text"),
    "too little": (lambda folder: _write(folder, "few words"), "nothing is left to train on"),
    "no text files": (
        lambda folder: [f"data.paths=[{folder}]", f"data.cache_dir={folder}/cache"],
        "holds no text files",
    ),
    # Opening it works, even for root; reading it is an I/O error.
    "unreadable": (
        lambda folder: [
            "data.paths=[/proc/self/mem]",
            f"data.cache_dir={folder}/cache",
        ],
        "/proc/self/mem cannot be read (Input/output error); fix its permissions",
    ),
}


@pytest.mark.parametrize("case", BAD_TEXT)
def test_bad_text_is_refused_before_any_process_group_is_made(case: str, tmp_path: Path) -> None:
    make, expected = BAD_TEXT[case]
    result = run([*TINY, *make(tmp_path)], tmp_path / "run", fault=Fault(is_lonely=True))
    result.expect(2)
    assert expected in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "run").exists(), "nothing was made"


def test_bad_text_gives_exit_code_2_on_the_command_line(tmp_path: Path) -> None:
    make, expected = BAD_TEXT["empty"]
    result = command([*TINY, *make(tmp_path)], tmp_path / "run").expect(2)
    assert f"trimtab: {expected}" in result.output


def test_folder_of_another_config_is_refused_with_the_keys_that_differ(
    tmp_path: Path, clean_single: Any
) -> None:
    folder = tmp_path / "clean-single"
    shutil.copytree(clean_single.folder, folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    changed = ["optim.lr=2e-2", "run.seed=50", "checkpoint.interval_steps=10", "run.steps=50"]
    result = command([*TINY, *changed], folder).expect(2)
    assert "holds a run with another config: use another run.name" in result.output
    assert "optim.lr: the folder has 0.01, now 0.02" in result.output
    assert "run.seed: the folder has 20, now 50" in result.output
    assert "run.steps:" not in result.output, "a run may be lengthened"
    assert "interval_steps:" not in result.output, "it does not change what is learnt"
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def _flip_a_byte(checkpoint: Path) -> None:
    path = checkpoint / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _truncate(checkpoint: Path) -> None:
    os.truncate(checkpoint / "__0_0.distcp", 1000)


def _remove_a_file(checkpoint: Path) -> None:
    (checkpoint / "__0_0.distcp").unlink()


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped byte": (_flip_a_byte, "does not match its SHA-256"),
    "truncated file": (_truncate, "has 1000 bytes, its manifest says"),
    "missing file": (_remove_a_file, "cannot be read (No such file or directory)"),
    "missing manifest": (
        lambda checkpoint: (checkpoint / "manifest.json").unlink(),
        "is not a readable checkpoint and is left alone",
    ),
    "broken health": (
        lambda checkpoint: (checkpoint / "health.json").write_text("{"),
        "is not a readable checkpoint and is left alone",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_corrupt_latest_checkpoint_falls_back_to_the_one_before_and_says_so(
    damage: str, tmp_path: Path, clean_single: Any
) -> None:
    do, expected = DAMAGES[damage]
    folder = tmp_path / "clean-single"
    shutil.copytree(clean_single.folder, folder)
    do(checkpoints(folder)[-1])
    result = run(TINY, folder).expect(0)
    assert expected in result.output
    assert checkpoints(folder)[-1].name in result.output
    assert "resumed at step 35" in result.output
    assert [r["step"] for r in metrics(folder) if r["attempt"] == 1] == list(range(36, 41))
    assert losses_by_clock(folder) == losses_by_clock(clean_single.folder)
    assert health(checkpoints(folder)[-1])["health"] == "candidate"
    assert_same_tensors(checkpoints(folder)[-1], checkpoints(clean_single.folder)[-1])


def test_corrupt_checkpoint_on_two_ranks_falls_back_on_both(tmp_path: Path, clean_ddp: Any) -> None:
    folder = tmp_path / "clean-ddp"
    shutil.copytree(clean_ddp.folder, folder)
    path = checkpoints(folder)[-1] / "__1_0.distcp"
    os.truncate(path, 1000)
    result = run(TINY, folder, num_ranks=2).expect(0)
    assert "resumed at step 35" in result.output
    assert losses_by_clock(folder) == losses_by_clock(clean_ddp.folder)


def test_run_without_any_readable_checkpoint_says_what_to_do(
    tmp_path: Path, clean_single: Any
) -> None:
    folder = tmp_path / "clean-single"
    shutil.copytree(clean_single.folder, folder)
    for checkpoint in checkpoints(folder):
        _truncate(checkpoint)
    result = run(TINY, folder).expect(1)
    assert "can be read; bring one back from a copy, or start over with run.overwrite=true" in (
        result.output
    )


def test_disk_that_is_full_of_checkpoints_costs_the_save_and_nothing_else(
    small_disk: Callable[[Path, str], None], tmp_path: Path, clean_single: Any
) -> None:
    folder = tmp_path / "run"
    small_disk(folder / "checkpoints", "1000k")  # room for one, of about 720 kB
    result = run(TINY, folder).expect(1)
    assert "the checkpoint of step 5 could not be written" in result.output
    assert "older checkpoints are untouched" in result.output
    assert "the run is complete, but its last checkpoint could not be written" in result.output
    (only,) = checkpoints(folder)
    assert only.name == "step-00000000-clock-00000000"
    assert not list((folder / "checkpoints").glob(".*")), "what was written was removed"
    assert losses_by_clock(folder) == losses_by_clock(clean_single.folder)
    assert summary(folder)["finished"] is True
    again = run(TINY, folder).expect(1)
    assert "resumed at step 0" in again.output, "the old checkpoint can be loaded"


def test_two_ranks_on_a_full_disk_go_on_together(
    small_disk: Callable[[Path, str], None], tmp_path: Path, clean_ddp: Any
) -> None:
    folder = tmp_path / "run"
    small_disk(folder / "checkpoints", "1000k")
    result = run(TINY, folder, num_ranks=2).expect(1)
    assert "the checkpoint of step 5 could not be written" in result.output
    assert losses_by_clock(folder) == losses_by_clock(clean_ddp.folder)


def test_disk_that_is_full_for_a_while_does_not_end_a_run(
    small_disk: Callable[[Path, str], None], tmp_path: Path, clean_single: Any
) -> None:
    """The whole run folder is on it: metrics, log and the marks of good checkpoints too."""
    disk = tmp_path / "disk"
    small_disk(disk, "6m")  # room for seven checkpoints
    folder = disk / "run"
    # The checkpoint of step 15 becomes good, and that of step 20 is due, while the disk is full.
    arguments = [*TINY, "checkpoint.keep_good=2", "checkpoint.is_async=false"]
    result = run(arguments, folder, fault=Fault(full_disk=range(18, 32))).expect(0)
    assert "the checkpoint of step 20 could not be written" in result.output
    names = [path.name for path in checkpoints(folder)]
    assert names[-1] == "step-00000040-clock-00000040"
    losses, expected = losses_by_clock(folder), losses_by_clock(clean_single.folder)
    assert losses.items() <= expected.items()
    assert set(range(1, 18)) | set(range(33, 41)) <= losses.keys(), "what could be written was"
    assert_same_tensors(checkpoints(folder)[-1], checkpoints(clean_single.folder)[-1])


def test_disk_that_stays_full_keeps_the_older_checkpoints(
    small_disk: Callable[[Path, str], None], tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    small_disk(disk, "6m")
    result = run(TINY, disk / "run", fault=Fault(full_disk=range(18, 1000)))
    assert "could not be written" in result.output
    (disk / "ballast").unlink()
    again = run(TINY, disk / "run")
    # The one of step 15 may be in flight when the disk is full.
    assert "resumed at step 15" in again.output or "resumed at step 10" in again.output


def test_run_whose_checkpoints_cannot_be_read_does_not_begin_again(
    tmp_path: Path, clean_single: Any
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(clean_single.folder, folder)
    manifests = list((folder / "checkpoints").glob("*/manifest.json"))
    for manifest in manifests:
        manifest.unlink()
    result = run(TINY, folder).expect(1)
    assert "none of the checkpoints in" in result.output
    assert "bring one back, or start over with run.overwrite=true" in result.output
    assert len(list((folder / "checkpoints").glob("step-*"))) == len(manifests)
