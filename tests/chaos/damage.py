"""What disks and kills leave: cut and changed files, folders half renamed, torn lines, no room."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MANIFEST = "manifest.json"
TORN_LINE = b'{"step": 21, "cursor": 3'


def whole(checkpoints: list[Path]) -> list[Path]:
    """Return the checkpoints that have a manifest, in the same order."""
    return [path for path in checkpoints if (path / MANIFEST).exists()]


def is_good(checkpoint: Path) -> bool:
    """Return True if the run calls it good."""
    health = json.loads((checkpoint / "health.json").read_text())["health"]
    return bool(health == "good")


def largest_file(checkpoint: Path) -> Path:
    """Return the largest file: a shard of weights and moments."""
    return max((path for path in checkpoint.rglob("*") if path.is_file()), key=_size)


def _size(path: Path) -> int:
    return path.stat().st_size


def truncate_shard(checkpoint: Path) -> str:
    shard = largest_file(checkpoint)
    os.truncate(shard, _size(shard) // 2)
    return shard.name


def flip_byte(checkpoint: Path) -> str:
    """Change one bit in the middle of the largest file; its size stays."""
    shard = largest_file(checkpoint)
    with shard.open("r+b") as file:
        file.seek(_size(shard) // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x10]))
    return shard.name


def remove_manifest(checkpoint: Path) -> str:
    (checkpoint / MANIFEST).unlink()
    return MANIFEST


def half_rename(checkpoint: Path) -> str:
    """Leave both halves of a rename that a file system did not do as one.

    Under the final name there is a folder with some of the files; the rest is under the old one.
    """
    temporary = checkpoint.parent / f".saving-{checkpoint.name}"
    checkpoint.rename(temporary)
    checkpoint.mkdir()
    shard = largest_file(temporary)
    shutil.move(shard, checkpoint / shard.name)
    return checkpoint.name


def tear_line(file: Path) -> None:
    """Add the beginning of a line, as a kill in the middle of a write does."""
    with file.open("ab") as lines:
        lines.write(TORN_LINE)


def fill_disk(ballast: Path, *, left_bytes: int) -> None:
    """Fill the disk that `ballast` lies on, but for `left_bytes`."""
    free = shutil.disk_usage(ballast.parent).free
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(4096, free - left_bytes))


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """Mount a tmpfs of that size. Raises: OSError if that is not allowed here."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
