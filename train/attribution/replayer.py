"""A whole replay: from a run folder and the number of an incident to the attribution of its cause.

Owns the four trials and what is put together of them; writes nothing itself. The modules beside it
read the case, step, judge and conclude.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from monitoring.replay_plan import CHECKPOINTS_FOLDER
from train.attribution.bench import Bench, Course, Moment, RepeatedStep
from train.attribution.case import Case
from train.attribution.conclusion import Cause, HardwareSuspect, conclude, suspect_hardware
from train.attribution.outcome import (
    Outcome,
    Point,
    first_difference,
    judge,
    unless_the_detector_changed,
)
from train.chaos import inject_into_engine, inject_into_source, schedule_of
from train.checkpoint.store import CheckpointStore
from train.data.build import DataChanges, build_data
from train.data.ledger import SkipLedger
from train.data.sequence import Returns
from train.data.shards import Corpus
from train.data.stream import SampleStream
from train.distributed import World
from train.engines.build import build_engine
from train.recovery.environment import device_name, host_name, ranks_by_value, versions
from train.recovery.journal import now_utc
from train.recovery.suspects import NUM_STEPS_BEFORE_ONSET
from train.settings import RunConfig

logger = logging.getLogger(__name__)

DEFAULT_NUM_STEPS_AFTER = 4
# Steps before the target are executed to get there, and shown no further back than this.
_NUM_BATCHES_SHOWN_BEFORE = 50

Result = dict[str, Any]


def num_steps_in_all(case: Case, num_steps_after: int) -> int:
    """Return how many steps the trials take together, for a progress bar."""
    plan = case.plan
    batches = plan.detected_step - plan.target_step + num_steps_after
    return 3 * batches + 2 * (plan.target_step - plan.start.step)


def replay(
    case: Case,
    config: RunConfig,
    corpora: Mapping[str, Corpus],
    world: World,
    *,
    num_steps_after: int,
    progress: Callable[[Point], None],
    say: Callable[[str], None],
) -> Result:
    """Run the four trials and return the attribution as JSON values. A collective."""
    started = time.perf_counter()
    schedule = schedule_of(config)
    engine = inject_into_engine(build_engine(config, world), config, world, is_replay=True)
    data = build_data(corpora, config.data, seed=config.run.seed, bad_shards=case.bad_shards)
    ledger = SkipLedger((skip.start, skip.stop) for skip in case.history.skips())
    stream = SampleStream(
        inject_into_source(
            data.source, config, data.vocab_size or config.model.vocab_size, schedule
        ),
        ledger,
        rank=world.rank,
        num_ranks=world.size,
        returns=Returns(case.history.returns()),
        skips_damaged=any(case.bad_shards.values()),
    )
    bench = Bench(
        config=config,
        engine=engine,
        store=CheckpointStore(
            case.folder / CHECKPOINTS_FOLDER,
            world,
            keep_good=2,
            sequence_length=config.data.sequence_length,
        ),
        stream=stream,
        schedule=schedule,
        history=case.history,
        is_data_change=DataChanges(data.changes, stream, schedule).is_change,
        world=world,
        progress=progress,
    )
    trials = _Trials(case, config, stream, bench, num_steps_after=num_steps_after, say=say)
    trials.run(can_repeat=engine.can_snapshot)
    hosts = world.gather((host_name(), device_name(world.device)))
    environment = {
        "versions": versions(),
        "engine": engine.name,
        "num_ranks": world.size,
        "hosts": ranks_by_value([host for host, _ in hosts]),
        "devices": ranks_by_value([device for _, device in hosts]),
    }
    return {
        **_attribution(case, config, trials, num_ranks=world.size),
        "environment": environment,
        "time": now_utc(),
        "seconds": time.perf_counter() - started,
    }


class _Trials:
    """The trials of one case, in order, and what came of them."""

    def __init__(
        self,
        case: Case,
        config: RunConfig,
        stream: SampleStream,
        bench: Bench,
        *,
        num_steps_after: int,
        say: Callable[[str], None],
    ) -> None:
        self._case = case
        self._config = config
        self._stream = stream
        self._bench = bench
        self._num_steps_after = num_steps_after
        self._say = say
        self.courses: dict[str, Course] = {}
        self.points: dict[str, list[Point]] = {}
        self.outcomes: dict[str, Outcome] = {}
        self.repeats: list[RepeatedStep] | None = None

    def run(self, *, can_repeat: bool) -> None:
        """Run A, then D from a moment of A, then B and C. A collective."""
        plan = self._case.plan
        first = max(plan.start.step, plan.onset_step - NUM_STEPS_BEFORE_ONSET)
        moment = Moment(first_step=first, last_step=max(first, plan.onset_step - 1), inputs=[])
        num_batches = plan.detected_step - plan.target_step + self._num_steps_after
        same = Course(
            title="same data, same state",
            checkpoint=plan.start,
            origin_step=plan.target_step,
            target_step=plan.target_step,
            num_batches=num_batches,
        )
        self._try("A", same, moment if can_repeat else None)
        self.outcomes["A"] = unless_the_detector_changed(
            self.outcomes["A"], self.points["A"], self._case.losses(), plan.detected_step
        )
        if can_repeat:
            self._say("D: the steps around the onset, twice from the same bits")
            self.repeats = list(self._bench.repeat(moment))
            moment.snapshot = None
        target_cursor = self._cursor_at_target()
        if plan.earlier is None:
            reason = "there is no earlier checkpoint"
            self.outcomes["B"] = Outcome(has_spiked=None, unknown_because=reason)
        else:
            earlier = Course(
                title="same data, earlier state",
                checkpoint=plan.earlier,
                origin_step=plan.earlier.step,
                target_step=plan.target_step,
                num_batches=num_batches,
                begin_cursor=target_cursor,
            )
            self._try("B", earlier)
        other = Course(
            title="other data, same state",
            checkpoint=plan.start,
            origin_step=plan.target_step,
            target_step=plan.target_step,
            num_batches=num_batches,
            jump_cursor=max(plan.skip_stop, self.points["A"][-1].cursor),
        )
        self._try("C", other)

    def _try(self, name: str, course: Course, moment: Moment | None = None) -> None:
        self._say(f"{name}: {course.title}, from step {course.checkpoint.step}")
        self.courses[name] = course
        self.points[name] = self._bench.run(course, moment)
        self.outcomes[name] = judge(self.points[name], has_other_detector=name == "B")

    def _cursor_at_target(self) -> int:
        """Return where the run's data stood at the target."""
        reached = {point.step: point.cursor for point in self.points["A"]}
        return reached.get(self._case.plan.target_step, self._case.plan.start.cursor)


