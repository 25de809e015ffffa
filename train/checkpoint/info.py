"""What is known of a checkpoint: `CheckpointInfo`, its health, and its files' digests."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from hashlib import sha256
from pathlib import Path

from monitoring.checkpoints import is_intact
from train.data.units import rescale_cursor
from train.errors import CorruptCheckpointError

logger = logging.getLogger(__name__)

NAME = re.compile(r"^step-(\d{8})-clock-(\d{8})$")
MANIFEST = "manifest.json"
HEALTH = "health.json"
STATE = "state.json"


# Threads that digest and verify a rank's files; more of them would starve training hosts.
NUM_FILE_THREADS = 2


class Health(StrEnum):
    """How far a checkpoint is trusted."""

    CANDIDATE = "candidate"
    """Saved; not enough calm steps have followed yet."""
    GOOD = "good"
    """Followed by calm steps: a rewind may go here."""
    QUARANTINED = "quarantined"
    """Never loaded again: made after the onset of a spike, or corrupt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointInfo:
    """One checkpoint; `digest` is that of its manifest."""

    name: str
    path: Path
    step: int
    cursor: int
    clock: int
    num_bytes: int
    digest: str
    world_size: int
    format: str
    health: Health


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_sizes(folder: Path, files: Mapping[str, Mapping[str, object]]) -> None:
    """Compare the sizes in `files`, a part of a manifest, with what lies in `folder`.

    Raises: CorruptCheckpointError naming the file, what was expected and what was found.
    """
    for name, expected in files.items():
        path = folder / name
        try:
            size = path.stat().st_size
        except OSError as error:
            raise CorruptCheckpointError(f"{path} cannot be read ({error.strerror})") from error
        if size != expected["bytes"]:
            raise CorruptCheckpointError(
                f"{path} has {size} bytes, its manifest says {expected['bytes']}"
            )


def verify_digests(folder: Path, files: Mapping[str, Mapping[str, object]]) -> None:
    """Compare the digests in `files` with what lies in `folder`, byte by byte.

    Raises: CorruptCheckpointError naming the file.
    """
    for name, expected in files.items():
        path = folder / name
        try:
            digest = file_digest(path)
        except OSError as error:
            raise CorruptCheckpointError(f"{path} cannot be read ({error.strerror})") from error
        if digest != expected["sha256"]:
            raise CorruptCheckpointError(f"{path} does not match its SHA-256 in the manifest")


def read_info(path: Path, sequence_length: int) -> CheckpointInfo | None:
    """Return what a folder says of itself, or None if it is not a checkpoint.

    `sequence_length`: what its cursor is counted in is mapped to this, unless it is 0.
    """
    match = NAME.match(path.name)
    if match is None:
        return None
    try:
        text = (path / MANIFEST).read_bytes()
        manifest = json.loads(text)
        if not is_intact(manifest):
            raise ValueError(f"{MANIFEST} does not match its own digest")
        old_length = manifest.get("sequence_length") or sequence_length
        health = Health(json.loads((path / HEALTH).read_text())["health"])
        return CheckpointInfo(
            name=path.name,
            path=path,
            step=int(match[1]),
            cursor=_cursor_at_length(int(manifest["cursor"]), old_length, sequence_length),
            clock=int(match[2]),
            num_bytes=sum(entry["bytes"] for entry in manifest["files"].values()),
            digest=sha256(text).hexdigest(),
            world_size=manifest["world_size"],
            format=manifest["format"],
            health=health,
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        logger.warning("%s is not a readable checkpoint and is left alone (%s)", path, error)
        return None


def _cursor_at_length(cursor: int, old: int, new: int) -> int:
    return cursor if new in (0, old) else rescale_cursor(cursor, old, new)
