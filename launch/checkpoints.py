"""`trimtab checkpoints`, `verify` and `prune`: what a run keeps, and whether it is whole.

Owns what they print and the folder's lock while something is changed. Refuses to change anything of
a run that is training: it keeps its checkpoints itself. Reads plain files, so that it works beside
a run, and where no torch is installed. Called by `launch.cli`.
"""

import fcntl
import json
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from launch.control import Liveness, liveness
from launch.errors import LaunchError
from launch.paths import find_run
from launch.show import columns
from monitoring.atomic import write_text_atomically
from monitoring.checkpoints import (
    CHECKPOINTS_FOLDER,
    HEALTH_FILE,
    DamagedCheckpointError,
    StoredCheckpoint,
    age_seconds,
    age_text,
    digest_problems,
    is_checkpoint_name,
    read_checkpoint,
    read_checkpoints,
    size_problems,
    size_text,
)
from monitoring.records import JOURNAL_FILE, UnreadableRecordsError, read_json_lines
from monitoring.retention import Plan, Rules, needed_by_incidents, parse_size, plan, read_rules

Run = Annotated[str, typer.Argument(help="A run folder, or a name under ./runs.")]
Force = Annotated[
    bool,
    typer.Option(
        "--force", help="Even if it cannot be told from this host whether the run is training."
    ),
]
_SECONDS_BETWEEN_TICKS = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalogue:
    """The checkpoints of a run; `decided` is None if it is not known by which rules it keeps."""

    folder: Path
    entries: tuple[StoredCheckpoint, ...]
    damaged: Mapping[str, str]
    rules: Rules | None
    decided: Plan | None


def checkpoints(
    run: Run,
    is_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    has_verify: Annotated[
        bool, typer.Option("--verify", help="Read every byte, instead of comparing sizes.")
    ] = False,
) -> None:
    """List the checkpoints of a run: step, cursor, size, age, health, files, and why it is kept."""
    catalogue = _read(checkpoints_folder(find_run(run)))
    problems = {}
    for entry in catalogue.entries:
        problems[entry.name] = _verified(entry)[0] if has_verify else size_problems(entry)
    rows = [_row(entry, catalogue, problems[entry.name], has_verify) for entry in catalogue.entries]
    if is_json:
        for row in [*rows, *_damaged_rows(catalogue)]:
            typer.echo(json.dumps(row, sort_keys=True))
        return
    typer.echo(_table(rows) if rows else f"no checkpoints in {catalogue.folder}")
    for line in (line for name in problems for line in problems[name]):
        typer.echo(f"wrong: {line}")
    for line in catalogue.damaged.values():
        typer.echo(f"left alone: {line}")
    typer.echo(_sum(catalogue))


def verify(
    where: Annotated[
        list[str], typer.Argument(help="Run folders, names under ./runs, or checkpoints.")
    ],
    has_quarantine: Annotated[
        bool,
        typer.Option("--quarantine", help="Mark what is wrong, so that no run loads it."),
    ] = False,
    force: Force = False,
) -> None:
    """Compare every byte of checkpoints with their digests; exit code 1 if one differs."""
    entries: list[StoredCheckpoint] = []
    wrong: dict[Path, list[str]] = {}
    for text in where:
        found, damaged = entries_of(text)
        entries += found
        wrong |= {path: [problem] for path, problem in damaged.items()}
    for path, lines in wrong.items():
        typer.echo(f"{path.name}  WRONG: {'; '.join(lines)}")
    for entry in entries:
        problems, seconds = _verified(entry)
        if problems and not entry.path.exists():
            typer.echo(f"{entry.name}  gone: the run has removed it meanwhile")
        elif problems:
            wrong[entry.path] = problems
            typer.echo(f"{entry.name}  WRONG: {'; '.join(problems)}")
        else:
            speed = size_text(entry.num_bytes / max(seconds, 1e-3))
            typer.echo(
                f"{entry.name}  ok: {len(entry.files)} files, {size_text(entry.num_bytes)}, "
                f"{speed}/s{'' if entry.is_sealed else '; its manifest has no digest of its own'}"
            )
    if not entries and not wrong:
        raise LaunchError(f"no checkpoints in {', '.join(where)}")
    if wrong and has_quarantine:
        _quarantine(wrong, force=force)
    if wrong:
        raise typer.Exit(1)


