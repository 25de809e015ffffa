"""`trimtab convert`: what needs it, and the processes that would do it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoint_folders import add_checkpoint
from click.testing import Result
from omegaconf import OmegaConf
from typer.testing import CliRunner

from launch import cli
from launch.compose import compose
from launch.convert import command, convert_entry
from launch.errors import LaunchError
from monitoring.checkpoints import read_checkpoint


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Return the commands that would have been started."""
    commands: list[list[str]] = []

    def run(arguments: list[str], **others: Any) -> subprocess.CompletedProcess[str]:
        commands.append(arguments)
        return subprocess.CompletedProcess(arguments, 0)

    monkeypatch.setattr("launch.convert.subprocess.run", run)
    return commands


def trimtab(*arguments: object) -> Result:
    texts = [str(argument) for argument in arguments]
    return CliRunner().invoke(cli.build_app(), texts, catch_exceptions=False)


def make_run(folder: Path) -> Path:
    folder.mkdir()
    cluster = OmegaConf.to_container(compose([]).cluster)
    OmegaConf.save(OmegaConf.create({"cluster": cluster}), folder / "config.yaml")
    return folder


def test_what_all_engines_read_is_left_as_it_is(tmp_path: Path, started: list[list[str]]) -> None:
    run = make_run(tmp_path / "run")
    add_checkpoint(run, 10)
    add_checkpoint(run, 20)
    output = trimtab("convert", run).output
    assert "2 of 2 checkpoints need no conversion: single, ddp, fsdp and deepspeed" in output
    assert started == []


def test_own_files_go_through_as_many_ranks_as_wrote_them_a_format_at_a_time(
    tmp_path: Path, started: list[list[str]]
) -> None:
    run = make_run(tmp_path / "run")
    zero3 = add_checkpoint(run, 10, format_="deepspeed-zero3-8-ranks", num_ranks=8)
    zero1 = [
        add_checkpoint(run, step, format_="deepspeed-zero1-4-ranks", num_ranks=4)
        for step in (20, 30)
    ]
    add_checkpoint(run, 40, "quarantined", format_="deepspeed-zero1-4-ranks")
    add_checkpoint(run, 50)
    output = trimtab("convert", run, "--output", tmp_path / "new").output
    assert "1 of 4 checkpoints need no conversion" in output
    first, second = started
    assert "--nproc-per-node=4" in first
    assert [argument for argument in first if "step-" in argument] == [str(path) for path in zero1]
    assert "--nproc-per-node=8" in second
    assert str(zero3) in second
    assert second[-4:] == ["--config", str(run / "config.yaml"), "--output", str(tmp_path / "new")]


def test_one_checkpoint_is_converted_where_it_lies(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    path = add_checkpoint(run, 10, format_="deepspeed-zero2-2-ranks")
    assert command([read_checkpoint(path)], None) == [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *(str(convert_entry()), str(path)),
        *("--config", str(run / "config.yaml"), "--output", str(run / "checkpoints")),
    ]
    assert convert_entry().is_file()


def test_failure_of_a_rank_is_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run")
    add_checkpoint(run, 10, format_="deepspeed-zero2-2-ranks")
    failed: Any = subprocess.CompletedProcess([], 2)
    monkeypatch.setattr("launch.convert.subprocess.run", lambda *arguments, **others: failed)
    assert trimtab("convert", run).exit_code == 2


def test_checkpoint_without_its_run_is_refused(tmp_path: Path) -> None:
    path = add_checkpoint(tmp_path / "lost", 10, format_="deepspeed-zero2-2-ranks")
    with pytest.raises(LaunchError, match=r"config\.yaml is not there"):
        trimtab("convert", path)


def test_folder_without_any_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    add_checkpoint(run, 10, "quarantined")
    with pytest.raises(LaunchError, match="no checkpoint that could be converted"):
        trimtab("convert", run)
