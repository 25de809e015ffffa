"""Which samples and ranks stand out in the steps around an incident. Numbers in, names out.

Owns the pairing of sample losses with steps, and the ranking. Refuses files, engines, collectives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from train.recovery.flight_log import FlightLog
from train.state import TrainState

NUM_SUSPECTS = 16
# A spike may begin a little before the step at which it is seen to.
NUM_STEPS_BEFORE_ONSET = 2
# One rank stands out if the next one has at most this share of its excess.
_SHARE_OF_THE_NEXT = 0.25

Losses = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SampledStep:
    """One step and the loss of each sample of its batch.

    `losses`: in batch order, [samples]. `baseline_nats`: what the detector held for normal, None if
    it was not asked. `is_reported`: False for the step in flight when the trouble was found.
    """

    step: int
    clock: int
    cursor_before: int
    baseline_nats: float | None
    is_reported: bool
    losses: Losses
    num_ranks: int

    @property
    def reference_nats(self) -> float:
        """What a sample is compared with: the baseline, or the median of the batch if lower."""
        finite = self.losses[np.isfinite(self.losses)]
        median = _median(finite) if len(finite) else math.inf
        return min(median, math.inf if self.baseline_nats is None else self.baseline_nats)

    def by_rank(self) -> Losses:
        """Return the mean loss of each rank's samples, [ranks]."""
        means: Losses = self.losses.reshape(self.num_ranks, -1).mean(axis=1)
        return means


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspect:
    """One sample: the `place`-th of the batch that was read at `cursor_before`."""

    step: int
    clock: int
    cursor_before: int
    num_samples: int
    place: int
    rank: int
    loss_nats: float
    excess_nats: float


def last_steps(losses: Sequence[Sequence[float]], present: TrainState, onset_step: int) -> int:
    """Return how many of the last steps belong to an incident, of those whose losses are known."""
    wanted = present.step - (onset_step - NUM_STEPS_BEFORE_ONSET) + 1
    return max(0, min(len(losses), wanted))


def pair(
    by_rank: Sequence[Sequence[Losses]], log: FlightLog, present: TrainState
) -> list[SampledStep]:
    """Return the steps that `by_rank`, each rank's losses in the last steps, belongs to.

    The last entry is that of the step that led to `present`: each step moves the clock by one, and
    the losses of steps before a load are forgotten. Each rank holds one contiguous block of a
    batch. A step that no one has logged is left out.
    """
    num_steps = min((len(steps) for steps in by_rank), default=0)
    paired: list[SampledStep] = []
    for age in range(num_steps - 1, -1, -1):
        blocks = [steps[len(steps) - 1 - age] for steps in by_rank]
        if len({len(block) for block in blocks}) != 1 or not len(blocks[0]):
            continue
        clock = present.clock - age
        logged = log.at_clock(clock)
        is_in_flight = age == 0 and log.state.clock == clock - 1
        if logged is None and not is_in_flight:
            continue
        verdict = logged.report.verdict if logged is not None else None
        baseline = verdict.baseline_nats if verdict is not None else None
        if baseline is None and paired:
            baseline = paired[-1].baseline_nats
        paired.append(
            SampledStep(
                step=present.step - age,
                clock=clock,
                cursor_before=logged.before.cursor if logged is not None else log.state.cursor,
                baseline_nats=baseline,
                is_reported=logged is not None,
                losses=np.concatenate(blocks).astype(np.float64),
                num_ranks=len(blocks),
            )
        )
    return paired


def worst_samples(steps: Sequence[SampledStep], onset_step: int) -> list[Suspect]:
    """Return the samples with the highest losses over what was normal, worst first.

    Half of the places go to the steps up to the onset, as far as there are: later losses may be
    high because the state has suffered. A loss that is not finite is the worst of all.
    """
    early = _ranked([step for step in steps if step.step <= onset_step])
    late = _ranked([step for step in steps if step.step > onset_step])
    num_early = max(NUM_SUSPECTS // 2, NUM_SUSPECTS - len(late))
    chosen = early[:num_early]
    chosen += late[: NUM_SUSPECTS - len(chosen)]
    return sorted(chosen, key=_worst_first)


def _ranked(steps: Sequence[SampledStep]) -> list[Suspect]:
    found = []
    for step in steps:
        reference = step.reference_nats
        # Without one finite loss there is nothing to compare with; all are equally bad.
        excess = step.losses - (reference if math.isfinite(reference) else 0.0)
        excess = np.where(np.isfinite(step.losses), excess, math.inf)
        share = len(excess) // step.num_ranks
        for place in np.argsort(-excess, kind="stable")[:NUM_SUSPECTS].tolist():
            found.append(
                Suspect(
                    step=step.step,
                    clock=step.clock,
                    cursor_before=step.cursor_before,
                    num_samples=len(excess),
                    place=place,
                    rank=place // share,
                    loss_nats=float(step.losses[place]),
                    excess_nats=float(excess[place]),
                )
            )
    return sorted(found, key=_worst_first)


def _worst_first(suspect: Suspect) -> tuple[float, int, int]:
    return -suspect.excess_nats, suspect.clock, suspect.place


@dataclass(frozen=True, slots=True, kw_only=True)
class OddRanks:
    """Ranks whose own losses at `step` are not like those of the others, and why."""

    step: int
    ranks: tuple[int, ...]
    reason: str


def odd_ranks(steps: Sequence[SampledStep], onset_step: int) -> OddRanks | None:
    """Return the ranks that stood out first, or None if all ranks suffered alike.

    Either some, but not all, had losses that are not finite; or, from the onset on, one alone was
    high. All replicas read other samples but hold the same state, so a lone high rank has bad
    samples or a bad device.
    """
    for step in steps:
        means = step.by_rank()
        if len(means) < 2:
            return None
        bad = np.flatnonzero(~np.isfinite(means))
        if len(bad) == len(means):
            return None  # by now it has spread
        if len(bad):
            return OddRanks(
                step=step.step,
                ranks=tuple(bad.tolist()),
                reason="loss not finite, while other ranks' losses were",
            )
        if step.step < onset_step:
            continue
        reference = step.baseline_nats
        excess = means - (_median(means) if reference is None else reference)
        top, following = np.argsort(-excess, kind="stable")[:2].tolist()
        if excess[top] > 0:
            if excess[following] > _SHARE_OF_THE_NEXT * excess[top]:
                return None
            return OddRanks(
                step=step.step,
                ranks=(top,),
                reason=f"loss of {means[top]:.3f} nats, while the next highest rank had "
                f"{means[following]:.3f}",
            )
    return None


def _median(values: Losses) -> float:
    """Return the upper median; numpy's own loads masked arrays first, which takes 20 ms."""
    return float(np.sort(values)[len(values) // 2])
