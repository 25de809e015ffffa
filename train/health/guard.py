"""What the loop and the composition root know of health: one object a run, one context around it.

Owns the order of things: an attempt is refused if it would be in vain, written down as running,
watched, and written down as ended, however it ends.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from train.actions import Stop
from train.checkpoint.load_marks import LoadMarks
from train.distributed import World
from train.errors import (
    CrashLoopError,
    OutOfDeviceMemoryError,
    RunEndedError,
    StoppedByPolicyError,
    TrimtabError,
)
from train.events import Alert, Events
from train.health.crash_loop import signature, verdict
from train.health.heartbeats import Heartbeats, connect
from train.health.interruption import Interruption, Wish
from train.health.out_of_memory import advice, is_out_of_memory
from train.health.outcome import (
    COMPLETED,
    CRASH_LOOP,
    FAILED,
    OUT_OF_MEMORY,
    RUNNING,
    Outcome,
    OutcomeRecord,
    fingerprint,
    last_step_of,
    read_outcomes,
    tell_launcher,
)
from train.health.pulse import Phase, Pulse
from train.health.stragglers import Stragglers
from train.health.watchdog import Watchdog, is_timeout
from train.run_folder import RunFolder, launch_id
from train.settings import HealthSettings, RunConfig
from train.state import TrainState

logger = logging.getLogger(__name__)

_WORDS_SECONDS = 2.0
_LONE = World(rank=0, size=1, device=torch.device("cpu"))


class Guard:
    """What this rank is doing, and whether it was asked to stop."""

    def __init__(
        self,
        *,
        world: World = _LONE,
        interruption: Interruption | None = None,
        pulse: Pulse | None = None,
    ) -> None:
        self.pulse = pulse or Pulse()
        self._stragglers: Stragglers | None = None
        self._world = world
        self._interruption = interruption or Interruption()

    def enter(self, phase: Phase, step: int) -> None:
        """Say what comes now; costs a microsecond."""
        self.pulse.enter(phase, step)

    def is_waiting(self) -> bool:
        """True if a signal has asked this rank to stop; no collective."""
        return self._interruption.is_waiting()

    def wanted_stop(self) -> Stop | None:
        """Return how to stop, None if no rank was asked to. A collective."""
        wish = self._interruption.agree(self._world.gather(self._interruption.own()))
        if wish is None:
            return None
        reason = {
            Wish.PREEMPTED: "a signal asked for the end (preemption or a time limit)",
            Wish.INTERRUPTED: "interrupted by a person",
        }[wish]
        return Stop(reason=reason, needs_save=True, code=str(wish))

    def compare_speeds_of(self, model: nn.Module, settings: HealthSettings) -> None:
        """Look for slow ranks from now on, if there are others to compare with."""
        if self._world.size > 1 and settings.straggler_interval_steps:
            self._stragglers = Stragglers(
                model,
                self._world,
                self.pulse,
                interval_steps=settings.straggler_interval_steps,
                sigma=settings.straggler_sigma,
            )

    def look_for_stragglers(self, state: TrainState, events: Events) -> None:
        """Tell of ranks that have turned out slow. A collective, in few steps alone."""
        if self._stragglers is None:
            return
        for found in self._stragglers.look(state.step):
            if self._world.is_main:
                logger.warning("%s", found)
            speed = found.speed
            events.alerted(
                Alert(
                    kind="straggler",
                    text=str(found),
                    short=f"rank {speed.rank} on {speed.host} is slow",
                    fields={
                        "rank": speed.rank,
                        "host": speed.host,
                        "device": speed.device,
                        "what": found.what,
                        "seconds_each": found.seconds,
                        "others_seconds": found.others_seconds,
                        "sigma": found.sigma,
                    },
                ),
                state,
            )


def ended_by_signal(stop: Stop) -> RunEndedError:
    """Return what a run that was asked to stop, and did, ends with."""
    wish = Wish(stop.code)
    message = f"{stop.reason}; the state is saved, and the same command goes on"
    return RunEndedError(message, code=str(wish), exit_code=wish.exit_code)


@contextmanager
def guarded(
    config: RunConfig,
    node: Mapping[str, Any],
    world: World,
    folder: RunFolder,
    interruption: Interruption,
) -> Iterator[Guard]:
    """Guard one attempt. Called on all ranks, with the run folder locked; a collective.

    Raises: CrashLoopError if the same failure has come too often; OutOfDeviceMemoryError in place
    of what was raised for want of memory.
    """
    pulse = Pulse()
    guard = Guard(world=world, interruption=interruption, pulse=pulse)
    line = _line(config.health, world, folder, pulse)
    marks = LoadMarks(folder.checkpoints, world)
    record = _begin(config.health, node, world, folder, marks)
    attempt = _Attempt(config, world, pulse, record, line, marks)
    with ExitStack() as stack:
        if line is not None:
            line.start()
            stack.callback(line.close)
        watchdog = _watchdog(config.health, world, folder, pulse, line, attempt)
        if config.health.watchdog:
            watchdog.start()
            stack.callback(watchdog.close)
        interruption.has_begun = lambda: pulse.has_stepped
        interruption.on_leave.append(attempt.leave)
        stack.callback(interruption.on_leave.remove, attempt.leave)
        try:
            yield guard
        except BaseException as error:
            if config.health.watchdog and line is not None and is_timeout(error):
                watchdog.alarm_now()
            if isinstance(error, RunEndedError) and not interruption.is_final:
                record.open_to_restarts()
            told = attempt.failed(error)
            if told is error:
                raise
            raise told from None
        if world.is_main:
            attempt.end(Ending(code=COMPLETED, exit_code=0))


class _Attempt:
    """One attempt of one rank, as far as its end is concerned."""

    def __init__(
        self,
        config: RunConfig,
        world: World,
        pulse: Pulse,
        record: OutcomeRecord,
        line: Heartbeats | None,
        marks: LoadMarks,
    ) -> None:
        self._marks = marks
        self._config = config
        self._world = world
        self._pulse = pulse
        self._record = record
        self._line = line

    def end(self, ending: Ending) -> bool:
        """Write down how it ended; False if another rank has done so."""
        return self._record.end(
            ending.code,
            ending.exit_code,
            step=self._pulse.now.step,
            reason=ending.reason,
            fingerprint=ending.fingerprint,
        )

    def leave(self, code: str, exit_code: int, reason: str) -> None:
        """Write down the end of a process that a signal ends at once."""
        self._marks.clear()  # a load that a signal ended says nothing against the checkpoint
        ending = self._first_ending(Ending(code=code, exit_code=exit_code, reason=reason))
        if self._world.is_main:
            self.end(ending)

    def hang(self, code: str, exit_code: int, reason: str) -> bool:
        """Write down what the watchdog found; called on the rank that found it."""
        ending = Ending(code=code, exit_code=exit_code, reason=reason, fingerprint=code)
        is_first = self.end(ending)
        if is_first:
            tell_launcher(code, exit_code, reason)
        return is_first

    def failed(self, error: BaseException) -> BaseException:
        """Write down the end by an exception, and return the one that tells it best."""
        if is_out_of_memory(error):
            error = OutOfDeviceMemoryError(
                advice(
                    self._config,
                    rank=self._world.rank,
                    num_ranks=self._world.size,
                    device=self._world.device,
                    step=self._pulse.now.step,
                )
            )
            if os.environ.get("LOCAL_RANK", "0") != "0":
                logger.error("%s", error)  # `main` tells it on the first rank of a host alone
        own = ending_of(error)
        first = self._first_ending(own)
        if self._world.is_main:
            self.end(first)
        if first == own or isinstance(error, TrimtabError):
            return error
        reason = f"another rank ended first: {first.reason}"
        return RunEndedError(reason, code=first.code, exit_code=first.exit_code)

    def _first_ending(self, ending: Ending) -> Ending:
        """Say how this rank ends, and return what the first rank that ended has said.

        A rank that fails takes the others with it: they see a closed connection, it knows why.
        """
        if self._line is None:
            return ending
        self._line.say("words", asdict(ending))
        words = self._line.hear("words", _WORDS_SECONDS)
        if words is None or words["rank"] == self._world.rank:
            return ending
        return Ending(**{key: value for key, value in words.items() if key != "rank"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How an attempt ends."""

    code: str
    exit_code: int
    reason: str = ""
    fingerprint: str = ""


