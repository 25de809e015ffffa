"""An elastic launch (`--nnodes=MIN:MAX`) that could not take a host back, said at the start.

torchrun 2.13 shares its rendezvous store with the ranks by default, and hands out the address of a
group that is gone when a host joins again: both sides then wait until they give up.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

VARIABLE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"


def warning(command: Sequence[str], environment: Mapping[str, str]) -> str | None:
    """Return what to say of a launch, None if nothing; `command`: that of torchrun's agent."""
    if "TORCHELASTIC_RUN_ID" not in environment or environment.get(VARIABLE) == "1":
        return None
    text = " ".join(command)
    given = re.search(r"--nnodes[= ](\S+)", text)
    nodes = given[1] if given else environment.get("PET_NNODES", "")
    if not re.fullmatch(r"\d+:\d+", nodes) or len(set(nodes.split(":"))) == 1:
        return None
    return (
        f"--nnodes={nodes}, but {VARIABLE}=1 is not set for torchrun: a host that is lost and "
        "comes back will not be taken in; set it on all hosts before torchrun starts"
    )


def agent_command() -> list[str]:
    """Return the command line of the process that started this one; empty if unknown."""
    try:
        return Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")
    except OSError:
        return []
