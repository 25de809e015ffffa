"""How an attempt ended, in `outcome.json` of the run folder and in a file for the launcher.

torchrun returns 1 whatever its workers return, so a launcher that must decide whether to start a
job again reads this instead. While an attempt runs, the record says `running`: one that is found so
at the next start died without a word. Written on rank 0, or by the rank that found a hang.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from train.durable import write_json

logger = logging.getLogger(__name__)

OUTCOME_FILE = "outcome.json"
LAUNCHER_VARIABLE = "TRIMTAB_OUTCOME"
"""Environment variable with the path that a launcher reads the outcome from."""

RUNNING, COMPLETED, FAILED, DIED, HANG = "running", "completed", "failed", "died", "hang"
PREEMPTED, INTERRUPTED, CRASH_LOOP = "preempted", "interrupted", "crash_loop"
OUT_OF_MEMORY = "out_of_memory"
REQUEUE_EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: the same command, later, goes on."""

_NUM_REMEMBERED = 20
_TAIL_BYTES = 2**16


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The end of one attempt, or `running`.

    `code`: one word. `time`: Unix seconds. `fingerprint`: equal for failures of the same kind.
    `signature`: of the config and the code that it was started with. `launch`: who started it.
    """

    code: str
    exit_code: int = 0
    attempt: int = 0
    step: int = 0
    time: float = 0.0
    reason: str = ""
    fingerprint: str = ""
    signature: str = ""
    launch: str = ""

    @classmethod
    def from_json(cls, value: object) -> Outcome | None:
        """Return a record of a file, None if it is none."""
        if not isinstance(value, dict) or not isinstance(value.get("code"), str):
            return None
        known = {key: value[key] for key in cls.__slots__ if key in value}
        return cls(**known)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcomes:
    """The last outcome of a run, None if it was never started, and those before, oldest first."""

    last: Outcome | None = None
    previous: tuple[Outcome, ...] = ()

    def ended(self, *, last_step: int) -> list[Outcome]:
        """Return all ends, oldest first; an attempt that still seems to run died at `last_step`."""
        last = self.last
        if last is not None and last.code == RUNNING:
            last = replace(last, code=DIED, exit_code=1, fingerprint=DIED, step=last_step)
        return [*self.previous, *([last] if last is not None else [])]


def read_outcomes(folder: Path) -> Outcomes:
    """Return what a run folder says; a file that is missing or damaged says nothing."""
    try:
        value: Any = json.loads((folder / OUTCOME_FILE).read_text())
        before = [Outcome.from_json(item) for item in value.get("previous", ())]
    except (OSError, ValueError, RecursionError, AttributeError, TypeError):
        return Outcomes()
    previous = tuple(item for item in before if item is not None)
    return Outcomes(last=Outcome.from_json(value), previous=previous)


def last_step_of(metrics: Path) -> int:
    """Return the last step that the metrics know, 0 without one."""
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, metrics.stat().st_size - _TAIL_BYTES))
            lines = file.read().split(b"\n")
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue  # torn, or what an evaluation left
    return 0


def fingerprint(error: BaseException) -> str:
    """Return a text that is equal for failures of the same kind: class and message, no numbers."""
    lines = str(error).strip().splitlines() or [""]
    text = re.sub(r"0x[0-9a-fA-F]+|\d+", "#", lines[0])
    return f"{type(error).__name__}: {text[:200]}"


class OutcomeRecord:
    """`outcome.json` of the present attempt. The first end that is said stands."""

    def __init__(self, folder: Path, start: Outcome, previous: list[Outcome]) -> None:
        self._folder = folder
        self._path = folder / OUTCOME_FILE
        self._start = start
        self._previous = [asdict(item) for item in previous[-_NUM_REMEMBERED:]]

    def begin(self) -> None:
        """Say that the attempt runs. Called on rank 0 alone."""
        self._write(replace(self._start, time=time.time()))

    def end(
        self, code: str, exit_code: int, *, step: int, reason: str = "", fingerprint: str = ""
    ) -> bool:
        """Say how it ended; False if that was said before, or the run has gone on without us.

        A host that was cut off finds out about its end later than the others.
        """
        known = read_outcomes(self._folder).last
        if known is not None and (
            known.attempt > self._start.attempt
            or (known.attempt == self._start.attempt and known.code != RUNNING)
        ):
            return False
        ending = replace(
            self._start,
            code=code,
            exit_code=exit_code,
            step=step,
            time=time.time(),
            reason=reason,
            fingerprint=fingerprint or code,
        )
        self._write(ending)
        return True

    def open_to_restarts(self) -> None:
        """Let this launch start the run again, should torchrun's agent live on to do so."""
        self._start = replace(self._start, launch="")

    def _write(self, outcome: Outcome) -> None:
        try:
            write_json(self._path, {**asdict(outcome), "previous": self._previous})
        except OSError as error:
            logger.warning("%s cannot be written (%s)", self._path, error.strerror)


def tell_launcher(code: str, exit_code: int, reason: str = "") -> None:
    """Write the outcome where the launcher looks for it, if it has named a place."""
    _with_launcher_file(
        lambda path: write_json(path, {"code": code, "exit_code": exit_code, "reason": reason})
    )


def forget_what_the_launcher_was_told() -> None:
    """Remove what an attempt before has told the launcher. Called on rank 0 alone."""
    _with_launcher_file(lambda path: path.unlink(missing_ok=True))


def _with_launcher_file(act: Callable[[Path], None]) -> None:
    path = os.environ.get(LAUNCHER_VARIABLE)
    if path:
        try:
            act(Path(path))
        except OSError as error:
            logger.warning("%s=%s cannot be written (%s)", LAUNCHER_VARIABLE, path, error.strerror)


def is_final_for_this_launch(outcome: Outcome | None) -> bool:
    """Return whether a restart by torchrun must not go on: the run was told to stop, or gave up.

    torchrun starts workers again whatever code they have returned.
    """
    if outcome is None or int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or "0") == 0:
        return False
    from train.run_folder import launch_id  # not for `--help`: it brings the schema with it

    is_ours = bool(outcome.launch) and outcome.launch == launch_id()
    return is_ours and outcome.exit_code in (2, 3, 75, 130) and outcome.code != HANG