def ending_of(error: BaseException) -> Ending:
    """Return what an exception means for the launcher."""
    is_ours = isinstance(error, TrimtabError)
    code = FAILED
    if isinstance(error, RunEndedError | StoppedByPolicyError):
        code = error.code
    elif isinstance(error, OutOfDeviceMemoryError):
        code = OUT_OF_MEMORY
    return Ending(
        code=code,
        exit_code=error.exit_code if isinstance(error, TrimtabError) else 1,
        reason=str(error) if is_ours else f"{type(error).__name__}: {error}"[:500],
        fingerprint=fingerprint(error),
    )


def _line(
    settings: HealthSettings, world: World, folder: RunFolder, pulse: Pulse
) -> Heartbeats | None:
    if world.size == 1:
        return None
    device = str(world.device)
    if world.device.type == "cuda":
        device += f" {torch.cuda.get_device_name(world.device)}"
    return Heartbeats(
        lambda: connect(f"{folder.run_id}/{folder.attempt}"),
        rank=world.rank,
        size=world.size,
        device=device,
        pulse=pulse,
        interval_seconds=settings.heartbeat_seconds,
    )


def _watchdog(
    settings: HealthSettings,
    world: World,
    folder: RunFolder,
    pulse: Pulse,
    line: Heartbeats | None,
    attempt: _Attempt,
) -> Watchdog:
    return Watchdog(
        settings,
        pulse,
        line,
        run_folder=folder.path,
        attempt=folder.attempt,
        rank=world.rank,
        size=world.size,
        on_hang=attempt.hang,
    )


def _begin(
    settings: HealthSettings,
    node: Mapping[str, Any],
    world: World,
    folder: RunFolder,
    marks: LoadMarks,
) -> OutcomeRecord:
    """Write down that the attempt runs, or refuse it. A collective."""
    why, start, ends = None, Outcome(code=RUNNING), []
    if world.is_main:
        ends = read_outcomes(folder.path).ended(last_step=last_step_of(folder.metrics))
        sign = signature(node)
        start = Outcome(code=RUNNING, attempt=folder.attempt, signature=sign, launch=launch_id())
        if not marks.has_hopeless():  # else this start differs: it takes another checkpoint
            why = verdict(ends, sign, max_same_failures=settings.max_same_failures)
    why, start, ends = world.broadcast((why, start, ends))
    record = OutcomeRecord(folder.path, start, ends)
    if why is not None:
        if world.is_main:
            code = CrashLoopError.exit_code
            record.end(CRASH_LOOP, code, step=ends[-1].step, reason=why)
        raise CrashLoopError(why)
    if world.is_main:
        record.begin()
    return record
