"""The work folder inside an output: what is half done, and who may go on with it.

Owns the lock and the rule for taking work up: the same inputs and the same settings. Refuses two at
once, and to overwrite unasked. Called by `job`.
"""

from __future__ import annotations

import fcntl
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from train.data.prepare.finish import BAD_RECORDS_FILE, MANIFEST_FILE
from train.data.prepare.inputs import is_remote
from train.data.prepare.plan import Task, plan_tasks
from train.data.prepare.recipe import Recipe
from train.data.prepare.sources import PLAN_FILE, WORK_FOLDER, SourceFile
from train.data.prepare.tokenizer import (
    MAX_TRAINING_CHARACTERS,
    TOKENIZER_FILE,
    TokenizerChoice,
    fingerprint_of,
)
from train.durable import write_json
from train.errors import DataError

logger = logging.getLogger(__name__)

_LOCK_FILE = "lock"
_MAX_NAMED_FILES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is to be prepared, and where.

    `num_processes`: 1 does all in this process. `has_own_threads`: whether the tokenizer then may
    use all cores.
    """

    folder: Path
    sources: Sequence[SourceFile]
    recipe: Recipe
    tokenizer: TokenizerChoice
    num_processes: int = 1
    has_own_threads: bool = False
    max_bad_records: int = 0
    overwrite: bool = False

    @property
    def work(self) -> Path:
        """The folder of what is half done."""
        return self.folder / WORK_FOLDER


class OutputError(DataError):
    """The output could not be written."""


class StaleWorkError(DataError):
    """What is half done belongs to other inputs or other settings."""


def is_half_done(folder: Path) -> bool:
    """Return whether a call for `folder` would have something to take up."""
    return (folder / WORK_FOLDER / PLAN_FILE).exists()


def settings_of(job: Job) -> dict[str, Any]:
    """Return what determines the tokens, besides the text: JSON as it will be read back."""
    choice = job.tokenizer
    tokenizer: dict[str, Any] = {"kind": choice.kind, "separator": choice.separator}
    if choice.kind == "bpe":
        tokenizer["vocab_size"] = choice.vocab_size
        tokenizer["max_training_characters"] = MAX_TRAINING_CHARACTERS
    elif choice.kind == "file":
        tokenizer["fingerprint"] = fingerprint_of(str(choice.path), choice.option)
    return {**job.recipe.as_settings(), "tokenizer": tokenizer}


@contextmanager
def locked(job: Job) -> Iterator[None]:
    """Hold the output; the lock is freed when the process ends, however it ends.

    Raises: DataError if another process holds it.
    """
    job.work.mkdir(parents=True, exist_ok=True)
    path = job.work / _LOCK_FILE
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"another process is preparing {job.folder}; wait for it, or give another --output"
            ) from error
        try:
            yield
        finally:
            # Nothing was begun: leave the folder as it was.
            if job.work.exists() and [entry.name for entry in job.work.iterdir()] == [_LOCK_FILE]:
                path.unlink()
                job.work.rmdir()


def finished(job: Job, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Return the manifest if the folder holds just this corpus; clear the folder if told to.

    Raises: DataError if it holds anything else.
    """
    manifest_path = job.folder / MANIFEST_FILE
    if job.overwrite:
        clear(job)
        return None
    if manifest_path.exists():
        manifest = read_json(manifest_path)
        files = [source.address for source in job.sources]
        if manifest.get("settings") != settings:
            names = _differences(manifest.get("settings") or {}, settings)
            raise DataError(
                f"{job.folder} holds a corpus that was prepared with other settings "
                f"({', '.join(names)}); give another --output, or --overwrite to start over"
            )
        if manifest.get("files") != files:
            raise DataError(
                f"{job.folder} holds a corpus of other files; give another --output, or "
                "--overwrite to start over"
            )
        _check_sizes(job, manifest)
        _tell_of_newer(job, manifest_path)
        return manifest
    if not (job.work / PLAN_FILE).exists():
        others = sorted(path.name for path in job.folder.iterdir() if path != job.work)
        if others:
            raise DataError(
                f"{job.folder} is not empty ({', '.join(others[:3])}); give a new folder as "
                "--output"
            )
    return None


