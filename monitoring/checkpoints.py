"""The checkpoints of a run folder, as plain files: what each says of itself, and whether it is so.

Owns the digest of a manifest and the reading of manifests from outside of a run. Refuses to load or
change anything. Safe while a run is training: what its retention removes meanwhile is gone, not
wrong. Called by the checkpoint store (the digest), `launch.checkpoints` and `launch.prune`.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHECKPOINTS_FOLDER = "checkpoints"
MANIFEST_FILE = "manifest.json"
HEALTH_FILE = "health.json"
_NAME = re.compile(r"^step-(\d{8,})-clock-(\d{8,})$")
# A third thread gains nothing on one disk, and the host may be training.
_NUM_THREADS = 2
_CHUNK_BYTES = 1 << 22

Progress = Callable[[int], None]
"""Told the bytes that were read since it was last told; from several threads."""


class DamagedCheckpointError(Exception):
    """What a checkpoint's folder says of itself cannot be read, or contradicts itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredCheckpoint:
    """One checkpoint on disk. `files`: of each its `bytes` and `sha256`."""

    name: str
    path: Path
    step: int
    clock: int
    cursor: int
    health: str
    reason: str
    num_bytes: int
    num_ranks: int
    format: str
    saved_unix_seconds: float
    files: Mapping[str, Mapping[str, object]]
    is_sealed: bool
    """Whether its manifest has a digest of its own."""


def manifest_digest(manifest: Mapping[str, object]) -> str:
    """Return the SHA-256 of a manifest without its own `digest`, in canonical JSON."""
    rest = {key: value for key, value in manifest.items() if key != "digest"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def sealed(manifest: Mapping[str, object]) -> dict[str, object]:
    """Return a manifest with its own digest."""
    return {**manifest, "digest": manifest_digest(manifest)}


def is_intact(manifest: Mapping[str, object]) -> bool:
    """True unless a manifest contradicts its digest; one without (of an old run) does not."""
    return manifest.get("digest") in (None, manifest_digest(manifest))


def is_checkpoint_name(name: str) -> bool:
    """True for the name of a whole checkpoint."""
    return _NAME.match(name) is not None


def read_checkpoints(folder: Path) -> tuple[list[StoredCheckpoint], dict[str, str]]:
    """Return the checkpoints in `folder`, oldest clock first, and what is wrong with the others.

    Raises: OSError if `folder` cannot be listed.
    """
    found, unreadable = [], {}
    for path in folder.iterdir():
        if not is_checkpoint_name(path.name):
            continue
        try:
            found.append(read_checkpoint(path))
        except DamagedCheckpointError as error:
            if path.exists():  # else the run has removed it just now
                unreadable[path.name] = str(error)
    return sorted(found, key=lambda one: one.clock), dict(sorted(unreadable.items()))


def read_checkpoint(path: Path) -> StoredCheckpoint:
    """Return what a checkpoint's folder says of itself.

    Raises: DamagedCheckpointError naming the file that is damaged or missing.
    """
    match = _NAME.match(path.name)
    if match is None:
        raise DamagedCheckpointError(
            f"{path} is not a checkpoint: its name is not step-...-clock-..."
        )
    manifest, health = _read_object(path / MANIFEST_FILE), _read_object(path / HEALTH_FILE)
    if not is_intact(manifest):
        raise DamagedCheckpointError(f"{path / MANIFEST_FILE} does not match its own digest")
    try:
        files: Mapping[str, Mapping[str, Any]] = manifest["files"]
        return StoredCheckpoint(
            name=path.name,
            path=path,
            step=int(match[1]),
            clock=int(match[2]),
            cursor=int(manifest["cursor"]),
            health=str(health["health"]),
            reason=str(health.get("reason", "")),
            num_bytes=sum(int(entry["bytes"]) for entry in files.values()),
            num_ranks=int(manifest["world_size"]),
            format=str(manifest["format"]),
            saved_unix_seconds=float(manifest.get("saved_unix_seconds", 0.0)),
            files=files,
            is_sealed="digest" in manifest,
        )
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise DamagedCheckpointError(f"{path / MANIFEST_FILE} is damaged ({error!r})") from error


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise DamagedCheckpointError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpointError(f"{path} is damaged ({error})") from error
    if not isinstance(value, dict):
        raise DamagedCheckpointError(f"{path} is damaged: it holds no object")
    return value


def size_problems(checkpoint: StoredCheckpoint) -> list[str]:
    """Return one line a file that is missing or of another size. Reads no content."""
    return [
        line
        for name, entry in sorted(checkpoint.files.items())
        if (line := _size_problem(checkpoint.path / name, entry))
    ]


def digest_problems(
    checkpoint: StoredCheckpoint, progress: Progress = lambda num_bytes: None
) -> list[str]:
    """Return one line a file whose content is not what its manifest says. Reads every byte."""

    def check(item: tuple[str, Mapping[str, object]]) -> str | None:
        path, entry = checkpoint.path / item[0], item[1]
        if problem := _size_problem(path, entry):
            return problem
        try:
            digest = _digest(path, progress)
        except OSError as error:
            return f"{path} cannot be read ({error.strerror})"
        return None if digest == entry["sha256"] else f"{path} does not match its SHA-256"

    with ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="verify") as threads:
        return [line for line in threads.map(check, sorted(checkpoint.files.items())) if line]


def _size_problem(path: Path, entry: Mapping[str, object]) -> str | None:
    try:
        size = path.stat().st_size
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    if size != entry["bytes"]:
        return f"{path} has {size} bytes, its manifest says {entry['bytes']}"
    return None


def _digest(path: Path, progress: Progress) -> str:
    digest = hashlib.sha256()
    for chunk in _chunks(path):
        digest.update(chunk)
        progress(len(chunk))
    return digest.hexdigest()


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk


def age_text(seconds: float) -> str:
    """Return `40 s`, `12 min`, `3.4 h` or `2.1 d`."""
    if seconds < 60:
        return f"{max(0.0, seconds):.0f} s"
    for unit, length, limit in (("min", 60, 3600), ("h", 3600, 86400)):
        if seconds < limit:
            return f"{seconds / length:.{0 if unit == 'min' else 1}f} {unit}"
    return f"{seconds / 86400:.1f} d"


def size_text(num_bytes: float) -> str:
    """Return `512 B`, `1.5 MB`, `2.4 TB`: powers of 1000, three digits."""
    value = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5 or unit == "TB":
            break
        value /= 1000
    digits = 0 if unit == "B" or value >= 99.95 else 1
    return f"{value:.{digits}f} {unit}"


def age_seconds(checkpoint: StoredCheckpoint) -> float:
    """Return how long ago it was saved, by this host's clock."""
    return time.time() - checkpoint.saved_unix_seconds
