"""Where things lie: the shipped config, the training entry, and run folders.

Owns the rule for run folders and how a run is found from what a user typed.
Refuses names that are unsafe as a folder or in a job script.
Called by `launch.compose`, `launch.explain` and `launch.cli`.
"""

import difflib
import re
from pathlib import Path

from launch.errors import LaunchError

_RUN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._,=+@-]*")
_RUN_PARENT = re.compile(r"[A-Za-z0-9_./][A-Za-z0-9._/-]*")


def conf_folder() -> Path:
    """Return the config folder that ships beside this package."""
    return Path(__file__).resolve().parent.parent / "conf"


def training_entry() -> Path:
    """Return the script that torchrun starts on each rank."""
    return Path(__file__).resolve().parent.parent / "train" / "main.py"


def run_folder(parent: str, name: str) -> Path:
    """Return the folder of a run; both parts are safe in a job script, whoever reads it.

    Raises:
        LaunchError: a part holds anything but letters, digits, dot, underscore and hyphen.
    """
    if not _RUN_NAME.fullmatch(name):
        raise LaunchError(
            f"run.name={name!r} cannot name a folder; start with a letter, digit or underscore"
            " and use only those, dots and hyphens"
        )
    if not _RUN_PARENT.fullmatch(parent):
        raise LaunchError(
            f"run.dir={parent!r} cannot stand in a job script; use letters, digits, dots,"
            " underscores, hyphens and slashes"
        )
    return Path(parent) / name


def find_run(text: str, runs_folder: Path = Path("runs")) -> Path:
    """Return the run folder that `text` means: a path, or a name under `runs_folder`.

    Raises:
        LaunchError: neither exists; the message names the closest runs.
    """
    for candidate in (Path(text), runs_folder / text):
        if candidate.is_dir():
            return candidate
    known = sorted(p.name for p in runs_folder.iterdir()) if runs_folder.is_dir() else []
    close = difflib.get_close_matches(text, known, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "give the path of a run folder"
    raise LaunchError(f"no run {text!r}: not a folder, and not one under {runs_folder}/; {hint}")