def _check_sizes(job: Job, manifest: dict[str, Any]) -> None:
    """Raises: DataError if a file has another size than when the corpus was made of it."""
    now = [source.num_bytes for source in job.sources]
    before = manifest.get("files_num_bytes", now)  # earlier versions did not note them
    changed = [
        f"{source.address}: {old:,} bytes then, {source.num_bytes:,} now"
        for source, old in zip(job.sources, before, strict=True)
        if source.num_bytes != old
    ]
    if changed:
        raise DataError(
            f"{job.folder} holds a corpus of {len(changed)} files that changed since "
            f"({'; '.join(changed[:_MAX_NAMED_FILES])}); use --overwrite to start over, or give "
            "another --output"
        )


def _tell_of_newer(job: Job, manifest_path: Path) -> None:
    """Warn of files that were written since. Copies are, too, so they are not refused."""
    finished_ns = manifest_path.stat().st_mtime_ns
    newer = [
        source.address
        for source in job.sources
        if not is_remote(source.address) and int(source.stamp) > finished_ns
    ]
    if newer:
        logger.warning(
            "%s: %d of its files were written since it was finished, at the same size (%s); use "
            "--overwrite if their text changed",
            job.folder,
            len(newer),
            ", ".join(newer[:_MAX_NAMED_FILES]),
        )


def clear(job: Job) -> None:
    """Remove a corpus and what is half done; the manifest first, so that none looks whole.

    Raises: DataError if the folder holds files that are no corpus.
    """
    wanted = {MANIFEST_FILE, TOKENIZER_FILE, BAD_RECORDS_FILE, WORK_FOLDER}
    begins = ("train-", "validation-", *(f".{name}." for name in wanted))
    ours = [
        path for path in job.folder.iterdir() if path.name in wanted or path.name.startswith(begins)
    ]
    others = sorted(path.name for path in job.folder.iterdir() if path not in ours)
    if others:
        raise DataError(
            f"{job.folder} has files that are no part of a corpus ({', '.join(others[:3])}); "
            "give a new folder as --output"
        )
    (job.folder / MANIFEST_FILE).unlink(missing_ok=True)
    for path in ours:
        if path != job.work:
            path.unlink(missing_ok=True)
    _empty_work(job)


def _empty_work(job: Job) -> None:
    """Remove what is half done, records before what they speak of and the plan last.

    So a kill in between leaves what this plan can still be finished from.
    """

    def place(path: Path) -> tuple[bool, bool]:
        return path.name == PLAN_FILE, path.suffix != ".json"

    for path in sorted(job.work.iterdir(), key=place):
        if path.name != _LOCK_FILE:
            path.unlink()


def take_up(job: Job, settings: dict[str, Any]) -> list[Task]:
    """Return the plan, the one that is there if the inputs and settings are those of now.

    Raises: StaleWorkError if they are not, and a task is done.
    """
    tasks = plan_tasks(job.sources, job.recipe)
    plan = {
        "settings": settings,
        "sources": [source.as_json() for source in job.sources],
        "tasks": [list(astuple(task)) for task in tasks],
    }
    path = job.work / PLAN_FILE
    if not path.exists():
        write_json(path, plan)
        return tasks
    for leftover in job.work.glob("*.tmp"):  # of a task that was cut short
        leftover.unlink(missing_ok=True)
    there = read_json(path)
    is_same = (there["settings"], there["sources"]) == (settings, plan["sources"])
    if not is_same and not any(job.work.glob("task-*.json")):  # nothing would be lost
        _empty_work(job)
        write_json(path, plan)
        return tasks
    if there["settings"] != settings:
        differences = ", ".join(_differences(there["settings"], settings))
        raise StaleWorkError(
            f"{job.folder} is half done with other settings ({differences}); use those, or "
            "--overwrite to start over"
        )
    if there["sources"] != plan["sources"]:
        before = {source[0]: source for source in there["sources"]}
        now = {source[0]: source for source in plan["sources"]}
        names = sorted(n for n in before.keys() | now.keys() if before.get(n) != now.get(n))
        raise StaleWorkError(
            f"{job.folder} is half done, and since then {len(names)} of its files came, went or "
            f"changed ({', '.join(names[:3])}); use --overwrite to start over"
        )
    return tasks


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return sorted(
        f"{name}: {before.get(name)!r} there, {now.get(name)!r} here"
        for name in before.keys() | now.keys()
        if before.get(name) != now.get(name)
    )


def read_json(path: Path) -> dict[str, Any]:
    """Return a record of the work folder. Raises: DataError if it is damaged."""
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(
            f"{path} is damaged ({error}); use --overwrite to start over, or delete {path.parent}"
        ) from error
    return value