def prune(
    run: Run,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would go and why, and remove nothing.")
    ] = False,
    keep_good: Annotated[
        int | None, typer.Option(help="So many of the newest good ones.", min=1)
    ] = None,
    keep_every: Annotated[
        int | None, typer.Option(help="One of so many steps, for good.", min=1)
    ] = None,
    disk_budget: Annotated[
        str | None, typer.Option(help="What all may take: 2TB.", show_default=False)
    ] = None,
    force: Force = False,
) -> None:
    """Remove the checkpoints that a run's rules, or the ones given, do not keep.

    A run does so itself after each save. The last good one, the newest, and what incidents need
    stay, whatever is given.
    """
    folder = checkpoints_folder(find_run(run))
    with nullcontext() if dry_run else _held(folder.parent, force=force):
        catalogue = _read(folder)
        rules = _rules(catalogue, keep_good, keep_every, disk_budget)
        decided = _decide(catalogue, rules)
        sizes = {entry.name: entry.num_bytes for entry in catalogue.entries}
        for name, why in decided.removed.items():
            typer.echo(f"{name}  {size_text(sizes[name])}  {why}")
            if not dry_run:
                # Renamed first: a kill in the middle leaves nothing that looks whole.
                doomed = folder / f".saving-old-{name}"
                (folder / name).rename(doomed)
                shutil.rmtree(doomed)
    if decided.over_budget_bytes:
        typer.echo(
            f"the disk budget of {size_text(rules.budget_bytes or 0)} cannot be met: what must "
            f"stay takes {size_text(decided.over_budget_bytes)} more"
        )
    freed = size_text(sum(sizes[name] for name in decided.removed))
    done = "would go" if dry_run else "removed"
    typer.echo(f"{len(decided.removed)} of {len(sizes)} checkpoints {done}, {freed}")


def _rules(
    catalogue: Catalogue, keep_good: int | None, keep_every: int | None, disk_budget: str | None
) -> Rules:
    """Return the run's rules with what was given in place of its own."""
    rules = catalogue.rules
    if rules is None and keep_good is None:
        raise LaunchError(
            f"{catalogue.folder} does not say by which rules its run keeps checkpoints; start the "
            "run once, or give --keep-good"
        )
    rules = rules or Rules(keep_good=1, keep_incidents=10**9)
    if keep_good is not None:
        rules = replace(rules, keep_good=keep_good, keep_steps=0, reach_steps=0)
    if keep_every is not None:
        rules = replace(rules, keep_every_steps=keep_every)
    if disk_budget is not None:
        try:
            rules = replace(rules, budget_bytes=parse_size(disk_budget))
        except ValueError as error:
            raise LaunchError(f"--disk-budget={disk_budget}: {error}") from error
    return rules


def _read(folder: Path) -> Catalogue:
    entries, damaged = read_checkpoints(folder)
    catalogue = Catalogue(
        folder=folder,
        entries=tuple(entries),
        damaged=damaged,
        rules=read_rules(folder),
        decided=None,
    )
    if catalogue.rules is None:
        return catalogue
    return replace(catalogue, decided=_decide(catalogue, catalogue.rules))


def _decide(catalogue: Catalogue, rules: Rules) -> Plan:
    try:
        journal = read_json_lines(catalogue.folder.parent / JOURNAL_FILE).records
    except UnreadableRecordsError as error:
        raise LaunchError(str(error)) from error
    needed = needed_by_incidents(journal, num_incidents=rules.keep_incidents)
    return plan(catalogue.entries, rules, needed=needed)


def checkpoints_folder(folder: Path) -> Path:
    """Return the folder of checkpoints of a run, or the folder itself if they lie in it."""
    inside = folder / CHECKPOINTS_FOLDER
    if inside.is_dir():
        return inside
    if any(is_checkpoint_name(path.name) for path in folder.iterdir()):
        return folder
    raise LaunchError(f"{folder} holds no {CHECKPOINTS_FOLDER}: it is no run folder, or a new one")


def entries_of(text: str) -> tuple[list[StoredCheckpoint], dict[Path, str]]:
    """Return the checkpoints that `text` means, and what is wrong with those without manifest."""
    path = Path(text)
    if is_checkpoint_name(path.resolve().name) and path.is_dir():
        try:
            return [read_checkpoint(path.resolve())], {}
        except DamagedCheckpointError as error:
            return [], {path.resolve(): str(error)}
    folder = checkpoints_folder(find_run(text))
    found, damaged = read_checkpoints(folder)
    return found, {folder / name: problem for name, problem in damaged.items()}


