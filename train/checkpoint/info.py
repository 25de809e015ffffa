"""What is known of a checkpoint: `CheckpointInfo`, its health, and its files' digests."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from train.errors import CorruptCheckpointError

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
