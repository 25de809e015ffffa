"""Looks for silent corruption: replicas that should be equal, and steps that should repeat.

The loop hands it each step and what callbacks ask for; it answers with an action where bits are
wrong, and it never changes what an undisturbed run computes. All ranks come to the same answer.
Needs no GPU and no second state on the device; the state before a step that is executed twice lies
in host memory.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from train.actions import Action, Rewind, Save, Stop
from train.checkpoint.info import CheckpointInfo
from train.checkpoint.tiers import Tiers
from train.distributed import World
from train.engines.base import Engine
from train.engines.snapshot import HostSnapshot, tensor_of
from train.engines.update_norm import local_part
from train.errors import CorruptCheckpointError
from train.events import Events
from train.health.corruption import (
    Check,
    Corruption,
    Difference,
    Vote,
    blame,
    describe,
    differing,
    name_some,
    tensors_of_minority,
    vote,
)
from train.health.local_gradients import watch
from train.recovery.environment import host_name
from train.recovery.history import RecoveryHistory
from train.recovery.policy import Rung
from train.settings import IntegritySettings, OnMismatch
from train.state import TrainState

logger = logging.getLogger(__name__)

RULE = "integrity"
CODE = "silent_corruption"
_PARAMETER = "/parameter"
# Replicas take the same updates, so what one has moved further than the other, it has not by those.
_TELLING_RATIO = 2.0
_MAX_TENSORS_MEASURED = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class _Execution:
    """What came of a step on this rank, as bits."""

    losses: tuple[str, ...]
    gradients: dict[str, int]
    state: dict[str, int]

    def difference(self, other: _Execution) -> Difference:
        """Return what another execution of the same step has otherwise."""
        return Difference(
            has_other_losses=self.losses != other.losses,
            gradients=differing(self.gradients, other.gradients),
            state=differing(self.state, other.state),
        )


class Integrity:
    """The checks of one run. All methods are collectives."""

    def __init__(
        self,
        settings: IntegritySettings,
        *,
        world: World,
        tiers: Tiers,
        history: RecoveryHistory,
        events: Events,
        last_step: int,
        max_rewinds: int,
    ) -> None:
        self._settings = settings
        self._world = world
        self._tiers = tiers
        self._history = history
        self._events = events
        self._last_step = last_step
        self._max_rewinds = max_rewinds
        self._sound: TrainState | None = None
        """The last state that was equal on all ranks: found so, or because all began with it."""
        self._executed_twice: tuple[Corruption | None, float] | None = None
        self._buffers: HostSnapshot | None = None

    def execute(self, engine: Engine, step: Callable[[], Tensor], state: TrainState) -> Tensor:
        """Take one step from `state`, twice if it is due, and return its signals.

        The first step of a process is never due: libraries choose their ways in it.
        """
        is_first = self._sound is None
        if self._sound is None or self._sound.rewinds != state.rewinds:
            self._sound = state
        interval = self._settings.reexecution_interval_steps
        if is_first or interval is None or (state.step + 1) % interval:
            return step()
        started = time.perf_counter()
        before = self._buffers = engine.snapshot(self._buffers)
        signals, first = self._run(engine, step)
        difference = self._taken_back(engine, before)
        if difference is None:
            signals, second = self._run(engine, step)
            difference = first.difference(second)
        found = self._judge(self._world.gather(difference), state)
        self._executed_twice = (found, time.perf_counter() - started)
        return signals

    def reviewed(self, wanted: list[Action], engine: Engine, state: TrainState) -> list[Action]:
        """Return what is to be done in `state`: what was wanted, the last of which is what wins,
        or, where bits are wrong, what is to be done about that.
        """
        winner = wanted[-1]
        found: Corruption | None = None
        if self._executed_twice is not None:
            found, seconds = self._executed_twice
            self._executed_twice = None
            self._tell(Check.REEXECUTION, found, state, seconds)
        if found is None and self._is_comparison_due(winner, engine, state):
            started = time.perf_counter()
            found = self._compare_replicas(engine, state)
            self._tell(Check.REPLICAS, found, state, time.perf_counter() - started)
            if found is None:
                self._sound = state
        if found is None:
            return wanted
        answer: Action = self._answer(found, state)
        if isinstance(winner, Stop):  # whoever stops for another reason goes on from what is sound
            answer = replace(winner, needs_save=False)
        logger.info("%s instead of %s", answer, winner)
        return [*wanted[:-1], answer]

    def _is_comparison_due(self, winner: Action, engine: Engine, state: TrainState) -> bool:
        interval = self._settings.replica_check_interval_steps
        if interval is None or not engine.has_replicas or self._world.size == 1:
            return False
        # No checkpoint holds what one rank alone believes, and no data are blamed for a bad rank.
        match winner:
            case Save():
                is_asked_for = winner.to_disk
            case Stop():
                return winner.needs_save
            case _:
                is_asked_for = isinstance(winner, Rewind)
        is_last = state.step == self._last_step
        return is_asked_for or is_last or state.step % interval == 0

    def _compare_replicas(self, engine: Engine, state: TrainState) -> Corruption | None:
        """Return which ranks hold another state than the others, None if all are equal."""
        own = engine.state_checksums()  # host sync
        found = vote(self._world.gather(_digest(own)))
        if found is None:
            return None
        sums = self._world.gather(own)
        tensors = tensors_of_minority(sums, found)
        clue = ""
        if not found.is_certain:
            found, clue = self._tie_break(engine, found, tensors)
        others = "each other" if len(found.ranks) == self._world.size else "the other ranks"
        since = 0 if self._sound is None else self._sound.step
        return Corruption(
            check=Check.REPLICAS,
            vote=found,
            places=self._places(found),
            tensors=tensors,
            detail=f"another state than {others} in {len(tensors)} of {len(own)} tensors "
            f"({name_some(tensors)}), seen at step {state.step}, equal at step {since}",
            clue=clue,
        )

    def _tie_break(self, engine: Engine, found: Vote, tensors: tuple[str, ...]) -> tuple[Vote, str]:
        """Return the likelier rank of a tie, and why; all of them if nothing speaks for one."""
        target = self._target(Check.REPLICAS)
        names = [name for name in tensors if name.endswith(_PARAMETER)][:_MAX_TENSORS_MEASURED]
        snapshot = None if target is None else self._tiers.ring.peek(target.name)
        if snapshot is None or target is None or not names:
            return found, ""
        moved = self._world.gather(_furthest(engine, snapshot, names))
        next_to_it, furthest = sorted(found.ranks, key=lambda rank: moved[rank])[-2:]
        if not moved[furthest] > _TELLING_RATIO * moved[next_to_it]:
            return found, ""
        clue = (
            f"it is the likelier one: since step {target.step}, a value in these tensors has moved "
            f"by {moved[furthest]:.3g} there, and by {moved[next_to_it]:.3g} at most elsewhere"
        )
        return Vote(ranks=(furthest,), is_certain=False), clue

    def _run(self, engine: Engine, step: Callable[[], Tensor]) -> tuple[Tensor, _Execution]:
        with watch(engine.model) as gradients:
            signals = step()
        losses = tuple(repr(loss) for loss in engine.recent_sample_losses()[-1])  # host sync
        execution = _Execution(
            losses=losses, gradients=gradients.checksums(), state=engine.state_checksums()
        )
        return signals, execution

    def _taken_back(self, engine: Engine, before: HostSnapshot) -> Difference | None:
        """Take the step back on all ranks; if one cannot, return what is wrong on this one."""
        problem = ""
        try:
            engine.undo(before)
        except CorruptCheckpointError as error:
            problem = str(error)
        return Difference(problem=problem) if any(self._world.gather(problem)) else None

    def _judge(self, differences: list[Difference], state: TrainState) -> Corruption | None:
        found = blame(differences)
        if found is None:
            return None
        worst = differences[found.ranks[0]]
        what = describe(worst)
        if not found.is_certain:
            what += ", on all ranks at once, so what they exchange is likelier than any of them"
        return Corruption(
            check=Check.REEXECUTION,
            vote=found,
            places=self._places(found),
            tensors=worst.gradients or worst.state,
            detail=f"step {state.step + 1} came out otherwise when it was executed again: {what}",
        )

    def _places(self, found: Vote) -> tuple[str, ...]:
        place = f"{host_name()}, {self._world.device}"
        everywhere = self._world.gather(place)
        return tuple(everywhere[rank] for rank in found.ranks)

    def _tell(
        self, check: Check, found: Corruption | None, state: TrainState, seconds: float
    ) -> None:
        if found is not None and self._world.is_main:
            logger.error("silent corruption on %s", found.in_words())
        self._events.integrity_checked(check, found, state, seconds)

    def _target(self, check: Check) -> CheckpointInfo | None:
        """Return the youngest good state from before the corruption, as far as that is known."""
        sound = self._sound
        good = self._tiers.good()
        if check is Check.REPLICAS and sound is not None:
            good = [info for info in good if info.clock <= sound.clock]
        return good[-1] if good else None

    def _answer(self, found: Corruption, state: TrainState) -> Action:
        """Return the way back, or the stop if it would not help."""
        words = f"silent corruption: {found.in_words()}"
        again = {place for record in self._history.done for place in record.suspects}
        repeated = sorted(again & set(found.places))
        target = self._target(found.check)
        if self._settings.on_mismatch is OnMismatch.STOP:
            return self._stop(found, state, f"{words} (integrity.on_mismatch=stop)")
        if repeated:
            return self._stop(found, state, f"{words}; {repeated[0]} was named before")
        if target is None:
            return self._stop(found, state, f"{words}; no good state from before it is left")
        if self._history.policy_rewinds() >= self._max_rewinds:
            return self._stop(found, state, f"{words}; recovery.max_rewinds are used up")
        return Rewind(
            target=target.name,
            target_step=target.step,
            skip_from=target.cursor,
            skip_amount=0,
            rule=RULE,
            rung=Rung.REPLAY,
            verdict=CODE,
            onset_step=self._onset(found, state),
            detected_step=state.step,
            reason=words,
            incident=self._history.last_incident + 1,
            suspects=found.places,
        )

    def _stop(self, found: Corruption, state: TrainState, words: str) -> Stop:
        hosts = " or ".join(sorted({place.partition(",")[0] for place in found.places}))
        return Stop(
            reason=f"{words}; take {hosts} out of the job and start the same command again",
            needs_save=False,
            is_failure=True,
            code=CODE,
            rule=RULE,
            incident=self._history.last_incident + 1,
            verdict=CODE,
            onset_step=self._onset(found, state),
            detected_step=state.step,
            suspects=found.places,
        )

    def _onset(self, found: Corruption, state: TrainState) -> int:
        """Return the first step that can be wrong."""
        if found.check is Check.REEXECUTION or self._sound is None:
            return state.step
        return min(self._sound.step + 1, state.step)


def _digest(checksums: dict[str, int]) -> str:
    text = "\n".join(f"{name} {total:016x}" for name, total in checksums.items())
    return hashlib.sha256(text.encode()).hexdigest()


def _furthest(engine: Engine, snapshot: HostSnapshot, names: list[str]) -> float:
    """Return by how much the value that moved most since a snapshot has moved on this rank."""
    parameters = {f"{name}{_PARAMETER}": each for name, each in engine.model.named_parameters()}
    furthest = 0.0
    for name in names:
        now = local_part(parameters[name]).cpu()
        distance = (now - tensor_of(snapshot, name)).abs().nan_to_num(nan=torch.inf).max()
        furthest = max(furthest, float(distance))
    return furthest
