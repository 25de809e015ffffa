"""The run folder `runs/<name>/`: made once, shared by all ranks, resumed only by its own config.

config.yaml      the resolved configuration        journal.jsonl   recovery, append-only
run.json         name, id, attempts, data digest   metrics.jsonl   one line a step
checkpoints/     one folder each                   events.jsonl    the timeline
incidents/       the evidence of each              control/        what operators ask for
train.log        what rank 0 logged                summary.json, report.html at the end
configs/         what config.yaml was before a change, up to which start
outcome.json     how the last attempts ended      hangs/          what ranks did when one hung
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import yaml
from omegaconf import OmegaConf

from train.config import allowed_changes, differences
from train.data.order import ORDER_VERSION
from train.durable import fsync_folder, write_atomically, write_json
from train.errors import RunFolderError

logger = logging.getLogger(__name__)

_RUN_FILE = "run.json"
_LOCK_FILE = ".lock"
CONFIGS = "configs"
_IDENTITY_KEYS = {"name", "run_id", "data_digests", "order_version", "attempts"}
# What starting over removes: what a run writes, and nothing else that may lie in the folder.
_OWNED = (
    "checkpoints",
    "journal.jsonl",
    "incidents",
    "control",
    "metrics.jsonl",
    "events.jsonl",
    "summary.json",
    "report.html",
    "train.log",
    "outcome.json",
    "hangs",
    "swanlog",
    "wandb",
    "config.yaml",
    CONFIGS,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFolder:
    """An open run folder; `attempt` counts the starts of this run, from 0.

    `changes`: one line a setting that differs from the last start and changes what is learnt.
    """

    path: Path
    run_id: str
    attempt: int
    changes: tuple[str, ...] = ()
    data_digests: Mapping[str, str] = field(default_factory=dict)

    def take_up(self, node: Mapping[str, Any]) -> None:
        """Make the present config and corpora those of the run. Called on rank 0 alone.

        A config that was another one is kept, for whoever asks what an earlier start did.
        """
        path, text = self.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(dict(node)))
        old = path.read_text()
        if old != text:
            (self.path / CONFIGS).mkdir(exist_ok=True)
            write_atomically(self.path / CONFIGS / f"until-{self.attempt:06d}.yaml", old)
        write_atomically(path, text)
        known = {**_read_identity(self.path), "data_digests": dict(self.data_digests)}
        write_json(self.path / _RUN_FILE, known)

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints lie."""
        return self.path / "checkpoints"

    @property
    def journal(self) -> Path:
        """The recovery journal."""
        return self.path / "journal.jsonl"

    @property
    def metrics(self) -> Path:
        """One line a step."""
        return self.path / "metrics.jsonl"

    @property
    def incidents(self) -> Path:
        """The evidence of each incident."""
        return self.path / "incidents"

    @property
    def control(self) -> Path:
        """Requests of operators, and the answers."""
        return self.path / "control"


