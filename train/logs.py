"""Where log records go: the one place that configures logging.

Rank 0 logs at INFO, others at WARNING; warnings of every rank reach stderr, rank 0's records the
run's `train.log`.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

LOG_FILE = "train.log"


def log_to_console() -> None:
    """Send warnings to stderr, in place of whatever was configured before."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    root.setLevel(logging.INFO if _rank() == "0" else logging.WARNING)
    console = logging.StreamHandler()
    console.setLevel(logging.WARNING)
    console.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    root.addHandler(console)


def log_to_folder(folder: Path) -> None:
    """Send rank 0's records to the run folder too; other ranks do nothing."""
    if _rank() != "0":
        return
    to_file = logging.FileHandler(folder / LOG_FILE)
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(to_file)


def _rank() -> str:
    return os.environ.get("RANK", "0")
