"""The test bench of a replay: bare engine steps from a checkpoint, along a course of data.

Owns the stepping, in the run's own order of events, so that a replay on as many ranks is the run
again bit for bit. Refuses decisions: nothing is saved, skipped or rewound. All methods of `Bench`
are collectives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from monitoring.replay_plan import CheckpointFacts
from train.attribution.conclusion import RankRepeat
from train.attribution.outcome import Point
from train.callbacks.checkpointing import interval_in_force
from train.callbacks.spike_detection import SpikeDetection
from train.checkpoint.info import CheckpointInfo, Health
from train.checkpoint.store import CheckpointStore
from train.data.layout import DocumentLayout
from train.data.stream import SampleStream
from train.distributed import World
from train.engines.base import Engine
from train.engines.snapshot import HostSnapshot
from train.recovery.environment import host_name
from train.recovery.history import RecoveryHistory
from train.schedule import Schedule
from train.settings import RunConfig
from train.signals import Gate, StepReport, StepSignals
from train.state import TrainState


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """Where a trial begins and which data it is fed.

    It loads `checkpoint` and goes on in the order of the data, or from `begin_cursor`. At its own
    step `origin_step` it stands where the run stood at `target_step`; from there it takes
    `num_batches` batches of the sizes that the run took, from `jump_cursor` on if that is given.
    """

    title: str
    checkpoint: CheckpointFacts
    origin_step: int
    target_step: int
    num_batches: int
    begin_cursor: int | None = None
    jump_cursor: int | None = None

    @property
    def num_steps(self) -> int:
        """How many steps the trial takes, those before the target included."""
        return self.origin_step - self.checkpoint.step + self.num_batches


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInputs:
    """All that one step is given."""

    step: int
    rows: npt.NDArray[np.integer]
    layout: DocumentLayout | None
    num_tokens: int
    lr: float
    gate: Gate


@dataclass(slots=True, kw_only=True)
class Moment:
    """A state in host memory and what the next steps were given, so that they can be done again."""

    first_step: int
    last_step: int
    snapshot: HostSnapshot | None = None
    inputs: list[StepInputs]


@dataclass(frozen=True, slots=True, kw_only=True)
class RepeatedStep:
    """One step done twice: what each rank saw. `step`: its number once it is done."""

    step: int
    ranks: tuple[RankRepeat, ...]

    @property
    def differs(self) -> bool:
        """True if the two were not equal in every bit, on any rank."""
        return any(rank.has_other_losses or rank.has_other_state for rank in self.ranks)


class Bench:
    """One engine, one stream of data, and what a run knew before its incident."""

    def __init__(
        self,
        *,
        config: RunConfig,
        engine: Engine,
        store: CheckpointStore,
        stream: SampleStream,
        schedule: Schedule,
        history: RecoveryHistory,
        is_data_change: Callable[[int, int], bool],
        world: World,
        progress: Callable[[Point], None],
    ) -> None:
        self._config = config
        self._engine = engine
        self._store = store
        self._stream = stream
        self._schedule = schedule
        self._history = history
        self._is_data_change = is_data_change
        self._world = world
        self._progress = progress
        self._interval_steps = interval_in_force(config.checkpoint, {})

    def run(self, course: Course, moment: Moment | None = None) -> list[Point]:
        """Return the steps of one trial, oldest first; `moment` is filled on the way."""
        state, detection = self._begin(course)
        points: list[Point] = []
        pending: tuple[TrainState, Tensor, float] | None = None
        last_step = course.origin_step + course.num_batches
        while state.step < last_step:
            if state.step == course.origin_step and course.jump_cursor is not None:
                state = replace(state, cursor=max(state.cursor, course.jump_cursor))
            inputs, next_cursor = self._inputs(course, state, detection)
            if moment is not None and moment.first_step <= state.step <= moment.last_step:
                if not moment.inputs:
                    moment.snapshot = self._engine.snapshot()
                moment.inputs.append(inputs)
            vector = self._step(inputs)
            state = state.after(next_cursor=next_cursor, num_tokens=inputs.num_tokens)
            # The run's reports come one step late, and so do the limits of its gate.
            if pending is not None:
                points.append(self._report(course, detection, *pending))
            pending = (state, vector, inputs.lr)
            if self._is_flushed(state.step) or state.step == last_step:
                points.append(self._report(course, detection, *pending))
                pending = None
        return points

    def repeat(self, moment: Moment) -> Iterator[RepeatedStep]:
        """Yield each step of `moment`, done twice from the same bits. Host syncs."""
        snapshot = moment.snapshot
        if snapshot is None:
            return
        for number, inputs in enumerate(moment.inputs):
            if number > 0:
                snapshot = self._engine.snapshot(snapshot)
            results = []
            for _ in range(2):
                self._engine.restore(snapshot)
                self._step(inputs)
                losses = self._engine.recent_sample_losses()[-1]
                results.append((repr(losses), self._engine.state_digest()))  # NaN equals itself
            (losses_1, state_1), (losses_2, state_2) = results
            mine = RankRepeat(
                rank=self._world.rank,
                host=host_name(),
                has_other_losses=losses_1 != losses_2,
                has_other_state=state_1 != state_2,
            )
            yield RepeatedStep(step=inputs.step, ranks=tuple(self._world.gather(mine)))

    def _begin(self, course: Course) -> tuple[TrainState, SpikeDetection]:
        extra: dict[str, Any] = self._store.load(self._engine, _info(course.checkpoint))
        # Samples of damaged files are in no journal; what is skipped twice is skipped once.
        self._stream.ledger.extend((start, stop) for start, stop in extra["ledger"])
        state = TrainState(**extra["train_state"])
        detection = SpikeDetection(
            self._config.recovery, self._schedule, self._history, self._is_data_change
        )
        self._interval_steps = interval_in_force(self._config.checkpoint, extra["callbacks"])
        if detection.name in extra["callbacks"]:
            detection.load_state_dict(extra["callbacks"][detection.name])
        if course.begin_cursor is not None:
            state = replace(state, cursor=course.begin_cursor)
        return state, detection

    def _inputs(
        self, course: Course, state: TrainState, detection: SpikeDetection
    ) -> tuple[StepInputs, int]:
        run_step = state.step - course.origin_step + course.target_step
        batch = self._stream.at(state.cursor, self._schedule.batch_samples_at(run_step))
        inputs = StepInputs(
            step=state.step + 1,
            rows=batch.rows,
            layout=batch.layout,
            num_tokens=batch.num_tokens,
            lr=self._schedule.lr_at(state.step) * self._history.lr_factor_at(state.step),
            gate=detection.gate() or Gate(),
        )
        return inputs, batch.next_cursor

    def _step(self, inputs: StepInputs) -> Tensor:
        return self._engine.step(
            inputs.rows,
            layout=inputs.layout,
            num_tokens=inputs.num_tokens,
            lr=inputs.lr,
            gate=inputs.gate,
        )

    def _is_flushed(self, step: int) -> bool:
        """True if the run read the report of `step` at once, as it does where it saves."""
        checkpoint = self._config.checkpoint
        to_memory = checkpoint.snapshot_interval_steps or self._interval_steps
        in_memory = checkpoint.keep_snapshots > 0 and step % to_memory == 0
        return step % self._interval_steps == 0 or in_memory or step == self._config.run.steps

    def _report(
        self,
        course: Course,
        detection: SpikeDetection,
        state: TrainState,
        vector: Tensor,
        lr: float,
    ) -> Point:
        signals = StepSignals.from_vector(vector.tolist())  # host sync
        verdict = detection.after_update(
            StepReport(
                state=state,
                signals=signals,
                lr=lr,
                num_samples=0,
                num_tokens=0,
                step_seconds=0.0,
                data_seconds=0.0,
                finished_unix_seconds=0.0,
            )
        )
        point = Point(
            step=state.step,
            batch=state.step - course.origin_step,
            cursor=state.cursor,
            loss_nats=signals.loss_nats,
            grad_norm=signals.grad_norm,
            lr=lr,
            kind=verdict.kind,
            deviation=verdict.deviation,
            baseline_nats=verdict.baseline_nats,
            is_vetoed=signals.is_vetoed,
        )
        self._progress(point)
        return point


def _info(facts: CheckpointFacts) -> CheckpointInfo:
    return CheckpointInfo(
        name=facts.name,
        path=facts.path,
        step=facts.step,
        cursor=facts.cursor,
        clock=facts.clock,
        num_bytes=0,
        digest="",
        world_size=facts.num_ranks,
        format=facts.format,
        health=Health.QUARANTINED if facts.is_quarantined else Health.GOOD,
    )
