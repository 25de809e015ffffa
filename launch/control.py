"""The operator's hand: requests in a run's folder, and the run's answers to them.

Owns the request file, what the run's files alone can say about a request, and the wait for an
answer. Refuses what the run would refuse for certain; the rest is the run's to judge.
Called by `launch.cli`. It changes nothing of the run: a request is one new file, and whether a run
holds the folder is asked with a shared lock that is given back at once.
"""

import fcntl
import getpass
import json
import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

from launch.errors import LaunchError
from monitoring.atomic import write_text_atomically

SEEN = "seen"
"""An amount: everything from the target up to where the run stands."""

_AMOUNT = re.compile(r"([\d_]*\.?\d+)\s*([kmbt]?)\s*(tokens|batches|steps|)", re.IGNORECASE)
_MULTIPLES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_MAX_AMOUNT = 10**15
_CHECKPOINT = re.compile(r"step-(\d+)-clock-(\d+)")
_POLL_SECONDS = 0.2
_LOOK_SECONDS = 5.0
_MAX_STEPS_NAMED = 12


class Kind(StrEnum):
    """What an operator can ask for."""

    REWIND = "rewind"
    SKIP = "skip"
    UNSKIP = "unskip"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is asked for; `amount` is `1B tokens`, `300 batches`, `100 steps`, or `seen`."""

    kind: Kind
    to_step: int | None = None
    amount: str | None = None
    incident: int | None = None
    is_far: bool = False
    """Whether a rewind may go much further back than asked, where nothing nearer is left."""


class Liveness(StrEnum):
    """Whether a process holds the run's folder."""

    RUNNING = "running"
    STOPPED = "stopped"
    UNKNOWN = "unknown"
    """It was last held on another host, whose lock may not show here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the run said."""

    is_accepted: bool
    message: str


def read_amount(text: str) -> str:
    """Return an amount as the run reads it; a bare `1B` means tokens.

    Raises:
        LaunchError: it is none, or nothing; the message has the accepted forms.
    """
    forms = 'use an amount such as "1B tokens", "300 batches" or "100 steps"; a bare 1B is tokens'
    match = _AMOUNT.fullmatch(text.strip())
    if match is None or not (match[2] or match[3]):
        raise LaunchError(f"{text!r} is no amount; {forms}")
    value = float(match[1].replace("_", "")) * _MULTIPLES[match[2].lower()]
    if value > _MAX_AMOUNT or round(value) < 1:
        raise LaunchError(
            f"{text!r} is nothing, or more than {_MAX_AMOUNT:,}; {forms}; to go back without a"
            " skip, leave --skip out"
        )
    return f"{match[1]}{match[2]} {match[3].lower() or 'tokens'}"


def liveness(run_folder: Path) -> Liveness:
    """Return whether a run is alive in the folder. Makes no file and keeps no lock."""
    try:
        with (run_folder / ".lock").open(encoding="utf-8", errors="replace") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return Liveness.RUNNING
            fcntl.flock(file, fcntl.LOCK_UN)
            holder = file.read().strip()
    except FileNotFoundError:
        return Liveness.STOPPED
    except OSError:
        return Liveness.UNKNOWN
    host = holder.rpartition(" on ")[2]
    return Liveness.STOPPED if host in ("", socket.gethostname()) else Liveness.UNKNOWN


def check(run_folder: Path, request: Request, alive: Liveness) -> None:
    """Refuse what the run would refuse, as far as its files tell.

    Raises:
        LaunchError: with what was found, and what would be possible.
    """
    if not (run_folder / "run.json").is_file():
        raise LaunchError(f"{run_folder} holds no run.json, so it is no run's folder")
    if request.kind is Kind.REWIND:
        _check_rewind(run_folder, request.to_step or 0, alive)
    if request.kind is Kind.UNSKIP:
        _check_unskip(run_folder, request.incident)
    for path, pending in _pending(run_folder):
        if all(pending.get(key) == value for key, value in _wish(request).items()):
            raise LaunchError(
                f"{path} asks for the same and waits for the run; remove that file to take it back"
            )


def leave(run_folder: Path, request: Request) -> Path:
    """Write the request, whole or not at all, and return its file.

    Raises:
        LaunchError: the folder cannot be written.
    """
    folder = run_folder / "control" / "requests"
    now = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
    path = folder / f"{now}Z-{secrets.token_hex(4)}.json"
    fields = {**_wish(request), "operator": operator(), "unix_seconds": time.time()}
    try:
        for made in (folder.parent, folder):
            if not made.exists():
                made.mkdir()
                # Whoever owns the run takes requests off the list, so has to be able to.
                made.chmod(run_folder.stat().st_mode & 0o7777)
        write_text_atomically(path, json.dumps(fields, indent=2, sort_keys=True) + "\n")
    except OSError as error:
        raise LaunchError(f"{folder} cannot be written: {error.strerror}") from error
    return path


