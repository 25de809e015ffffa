"""The seconds of runs by class, as `trimtab goodput` shows them.

Owns the table, its bars and the lines for programs. Refuses to account: `monitoring.goodput` reads
the records. Reads only, so it is safe beside a run in progress. Called by `launch.cli`.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launch.errors import LaunchError
from launch.show import columns

if TYPE_CHECKING:
    from monitoring.goodput import Goodput

ALL_RUNS = "all runs"
_NARROW, _WIDE = 20, 60

Named = tuple[str, "Goodput"]


def read_goodput(run_folders: Sequence[Path]) -> list[Named]:
    """Return name and seconds of each run, and behind several of them their sum.

    Raises:
        LaunchError: a folder is no run's, or cannot be read.
    """
    from monitoring.goodput import goodput_of_run, total
    from monitoring.records import EVENTS_FILE, RUN_FILE, UnreadableRecordsError

    found: list[Named] = []
    for folder in run_folders:
        if not any((folder / name).exists() for name in (RUN_FILE, EVENTS_FILE)):
            raise LaunchError(f"{folder} is no run folder: it has no {RUN_FILE}")
        try:
            found.append((folder.resolve().name, goodput_of_run(folder)))
        except UnreadableRecordsError as error:
            raise LaunchError(str(error)) from error
    if len(found) > 1:
        found.append((ALL_RUNS, total(goodput for _, goodput in found)))
    return found


def show_goodput(found: Sequence[Named], *, width: int) -> str:
    """Return the table of one run with its waterfall; of several, a row a run."""
    if len(found) == 1:
        return _waterfall(*found[0], width=width)
    return _rows(found)


def show_goodput_json(found: Sequence[Named]) -> str:
    """Return one JSON object a line and run: seconds a class, wall time, attempts, goodput."""
    return "\n".join(json.dumps({"run": name, **goodput.as_dict()}) for name, goodput in found)


def write_picture(found: Sequence[Named], output: Path) -> Path:
    """Write the waterfall as a page or an SVG.

    Raises:
        LaunchError: the path has another ending.
        OSError: it cannot be written.
    """
    from monitoring.waterfall import write_waterfall

    try:
        return write_waterfall(found, output)
    except ValueError as error:
        raise LaunchError(f"--output {error}") from error


def _waterfall(name: str, goodput: "Goodput", *, width: int) -> str:
    from monitoring.waterfall import headline

    wall = goodput.wall_seconds
    room = max(_NARROW, min(_WIDE, width - 45))
    rows = [["class", "seconds", "share", ""], ["wall time", f"{wall:,.1f}", "100.0%", "#" * room]]
    left = wall
    for label, seconds, share in goodput.as_table():
        left = max(0.0, left - seconds)
        start, stop = (round(place / (wall or 1.0) * room) for place in (left, left + seconds))
        if seconds > 0 and stop == start:  # a class that took time is seen
            start = min(start, room - 1)
            stop = start + 1
        bar = " " * start + "#" * (stop - start)
        rows.append([label.replace("_", " "), f"{seconds:,.1f}", f"{share:.1%}", bar])
    sizes = [max(len(row[place]) for row in rows) for place in (1, 2)]
    aligned = [[row[0], row[1].rjust(sizes[0]), row[2].rjust(sizes[1]), row[3]] for row in rows]
    return f"{headline(name, goodput)}\n\n{columns(aligned)}"


def _rows(found: Sequence[Named]) -> str:
    """A row a run, shares of its own wall time; classes in which no run spent time are left out."""
    from monitoring.waterfall import duration

    sums = found[-1][1].seconds_by_class()
    names = [name for name, seconds in sums.items() if seconds > 0 and name != "training"]
    headings = ["run", "wall time", "attempts", "training", *(n.replace("_", " ") for n in names)]
    upper = [heading.rpartition(" ")[0] for heading in headings]  # two lines keep it narrow
    rows = [upper, [heading.rpartition(" ")[2] for heading in headings]]
    for run, goodput in found:
        shares = {name: share for name, _, share in goodput.as_table()}
        cells = [f"{shares[name]:.1%}" for name in ("training", *names)]
        rows.append([run, duration(goodput.wall_seconds), str(goodput.num_attempts), *cells])
    sizes = [max(map(len, column)) for column in zip(*rows, strict=True)][1:]
    aligned = [
        [row[0], *(cell.rjust(size) for cell, size in zip(row[1:], sizes, strict=True))]
        for row in rows
    ]
    return columns(aligned)