def _verified(entry: StoredCheckpoint) -> tuple[list[str], float]:
    """Return what is wrong and the seconds it took; on a terminal, a line that counts."""
    lock, is_shown = threading.Lock(), sys.stderr.isatty()
    started = last = time.perf_counter()
    num_read = 0

    def tick(num_bytes: int) -> None:
        nonlocal num_read, last
        with lock:
            num_read += num_bytes
            now = time.perf_counter()
            if not is_shown or now - last < _SECONDS_BETWEEN_TICKS:
                return
            last = now
            share = num_read / max(1, entry.num_bytes)
            speed = size_text(num_read / (now - started))
            typer.echo(f"\r{entry.name}  {share:.0%}, {speed}/s   ", nl=False, err=True)

    problems = digest_problems(entry, tick)
    if is_shown:
        typer.echo("\r\033[K", nl=False, err=True)
    return problems, time.perf_counter() - started


def _quarantine(wrong: Mapping[Path, Sequence[str]], *, force: bool) -> None:
    for path, lines in wrong.items():
        if not path.exists():
            continue
        with _held(path.parent.parent, force=force):
            record = {"health": "quarantined", "reason": f"corrupt: {'; '.join(lines)}"}
            text = json.dumps(record, indent=2, sort_keys=True) + "\n"
            write_text_atomically(path / HEALTH_FILE, text)
        typer.echo(f"{path.name}  quarantined")


@contextmanager
def _held(run_folder: Path, *, force: bool) -> Iterator[None]:
    """Keep runs out of the folder.

    Raises: LaunchError if one is training there, or may be.
    """
    if liveness(run_folder) is Liveness.UNKNOWN and not force:
        raise LaunchError(
            f"whether {run_folder} is training cannot be told from this host, and it was last "
            "held on another; ask there, or use --force if it is not"
        )
    lock = run_folder / ".lock"
    if not lock.exists():  # no run's folder, or a run of which nobody is left
        yield
        return
    with lock.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LaunchError(
                f"{run_folder} is training, and keeps its checkpoints itself; wait for it, or end "
                "it first"
            ) from error
        yield


def _row(
    entry: StoredCheckpoint, catalogue: Catalogue, problems: Sequence[str], has_verify: bool
) -> dict[str, object]:
    decided = catalogue.decided
    right = "digests fit" if has_verify else "sizes fit"
    return {
        "name": entry.name,
        "step": entry.step,
        "clock": entry.clock,
        "cursor": entry.cursor,
        "bytes": entry.num_bytes,
        "age_seconds": round(age_seconds(entry), 1),
        "health": entry.health,
        "reason": entry.reason,
        "format": entry.format,
        "ranks": entry.num_ranks,
        "files": right if not problems else f"{len(problems)} wrong",
        "kept": None if decided is None else list(decided.kept.get(entry.name, ())),
        "goes": None if decided is None else decided.removed.get(entry.name),
    }


def _damaged_rows(catalogue: Catalogue) -> list[dict[str, object]]:
    return [
        {"name": name, "health": "unreadable", "reason": problem}
        for name, problem in catalogue.damaged.items()
    ]


def _table(rows: Sequence[Mapping[str, object]]) -> str:
    heads = ["step", "cursor", "size", "age", "health", "saved as", "files", "kept as", "name"]
    lines = [_cells(row) for row in rows]
    if all(row["kept"] is None for row in rows):
        place = heads.index("kept as")
        for line in (heads, *lines):
            del line[place]
    return columns([heads, *lines])


def _cells(row: Mapping[str, object]) -> list[str]:
    kept, goes = row["kept"], row["goes"]
    why = ", ".join(map(str, kept)) if isinstance(kept, list) else ""
    ranks = row["ranks"]
    return [
        str(row["step"]),
        str(row["cursor"]),
        size_text(float(str(row["bytes"]))),
        age_text(float(str(row["age_seconds"]))),
        str(row["health"]),
        f"{row['format']}, {ranks} rank{'' if ranks == 1 else 's'}",
        str(row["files"]),
        why or f"goes: {goes}",
        str(row["name"]),
    ]


def _sum(catalogue: Catalogue) -> str:
    total = sum(entry.num_bytes for entry in catalogue.entries)
    free = shutil.disk_usage(catalogue.folder).free
    count = len(catalogue.entries)
    text = (
        f"{count} checkpoint{'' if count == 1 else 's'}, {size_text(total)}; {size_text(free)} free"
    )
    budget = catalogue.rules.budget_bytes if catalogue.rules else None
    return text if budget is None else f"{text}; budget {size_text(budget)}"