def wait(
    run_folder: Path,
    request_file: Path,
    *,
    seconds: float,
    alive: Liveness,
    tick: Callable[[float], None],
) -> Answer | None:
    """Return the run's answer, or None if none came in time or the run ended.

    `tick` gets the seconds waited, a few times a second.
    """
    started = looked = time.monotonic()
    while True:
        now = time.monotonic()
        found = read_answer(run_folder, request_file)
        if found is not None or not now - started < seconds:
            return found
        if alive is Liveness.RUNNING and now - looked >= _LOOK_SECONDS:
            looked = now
            if liveness(run_folder) is not Liveness.RUNNING:
                return read_answer(run_folder, request_file)
        tick(now - started)
        time.sleep(min(_POLL_SECONDS, max(0.0, started + seconds - now)))


def read_answer(run_folder: Path, request_file: Path) -> Answer | None:
    """Return what the run said to a request, or None if it has not."""
    try:
        fields = json.loads((run_folder / "control" / "answers" / request_file.name).read_text())
        return Answer(is_accepted=fields["is_accepted"] is True, message=str(fields["message"]))
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def operator() -> str:
    """Return `user@host` for the record; never fails."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError, ImportError):  # no entry for this user, as in many containers
        user = f"uid{os.getuid()}"
    return f"{user}@{socket.gethostname()}"


def _wish(request: Request) -> dict[str, object]:
    fields = asdict(request)
    return {**fields, "kind": str(request.kind)}


def _pending(run_folder: Path) -> list[tuple[Path, Mapping[str, object]]]:
    found = []
    for path in sorted((run_folder / "control" / "requests").glob("*.json")):
        fields = _read_object(path)
        if fields:
            found.append((path, fields))
    return found


def _check_rewind(run_folder: Path, to_step: int, alive: Liveness) -> None:
    if to_step < 0:
        raise LaunchError(f"--to {to_step}: a run begins at step 0; use that or a later one")
    if alive is not Liveness.STOPPED:
        return  # it has states in memory, too, which no file tells of
    health = _checkpoints(run_folder)
    good = sorted({step for (_, step), word in health.items() if word == "good"})
    usable = [place for place, word in health.items() if word in ("good", "candidate")]
    if not any(step <= to_step for step in good):
        raise LaunchError(
            f"there is no good checkpoint at or before step {to_step}; {_named(good)}"
        )
    if to_step > max(usable)[1]:
        raise LaunchError(
            f"step {to_step} lies ahead: the run goes on at step {max(usable)[1]}; {_named(good)}"
        )


def _named(steps: Sequence[int]) -> str:
    if not steps:
        return "none of its checkpoints is good yet"
    names = [str(step) for step in steps[-_MAX_STEPS_NAMED:]]
    more = ["..."] if len(steps) > _MAX_STEPS_NAMED else []
    return f"good ones are of steps {', '.join([*more, *names])}"


def _checkpoints(run_folder: Path) -> dict[tuple[int, int], str]:
    """Return the health of each checkpoint by clock and step; what is not whole is left out."""
    found = {}
    for path in (run_folder / "checkpoints").glob("step-*-clock-*"):
        match = _CHECKPOINT.fullmatch(path.name)
        if match is not None and (path / "manifest.json").is_file():
            place = int(match[2]), int(match[1])
            found[place] = str(_read_object(path / "health.json").get("health"))
    return found


def _check_unskip(run_folder: Path, incident: int | None) -> None:
    from launch.incidents import read_incidents

    rows = read_incidents(run_folder).rows
    skipped = [row for row in rows if row["num_skipped_samples"] and row["state"] != "observed"]
    mine = [row for row in skipped if row["incident"] == incident]
    if not mine:
        known = ", ".join(sorted({str(row["incident"]) for row in skipped}, key=int)) or "none"
        is_known = any(row["incident"] == incident for row in rows)
        what = "skipped nothing" if is_known else "is not in the journal"
        raise LaunchError(f"incident {incident} {what}; incidents that skipped: {known}")
    if any(row["state"] == "cut short" for row in mine):
        raise LaunchError(
            f"incident {incident} was cut short, and is finished when the run starts again; ask"
            " then"
        )
    if all(row["state"] == "put back" for row in mine):
        raise LaunchError(f"what incident {incident} skipped is put back already")


def _read_object(path: Path) -> Mapping[str, object]:
    """Return a JSON object, empty if it cannot be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
