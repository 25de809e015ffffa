"""Where a run runs, as far as it may matter for an incident: versions, hosts, devices, revision.

Refuses environment variables and arguments, which may hold secrets. Nothing here is a collective.
"""

from __future__ import annotations

import os
import platform
import socket
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

_SOURCE = Path(__file__).resolve().parents[2]


def versions() -> dict[str, str]:
    """Return the versions of what computes; DeepSpeed's only where it is in use."""
    system = os.uname()  # `platform.platform` would start a process
    found = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "platform": f"{system.sysname}-{system.release}-{system.machine}",
    }
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    deepspeed = sys.modules.get("deepspeed")
    if deepspeed is not None:
        found["deepspeed"] = str(getattr(deepspeed, "__version__", "unknown"))
    return found


def host_name() -> str:
    """Return the name of this host."""
    return socket.gethostname()


def device_name(device: torch.device) -> str:
    """Return what the device of this rank calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.uname().machine} CPU"


def git_revision(source: Path = _SOURCE) -> str | None:
    """Return the commit that the source tree is at, or None if it is in no repository."""
    try:
        folder = source / ".git"
        if folder.is_file():  # a second work tree
            folder = source / folder.read_text().partition("gitdir:")[2].strip()
        head = (folder / "HEAD").read_text().strip()
        if not head.startswith("ref:"):
            return head
        name = head.partition("ref:")[2].strip()
        common = folder
        if (folder / "commondir").exists():
            common = folder / (folder / "commondir").read_text().strip()
        if (common / name).exists():
            return (common / name).read_text().strip()
        packed = (common / "packed-refs").read_text().splitlines()
        return next((line.split()[0] for line in packed if line.endswith(f" {name}")), None)
    except (OSError, UnicodeDecodeError):
        return None


def ranks_by_value(values: Sequence[str]) -> dict[str, str]:
    """Return which ranks have each value, as `{"node-1": "0-7", "node-2": "8-15"}`."""
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    return {value: _as_ranges(found) for value, found in ranks.items()}


def _as_ranges(numbers: Sequence[int]) -> str:
    breaks = [right for left, right in pairwise(numbers) if right != left + 1]
    starts = [numbers[0], *breaks]
    stops = [*(numbers[numbers.index(start) - 1] for start in breaks), numbers[-1]]
    return ",".join(
        str(start) if start == stop else f"{start}-{stop}"
        for start, stop in zip(starts, stops, strict=True)
    )
