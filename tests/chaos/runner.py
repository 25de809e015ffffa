"""A scene: one run of the real command, what was done to it, and how long it took to get over it.

A scenario strikes at a known step, which it knows from the run's own `metrics.jsonl`. Everything
is timed from outside, by when it was seen (every 20 ms), never by the clock of the run.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .processes import Launch, Place, Recipe, end_all, ranks, send
from .samples import Account, account, losses, read_records
from .state import digest

if TYPE_CHECKING:
    from .hosts import Hosts

POLL_SECONDS = 0.02
RANKS_SECONDS = 0.1
ORPHAN_SECONDS = 20.0
MAX_COMMANDS = 6
LIMIT_SECONDS = 300.0
_SPOKEN = re.compile(r"^(?:WARNING|ERROR|trimtab): ?(.*)$", re.MULTILINE)
_REACTIONS = ("hang", "checkpoint_failed", "preempted", "stop")


class NotRecoveredError(Exception):
    """The run did not get over the fault; the message says how it ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A run of the same command that nobody disturbed."""

    digest: str
    losses: dict[int, float]
    sizes: dict[int, int]
    cursor: int
    wall_seconds: float


@dataclass(slots=True, kw_only=True)
class Result:
    """One row of the table. Seconds are None where there was nothing to measure.

    `problems`: what should be otherwise; without one, the run got over the fault.
    """

    name: str
    done: str
    engine: str
    happened: str = ""
    detect_seconds: float | None = None
    recover_seconds: float | None = None
    steps_lost: int | None = None
    samples: dict[str, int] | None = None
    is_bit_equal: bool | None = None
    wall_seconds: float = 0.0
    skipped: str = ""
    problems: list[str] = field(default_factory=list)

    @property
    def is_recovered(self) -> bool:
        return not self.skipped and not self.problems

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Follower:
    """Reads what is added to a file of JSON lines."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset, self._rest = path, 0, b""

    def read(self) -> list[dict[str, Any]]:
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                added = file.read()
        except FileNotFoundError:
            return []
        self._offset += len(added)
        *lines, self._rest = (self._rest + added).split(b"\n")
        found = []
        for line in lines:
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found


