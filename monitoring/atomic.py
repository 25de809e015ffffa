"""One way to replace a file so that a reader sees the old one or the whole new one.

Owns write, fsync and rename of small text files. Refuses checkpoints, which have their own format.
Called by the report, the comparison picture and the launcher.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_text_atomically(path: Path, text: str) -> None:
    """Write UTF-8 text beside `path`, fsync it and rename it into place.

    Raises:
        OSError: the folder cannot be written; the file beside is removed again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary_name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(temporary_name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files that only the owner can read; a report is for the whole team.
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
