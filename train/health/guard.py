"""What the loop and the composition root know of health: one object a run, one context around it.

Owns the order of things: an attempt is refused if it would be in vain, written down as running,
watched, and written down as ended, however it ends.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from train.actions import Stop
from train.distributed import World
from train.errors import CrashLoopError, RunEndedError, StoppedByPolicyError, TrimtabError
from train.health.crash_loop import signature, verdict
from train.health.interruption import Interruption, Wish
from train.health.outcome import (
    COMPLETED,
    CRASH_LOOP,
    FAILED,
    RUNNING,
    Outcome,
    OutcomeRecord,
    fingerprint,
    last_step_of,
    read_outcomes,
)
from train.health.pulse import Phase, Pulse
from train.run_folder import RunFolder, launch_id
from train.settings import HealthSettings

logger = logging.getLogger(__name__)

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
        agreed = self._interruption.agreed(self._world.gather(self._interruption.own()))
        if agreed is None:
            return None
        wish, is_for_all = agreed
        self._interruption.is_for_all = is_for_all
        reason = {
            Wish.PREEMPTED: "a signal asked for the end (preemption or a time limit)",
            Wish.INTERRUPTED: "interrupted by a person",
        }[wish]
        return Stop(reason=reason, needs_save=True, code=str(wish))

    @property
    def is_end_for_all(self) -> bool:
        """False if some hosts were asked to end, and the others may go on without them."""
        return self._interruption.is_for_all


def ended_by_signal(stop: Stop) -> RunEndedError:
    """Return what a run that was asked to stop, and did, ends with."""
    wish = Wish(stop.code)
    message = f"{stop.reason}; the state is saved, and the same command goes on"
    return RunEndedError(message, code=str(wish), exit_code=wish.exit_code)


@contextmanager
def guarded(
    settings: HealthSettings,
    node: Mapping[str, Any],
    world: World,
    folder: RunFolder,
    interruption: Interruption,
) -> Iterator[Guard]:
    """Guard one attempt. Called on all ranks, with the run folder locked; a collective.

    Raises: CrashLoopError if the same failure has come too often.
    """
    pulse = Pulse()
    guard = Guard(world=world, interruption=interruption, pulse=pulse)
    record = _begin(settings, node, world, folder)

    def end(code: str, exit_code: int, reason: str = "", mark: str = "") -> None:
        if world.is_main:
            step = pulse.now.step
            record.end(code, exit_code, step=step, reason=reason, fingerprint=mark)

    def leave(code: str, exit_code: int, reason: str) -> None:
        end(code, exit_code, reason)

    interruption.has_begun = lambda: pulse.has_stepped
    interruption.on_leave.append(leave)
    try:
        yield guard
    except RunEndedError as error:
        if not guard.is_end_for_all:
            record.open_to_restarts()
        end(error.code, error.exit_code, str(error))
        raise
    except StoppedByPolicyError as error:
        end(error.code, error.exit_code, str(error))
        raise
    except TrimtabError as error:
        end(FAILED, error.exit_code, str(error), fingerprint(error))
        raise
    except BaseException as error:
        end(FAILED, 1, f"{type(error).__name__}: {error}"[:500], fingerprint(error))
        raise
    else:
        end(COMPLETED, 0)
    finally:
        interruption.on_leave.remove(leave)
        interruption.has_begun = lambda: False


def _begin(
    settings: HealthSettings, node: Mapping[str, Any], world: World, folder: RunFolder
) -> OutcomeRecord:
    """Write down that the attempt runs, or refuse it. A collective."""
    why, record = None, None
    if world.is_main:
        known = read_outcomes(folder.path)
        ends = known.ended(last_step=last_step_of(folder.metrics))
        sign = signature(node)
        start = Outcome(code=RUNNING, attempt=folder.attempt, signature=sign, launch=launch_id())
        record = OutcomeRecord(folder.path, start, ends)
        why = verdict(ends, sign, max_same_failures=settings.max_same_failures)
        if why is not None:
            step = ends[-1].step
            record.end(CRASH_LOOP, CrashLoopError.exit_code, step=step, reason=why)
        else:
            record.begin()
    why = world.broadcast(why)
    if why is not None:
        raise CrashLoopError(why)
    return record or OutcomeRecord(folder.path, Outcome(code=RUNNING, attempt=folder.attempt), [])