class FolderLock:
    """Keeps two runs out of one folder, a rank that outlived its launcher among them.

    The kernel frees it when the process ends, however it ends. Used on rank 0 alone.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None

    def acquire(self) -> None:
        """Take the lock, making the folder if need be.

        Raises: RunFolderError, naming the process that holds it.
        """
        self._path.mkdir(parents=True, exist_ok=True)
        file = (self._path / _LOCK_FILE).open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise RunFolderError(
                [
                    f"{self._path} is in use by {holder}; wait for it, end it, or use another "
                    "run.name"
                ]
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        self._file = file

    def close(self) -> None:
        """Free the lock, if it was taken."""
        if self._file is not None:
            self._file.close()


def launch_id() -> str:
    """Return what the launcher calls this launch; empty if there was no launcher."""
    job, step = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_STEP_ID")
    if job and step:
        return f"{job}.{step}"
    value = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return "" if value == "none" else value


def will_overwrite(path: Path, *, overwrite: bool) -> bool:
    """Return True if what is in the folder will be removed.

    A restart within the launch that made the folder resumes it, whatever the flag says: otherwise
    each elastic restart or requeue would throw the run away.
    """
    if not (path / _RUN_FILE).exists():
        return False
    if _read_identity(path).get("is_being_removed"):
        return True  # starting over was cut short: it is finished first
    if not overwrite:
        return False
    for variable in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"):
        if int(os.environ.get(variable) or "0") > 0:
            return False
    made_by = _read_identity(path).get("launch_id", "")
    return not made_by or made_by != launch_id()


def check_folder(path: Path, node: Mapping[str, Any], *, overwrite: bool) -> None:
    """Refuse a folder that belongs to another config. Reads alone; called before any process group.

    Raises: RunFolderError with one line a key that differs.
    """
    if path.exists() and not path.is_dir():
        raise RunFolderError([f"run.name: {path} is a file; choose another run.name or run.dir"])
    if not (path / _RUN_FILE).exists():
        if any(path.glob("checkpoints/step-*")) or (path / "journal.jsonl").exists():
            raise RunFolderError(
                [
                    f"{path} has checkpoints or a journal, but no {_RUN_FILE} that says whose they "
                    "are; bring it back, move them away, or use another run.name"
                ]
            )
        return
    if will_overwrite(path, overwrite=overwrite):
        return
    try:
        saved = OmegaConf.to_container(OmegaConf.load(path / "config.yaml"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        saved = str(error)
    if not isinstance(saved, Mapping):
        raise RunFolderError(
            [
                f"{path}/config.yaml is damaged ({saved}); bring it back, or start over with "
                "run.overwrite=true"
            ]
        )
    lines = differences({str(key): value for key, value in saved.items()}, node)
    if lines:
        ways_out = (
            f"{path} holds a run with another config: use another run.name, or run.overwrite=true "
            "to start over"
        )
        raise RunFolderError([ways_out, *lines])


def open_folder(
    path: Path,
    name: str,
    node: Mapping[str, Any],
    *,
    overwrite: bool,
    data_digests: Mapping[str, str],
) -> RunFolder:
    """Make or take up the folder. Called on rank 0 alone, after `check_folder`.

    `data_digests`: of each source's tokens. A source may be added on the way, none may change.
    Raises: RunFolderError if the text of a source has changed since the run began.
    """
    if will_overwrite(path, overwrite=overwrite):
        _clear(path)
    path.mkdir(parents=True, exist_ok=True)
    run_file = path / _RUN_FILE
    changes: tuple[str, ...] = ()
    if run_file.exists():
        known = _read_identity(path)
        _refuse_other_data(path, known, data_digests)
        known["attempts"] += 1
        saved = OmegaConf.to_container(OmegaConf.load(path / "config.yaml"))
        changes = tuple(_changes(saved, node))
    else:
        created = datetime.now(UTC).isoformat(timespec="milliseconds")
        identity = f"{launch_id()}/{path.resolve()}/{created}"
        known = {
            "name": name,
            "run_id": hashlib.sha256(identity.encode()).hexdigest()[:16],
            "created_utc": created,
            "data_digests": dict(data_digests),
            "order_version": ORDER_VERSION,
            "attempts": 1,
        }
        write_atomically(path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(dict(node))))
    known["launch_id"] = launch_id()
    write_json(run_file, known)
    return RunFolder(
        path=path,
        run_id=known["run_id"],
        attempt=int(known["attempts"]) - 1,
        changes=changes,
        data_digests=dict(data_digests),
    )


def _refuse_other_data(
    path: Path, known: Mapping[str, Any], data_digests: Mapping[str, str]
) -> None:
    problems = [
        f"the corpus of source {source} has changed since {path} was begun (digest {digest[:12]}, "
        f"now {data_digests.get(source, 'gone')[:12]}): the order of samples would not be the "
        "same; bring the text back, or set run.overwrite=true"
        for source, digest in known["data_digests"].items()
        if data_digests.get(source) != digest
    ]
    if known["order_version"] != ORDER_VERSION:
        problems.append(
            f"{path} was begun with version {known['order_version']} of the order of samples, and "
            f"this is version {ORDER_VERSION}: go on with the Trimtab that began it, or set "
            "run.overwrite=true"
        )
    if problems:
        raise RunFolderError(problems)


def _changes(saved: object, node: Mapping[str, Any]) -> list[str]:
    """Return, and say, which settings differ that may differ but change what is learnt."""
    if not isinstance(saved, Mapping):
        return []
    lines = allowed_changes({str(key): value for key, value in saved.items()}, node)
    for line in lines:
        logger.warning("taken up with another setting: %s", line)
    return lines


def _read_identity(path: Path) -> dict[str, Any]:
    try:
        identity: dict[str, Any] = json.loads((path / _RUN_FILE).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise RunFolderError(
            [f"{path}/{_RUN_FILE} is damaged ({error}); bring it back, or remove {path}"]
        ) from error
    if not isinstance(identity, dict) or not identity.keys() >= _IDENTITY_KEYS:
        raise RunFolderError(
            [f"{path}/{_RUN_FILE} is damaged (not an identity); bring it back, or remove {path}"]
        )
    return identity


def _clear(path: Path) -> None:
    """Remove a run, such that a kill at any point leaves either all of it or a marked remainder."""
    write_json(path / _RUN_FILE, {**_read_identity(path), "is_being_removed": True})
    for name in _OWNED:
        entry = path / name
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)
    fsync_folder(path)
    (path / _RUN_FILE).unlink()
    fsync_folder(path)