def _attribution(case: Case, config: RunConfig, trials: _Trials, *, num_ranks: int) -> Result:
    plan, outcomes = case.plan, trials.outcomes
    differs = None if trials.repeats is None else any(step.differs for step in trials.repeats)
    if differs and not config.run.is_deterministic:
        differs = None  # the same bits were never promised
    conclusion = conclude(
        same=outcomes["A"].has_spiked,
        earlier=outcomes["B"].has_spiked,
        other=outcomes["C"].has_spiked,
        differs=differs,
    )
    suspect: HardwareSuspect | None = None
    if conclusion.cause is Cause.NOT_REPRODUCIBLE:
        unequal = next((step for step in trials.repeats or [] if step.differs), None)
        suspect = suspect_hardware(unequal.ranks if unequal is not None else (), case.capsule)
    difference, num_equal = first_difference(trials.points["A"], case.losses())
    return {
        "format": 1,
        "run": case.folder.resolve().name,
        "incident": plan.incident,
        "attempt": plan.attempt,
        "verdict": plan.verdict,
        "reason": plan.reason,
        "onset_step": plan.onset_step,
        "detected_step": plan.detected_step,
        "target_step": plan.target_step,
        "cause": str(conclusion.cause),
        "because": conclusion.because,
        "suspect_hardware": None if suspect is None else {**asdict(suspect), "words": str(suspect)},
        "caveats": list(_caveats(case, config, trials, num_ranks)),
        "trials": [_trial(name, trials) for name in ("A", "B", "C")],
        "repeat": _repeat(trials.repeats, is_promised=config.run.is_deterministic),
        "original": {
            "points": [dict(point) for point in case.original],
            "num_equal_steps": num_equal,
            "first_other_step": difference,
            "is_comparable": num_ranks == case.run_ranks,
        },
    }


def _trial(name: str, trials: _Trials) -> Result:
    course = trials.courses.get(name)
    points = trials.points.get(name, [])
    shown = [point for point in points if point.batch >= -_NUM_BATCHES_SHOWN_BEFORE]
    return {
        "name": name,
        "title": course.title if course is not None else "same data, earlier state",
        "checkpoint": course.checkpoint.name if course is not None else None,
        "from_step": course.checkpoint.step if course is not None else None,
        "data": None if course is None else _data_of(course, points),
        **trials.outcomes[name].as_record(),
        "points": [point.as_record() for point in shown],
    }


def _data_of(course: Course, points: Sequence[Point]) -> list[int]:
    """Return the positions `[start, stop)` of the sequence that a trial read from the target on."""
    start = course.jump_cursor if course.jump_cursor is not None else course.begin_cursor
    if start is None:
        before = {point.batch: point.cursor for point in points}
        start = before.get(0, course.checkpoint.cursor)
    return [start, points[-1].cursor]


def _repeat(repeats: Sequence[RepeatedStep] | None, *, is_promised: bool) -> Result:
    return {
        "name": "D",
        "title": "one step, done twice",
        "steps": [step.step for step in repeats or []],
        "differs": None if repeats is None else any(step.differs for step in repeats),
        "is_deterministic": is_promised,
        "ranks": [
            {"step": step.step, **asdict(rank)}
            for step in repeats or []
            for rank in step.ranks
            if rank.has_other_losses or rank.has_other_state
        ],
    }


def _caveats(case: Case, config: RunConfig, trials: _Trials, num_ranks: int) -> list[str]:
    plan, found = case.plan, []
    if num_ranks != case.run_ranks:
        found.append(
            f"replayed on {num_ranks} rank(s), the run had {case.run_ranks}: sums are rounded in "
            "another order, so a spike on the edge may stay away"
        )
    if not config.run.is_deterministic:
        found.append("run.is_deterministic=false: the same bits were not promised to begin with")
    if plan.start.name != plan.target_name:
        found.append(
            f"the target of step {plan.target_step} lay in memory alone; the replay began at step "
            f"{plan.start.step} and came to it with the same data"
        )
    if trials.repeats is None:
        found.append("this engine cannot go back in memory, so no step was done twice")
    then = case.capsule.get("environment", {}).get("versions", {})
    for name, now in versions().items():
        if then and then.get(name) not in (None, now):
            found.append(f"{name} was {then[name]} then and is {now} now")
    return found
