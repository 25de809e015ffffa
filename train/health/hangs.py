"""What a hang leaves behind: whom the others wait for, stacks of all ranks, a line in the timeline.

Owns `hangs/attempt-N/` in the run folder. The verdict is a pure function of the heartbeats.
"""

from __future__ import annotations

import faulthandler
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from monitoring.records import EVENTS_FILE, JsonLinesWriter
from train.durable import write_json
from train.health.heartbeats import Heartbeat
from train.health.pulse import Phase

logger = logging.getLogger(__name__)

# Where a rank is behind within one step: whoever reads data or evaluates is not in the step.
_ORDER = (
    Phase.START,
    Phase.REWIND,
    Phase.DATA,
    Phase.COMPILE,
    Phase.STEP,
    Phase.EVALUATION,
    Phase.SAVE,
    Phase.END,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspects:
    """Ranks that the others wait for, and why; `is_silent`: they cannot end themselves."""

    ranks: tuple[int, ...]
    why: str
    is_silent: bool = False


def suspects(
    before: Mapping[int, Heartbeat], after: Mapping[int, Heartbeat], size: int
) -> Suspects:
    """Return who is to blame, from two readings that lie more than an interval apart.

    A rank whose beats do not go on is stopped, or its host is gone. If all go on, the one that is
    furthest behind is waited for; if none is behind, no one can be named.
    """
    silent = tuple(
        rank
        for rank in range(size)
        if rank not in after or (rank in before and before[rank].count == after[rank].count)
    )
    if silent:
        why = "no sign of life: stopped, or its host is gone"
        return Suspects(ranks=silent, why=why, is_silent=True)
    places = {rank: (beat.step, _ORDER.index(beat.phase)) for rank, beat in after.items()}
    behind = min(places.values())
    ranks = tuple(rank for rank, place in places.items() if place == behind)
    if len(ranks) == size:
        return Suspects(ranks=(), why="all ranks are at the same place; see their stacks")
    return Suspects(ranks=ranks, why="behind all others")


def describe(found: Suspects, beats: Mapping[int, Heartbeat]) -> str:
    """Return the suspects in words: rank, host, process, device, where it is."""
    if not found.ranks:
        return found.why
    names = []
    for rank in found.ranks[:8]:
        beat = beats.get(rank)
        where = (
            f" (process {beat.pid} on {beat.host}, {beat.device}, {beat.phase} of step {beat.step})"
            if beat is not None
            else " (never heard of)"
        )
        names.append(f"rank {rank}{where}")
    more = f" and {len(found.ranks) - 8} more" if len(found.ranks) > 8 else ""
    return f"{', '.join(names)}{more}: {found.why}"


def write_stacks(folder: Path, rank: int) -> None:
    """Write the Python stacks of all threads of this rank, and what NCCL was doing."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"rank-{rank}.txt").open("w", encoding="utf-8") as file:
        file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} rank {rank}\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
    _write_flight_recorder(folder / f"rank-{rank}.nccl.json")


def _write_flight_recorder(path: Path) -> None:
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_nccl_available() and dist.is_initialized()):
        return
    if "nccl" not in str(dist.get_backend_config()):
        return
    with suppress(Exception):  # a private function of torch, and evidence alone
        import torch._C._distributed_c10d as c10d

        path.write_bytes(c10d._dump_nccl_trace_json())  # type: ignore[attr-defined]  # private


def write_hang(
    folder: Path, events: Path, hang: Mapping[str, Any], beats: Sequence[Heartbeat]
) -> None:
    """Write down what was found; what cannot be written is said in the log."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "hang.json", {**hang, "heartbeats": [asdict(beat) for beat in beats]})
        writer = JsonLinesWriter(events / EVENTS_FILE)
        writer.write(hang)
        writer.close()
    except OSError as error:
        logger.warning("%s: the hang cannot be written down (%s)", folder, error)