class Scene:
    """One run and what happens to it. A scenario calls `reach`, `strike`, what it does, `finish`.

    `places`: how to start a command on each host, by its name; one host by default. `hosts`: what
    can befall them.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        *,
        places: Mapping[str, Place] | None = None,
        environment: Mapping[str, str] | None = None,
        hosts: Hosts | None = None,
        limit_seconds: float = LIMIT_SECONDS,
    ) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        self.recipe, self.folder, self.hosts = recipe, folder, hosts
        self.mark = f"{folder.name}-{time.time_ns()}"
        self.log = folder.parent / f"{folder.name}.output"
        self.log.unlink(missing_ok=True)
        self.launches: dict[str, Launch] = {}
        self.num_commands = 0
        self.metrics: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self.ranks: dict[int, int] = {}
        self.notes: list[str] = []
        self.problems: list[str] = []
        self.detected: float | None = None
        self.struck: float | None = None
        self.step_struck = 0
        self._places = dict(places or {"": Place()})
        self._environment = dict(environment or {})
        self._arrivals: list[float] = []
        self.relieved = 0.0
        self._num_metrics_struck = 0
        self._ranks_struck: set[int] = set()
        self._shows_in_words = False
        self._log_struck = 0
        self._followers = [Follower(folder / f"{name}.jsonl") for name in ("metrics", "events")]
        self._ranks_due = 0.0
        self._deadline = time.monotonic() + limit_seconds

    # What a scenario does.

    def start(self, place: str | None = None) -> None:
        """Start the command, on all hosts or on one."""
        for name in self._places if place is None else (place,):
            self.launches[name] = Launch(
                recipe=self.recipe,
                folder=self.folder,
                mark=self.mark,
                log=self.log,
                place=self._places[name],
                environment=self._environment,
            )
        self.num_commands += 1

    def reach(self, step: int) -> None:
        """Return when the run has come to `step`."""
        self.until(lambda: self.step >= step, f"step {step}")

    def until(self, is_it: Callable[[], bool], what: str) -> None:
        """Return when `is_it`; a run that ends before has not been struck as it should."""
        while True:
            self.poll()
            if is_it():
                return
            if all(launch.exit_code is not None for launch in self.launches.values()):
                raise NotRecoveredError(f"ended before {what}: {self.last_words()}")
            self._check_deadline(what)
            time.sleep(POLL_SECONDS)

    def wait(self, seconds: float) -> None:
        """Watch for a while, or until the run ends."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.poll()
            if all(launch.exit_code is not None for launch in self.launches.values()):
                return
            time.sleep(POLL_SECONDS)

    def strike(self, *, shows_in_words: bool = False) -> None:
        """Note the moment of the fault: call it right before.

        `shows_in_words`: that the run has ended or begun says nothing of it being noticed.
        """
        self.poll(is_thorough=True)
        self._shows_in_words = shows_in_words
        self._ranks_struck = set(self.ranks.values())
        self._log_struck = len(self._log_text())
        self.step_struck = self.step
        self._num_metrics_struck = len(self.metrics)
        self.struck = self.relieved = time.monotonic()

    def relieve(self) -> None:
        """Note that the fault is over: getting over it counts from here."""
        self.relieved = time.monotonic()

    def kill(self, *, rank: int | None = None, with_launcher: bool = False) -> None:
        """SIGKILL to one rank or to all of them; with their launcher, until nothing lives."""
        if with_launcher:
            self.close()
        else:
            send(signal.SIGKILL, *([self.ranks[rank]] if rank is not None else self.ranks.values()))

    def await_ends(self, seconds: float = ORPHAN_SECONDS) -> None:
        """Return when nothing of the run lives; what outlives its launcher is a problem."""
        until = time.monotonic() + seconds
        while (alive := ranks(self.mark, self.launch)) and time.monotonic() < until:
            time.sleep(POLL_SECONDS)
        if alive:
            self.problems.append(f"ranks {sorted(alive)} outlived their launcher {seconds:.0f} s")
            end_all(self.mark)

    def finish(self) -> None:
        """Watch to the end; a command that fails is started again, as a scheduler would."""
        while True:
            self.poll()
            is_complete = self.is_complete
            for name, launch in self.launches.items():
                code = launch.exit_code
                if code in (None, 0) or (is_complete and len(self.launches) > 1):
                    continue
                if self.num_commands >= MAX_COMMANDS:
                    raise NotRecoveredError(f"exit code {code} again: {self.last_words()}")
                if len(self.launches) == 1:
                    self.await_ends()
                self.poll(is_thorough=True)
                if code > 0:
                    self.notes.append(f"exit code {code}")
                self.start(name)
                break
            codes = [launch.exit_code for launch in self.launches.values()]
            if set(codes) == {0} or (0 in codes and self.is_complete):
                break  # a host that comes late to a run that is complete is not waited for
            self._check_deadline("its end")
            time.sleep(POLL_SECONDS)
        self.poll(is_thorough=True)
        if not self.is_complete:
            raise NotRecoveredError(f"ended without a summary: {self.last_words()}")

    def close(self) -> None:
        """End whatever still runs."""
        end_all(self.mark)
        for launch in self.launches.values():
            launch.process.wait(timeout=10)

    # What is seen.

    @property
    def launch(self) -> Launch:
        return next(iter(self.launches.values()))

    @property
    def step(self) -> int:
        """The last step that the run has reported."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def checkpoints(self) -> list[Path]:
        """Folders that are named as checkpoints, oldest first."""
        return sorted((self.folder / "checkpoints").glob("step-*"), key=lambda path: path.name[-8:])

    @property
    def is_complete(self) -> bool:
        try:
            return bool(json.loads((self.folder / "summary.json").read_text())["finished"])
        except (OSError, ValueError, KeyError):
            return False

    def poll(self, *, is_thorough: bool = False) -> None:
        """Take in what is new."""
        now = time.monotonic()
        added, events = (follower.read() for follower in self._followers)
        self.metrics += added
        self._arrivals += [now] * len(added)
        self.events += events
        if now >= self._ranks_due or is_thorough:
            self.ranks = ranks(self.mark, self.launch)
            self._ranks_due = now + RANKS_SECONDS
        if self.struck is None:
            return
        if self.detected is None and self._is_noticed(events):
            self.detected = now

    def _is_noticed(self, events: list[dict[str, Any]]) -> bool:
        if self.spoken() or any(event["kind"] in _REACTIONS for event in events):
            return True
        has_failed = any(launch.exit_code not in (None, 0) for launch in self.launches.values())
        is_new = bool(set(self.ranks.values()) - self._ranks_struck)
        return (has_failed or is_new) and not self._shows_in_words

    def _log_text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def spoken(self) -> list[str]:
        """Return what the run has said in warnings and errors since the fault."""
        return _SPOKEN.findall(self._log_text()[self._log_struck :])

    def last_words(self) -> str:
        text = self._log_text()
        said = _SPOKEN.findall(text)
        return (said or [line for line in text.splitlines() if line.strip()] or ["nothing"])[-1]

    def _check_deadline(self, what: str) -> None:
        if time.monotonic() > self._deadline:
            raise NotRecoveredError(f"no sign of {what} in time: {self.last_words()}")

    def median_step_seconds(self, since: float, until: float) -> float | None:
        """Return how far reports lay apart between two moments, None if there were too few."""
        inside = [moment for moment in self._arrivals if since <= moment <= until]
        return (inside[-1] - inside[0]) / (len(inside) - 1) if len(inside) > 2 else None

    # What came out.

    def starts(self) -> list[int]:
        """Return the step from which each attempt began, in order."""
        return [int(event["step"]) for event in self.events if event["kind"] == "run_start"]

    def steps_lost(self) -> int:
        """Return how many reported steps were taken again, over all restarts."""
        lost, reached = 0, 0
        starts = {e["attempt"]: e["step"] for e in self.events if e["kind"] == "run_start"}
        by_attempt: dict[int, int] = {}
        for record in self.metrics:
            by_attempt[record["attempt"]] = record["step"]
        for attempt, start in sorted(starts.items()):
            lost += max(0, reached - start)
            reached = by_attempt.get(attempt, start)
        return lost

    def recover_seconds(self) -> float | None:
        """Return the time to the first new step: of the last start, if there was one since.

        A step is new if no start before has reported it.
        """
        if self.struck is None:
            return None
        last = self.metrics[-1]["attempt"]
        before = [record for record in self.metrics if record["attempt"] < last]
        first = self._num_metrics_struck
        is_restarted = any(record["attempt"] < last for record in self.metrics[first - 1 :])
        reached = before[-1]["step"] if is_restarted else 0
        for record, arrival in zip(self.metrics[first:], self._arrivals[first:], strict=True):
            is_new = record["attempt"] == last and record["step"] > reached
            if is_new and arrival > self.relieved:
                return arrival - self.relieved
        return None

    def account(self, reference: Reference) -> Account:
        metrics = read_records(self.folder / "metrics.jsonl")
        journal = read_records(self.folder / "journal.jsonl")
        return account(metrics, journal, reference.sizes)


def make_reference(recipe: Recipe, folder: Path) -> Reference:
    """Run the command undisturbed."""
    scene = Scene(recipe, folder)
    started = time.monotonic()
    try:
        scene.start()
        scene.finish()
    finally:
        scene.close()
    if scene.num_commands != 1:
        raise NotRecoveredError(f"the undisturbed run failed: {scene.last_words()}")
    return Reference(
        digest=digest(scene.checkpoints[-1]),
        losses=losses(scene.metrics),
        sizes={record["step"]: record["batch_samples"] for record in scene.metrics},
        cursor=int(scene.metrics[-1]["cursor"]),
        wall_seconds=time.monotonic() - started,
    )
