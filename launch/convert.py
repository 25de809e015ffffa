"""`trimtab convert`: which checkpoints need it, and the processes that do it.

Owns the choice and the command lines. Nearly all need none: what single, ddp, fsdp and deepspeed
write is read by each of them on any number of ranks. Called by `launch.cli`; the work is done by
`train/convert.py`.
"""

import re
import subprocess
import sys
from enum import StrEnum
from itertools import groupby
from os import environ
from pathlib import Path
from typing import Annotated

import typer

from launch.checkpoints import entries_of
from launch.errors import LaunchError
from launch.replay import environment
from monitoring.checkpoints import StoredCheckpoint
from monitoring.records import CONFIG_FILE

_OWN_FORMAT = re.compile(r"^deepspeed-zero\d-(\d+)-ranks$")


class Target(StrEnum):
    """Engines that can read what is written."""

    SINGLE = "single"
    DDP = "ddp"
    FSDP = "fsdp"
    DEEPSPEED = "deepspeed"


def convert_entry() -> Path:
    """Return the script that each rank of a conversion runs."""
    return Path(__file__).resolve().parent.parent / "train" / "convert.py"


def convert(
    where: Annotated[
        str, typer.Argument(help="A run folder, a name under ./runs, or one checkpoint.")
    ],
    to: Annotated[
        Target | None,
        typer.Option(help="The engine that will read it; the result is the same for all."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="The folder that gets the checkpoints; by default the one they lie in, where the"
            " old ones are put aside as replaced-...",
        ),
    ] = None,
) -> None:
    """Make checkpoints in DeepSpeed's own files readable by all engines, on any number of ranks.

    It takes as many processes as wrote them, and no GPU. All other checkpoints need no conversion.
    """
    entries, damaged = entries_of(where)
    for problem in damaged.values():
        typer.echo(f"left alone: {problem}", err=True)
    wanted = [entry for entry in entries if entry.health != "quarantined"]
    if not wanted:
        raise LaunchError(f"{where} holds no checkpoint that could be converted")
    own = [entry for entry in wanted if _OWN_FORMAT.match(entry.format)]
    if len(own) < len(wanted):
        readers = f"engine={to}" if to else "single, ddp, fsdp and deepspeed"
        typer.echo(
            f"{len(wanted) - len(own)} of {len(wanted)} checkpoints need no conversion: {readers} "
            "can read them, on any number of ranks"
        )
    for form, group in groupby(sorted(own, key=_order), key=lambda entry: entry.format):
        commands = command(list(group), output)
        typer.echo(f"converting from {form}")
        run_folder = own[0].path.parent.parent
        done = subprocess.run(commands, env={**environ, **environment(run_folder)}, check=False)
        if done.returncode:
            raise typer.Exit(done.returncode)


def _order(entry: StoredCheckpoint) -> tuple[str, int]:
    return entry.format, entry.clock


def command(entries: list[StoredCheckpoint], output: Path | None) -> list[str]:
    """Return the command that converts checkpoints of one format.

    Raises: LaunchError if the config of their run is not there.
    """
    folder = entries[0].path.parent
    config = folder.parent / CONFIG_FILE
    if not config.is_file():
        raise LaunchError(
            f"{config} is not there; it says which model {entries[0].path} is of: convert a "
            "checkpoint where its run folder lies"
        )
    match = _OWN_FORMAT.match(entries[0].format)
    assert match is not None, "only DeepSpeed's own files are converted"
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *(f"--nproc-per-node={match[1]}", str(convert_entry())),
        *(str(entry.path) for entry in entries),
        *("--config", str(config), "--output", str(output or folder)),
    ]
