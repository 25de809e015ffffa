"""How often to save: often enough that a failure costs little, seldom enough that saving does.

Owns the arithmetic. Refuses to measure anything: `train/callbacks/checkpointing.py` hands in what
rank 0 has measured, so that all ranks come to the same interval. Standard library alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_SECONDS_A_DAY = 86400.0
# 419 unexpected interruptions in 54 days on 16,384 GPUs. Source: The Llama 3 Herd of Models, arXiv
# 2407.21783, section 3.3.4 and table 5.
_PRIOR_FAILURES_A_DAY_AND_RANK = 419 / 54 / 16384
_PRIOR_DAYS = 7.0
# A save that stops nobody still takes disk and network: at most half of the time goes into saving.
_MAX_SAVING_SHARE = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureRate:
    """How often the whole job fails, and how that is known."""

    per_day: float
    source: str

    @property
    def mean_seconds_between(self) -> float:
        """Mean time between failures."""
        return _SECONDS_A_DAY / self.per_day


def configured_rate(per_day: float) -> FailureRate:
    """Return the rate that a person has set."""
    return FailureRate(per_day=per_day, source="checkpoint.failures_per_day")


def observed_rate(num_failures: int, days: float, *, num_ranks: int) -> FailureRate:
    """Return the rate of a run that has failed so often in so many days of training.

    What is usual on so many ranks counts like a week of observation, so that a young run is not
    taken for one that never fails.
    """
    usual = _PRIOR_FAILURES_A_DAY_AND_RANK * num_ranks
    per_day = (usual * _PRIOR_DAYS + num_failures) / (_PRIOR_DAYS + max(0.0, days))
    seen = f"{num_failures} seen in {days:.1f} days, {usual:.2g} a day usual on {num_ranks} ranks"
    return FailureRate(per_day=per_day, source=seen)


def count_failures(events: Iterable[Mapping[str, object]]) -> tuple[int, float]:
    """Return how often a run has failed so far, and for how many days it has trained.

    `events`: of `events.jsonl`, oldest first. A start that was followed by another one, without the
    end of a run in between, has failed: killed by whatever it was, a person among them.
    """
    num_failures, seconds = 0, 0.0
    begun: float | None = None
    last = 0.0
    for event in events:
        time = event.get("time")
        if not isinstance(time, int | float):
            continue
        if event.get("kind") == "run_start":
            if begun is not None:
                num_failures, seconds = num_failures + 1, seconds + max(0.0, last - begun)
            begun = float(time)
        elif event.get("kind") == "run_end" and begun is not None:
            seconds, begun = seconds + max(0.0, float(time) - begun), None
        last = float(time)
    if begun is not None:  # asked at a start: what came before it has failed
        num_failures, seconds = num_failures + 1, seconds + max(0.0, last - begun)
    return num_failures, seconds / _SECONDS_A_DAY


def best_interval_seconds(save_seconds: float, mean_seconds_between_failures: float) -> float:
    """Return the seconds of work between saves that lose the least, by saving and by failing.

    `save_seconds`: what training waits for one save. The first term is Young's; the others are
    right where a save takes long.

    Source: J. W. Young, A First Order Approximation to the Optimum Checkpoint Interval, CACM 17(9),
    1974; J. T. Daly, A Higher Order Estimate of the Optimum Checkpoint Interval for Restart Dumps,
    FGCS 22(3), 2006, equation 37.
    """
    if save_seconds >= 2 * mean_seconds_between_failures:
        return mean_seconds_between_failures
    ratio = save_seconds / (2 * mean_seconds_between_failures)
    young = math.sqrt(2 * save_seconds * mean_seconds_between_failures)
    return young * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """Steps between saves, and the words that say why."""

    steps: int
    reason: str


def choose_interval(
    *,
    stall_seconds: float,
    save_seconds: float,
    step_seconds: float,
    rate: FailureRate,
    max_steps: int,
    max_minutes: float,
) -> Interval:
    """Return the best interval within its bounds.

    `stall_seconds`: what training waits for a save; `save_seconds`: until it is durable, more if it
    is written beside training. Bounds: `max_steps`, `max_minutes` of work, and at the other end
    enough time that a save is done long before the next one.
    """
    best = best_interval_seconds(stall_seconds, rate.mean_seconds_between)
    seconds, bound = best, ""
    if max_minutes * 60 < seconds:
        seconds, bound = max_minutes * 60, f"checkpoint.max_minutes_at_risk={max_minutes:g}"
    least = save_seconds / _MAX_SAVING_SHARE
    if least > seconds:
        seconds, bound = least, f"twice the {save_seconds:.3g} s that a save takes"
    steps = max(1, round(seconds / max(step_seconds, 1e-9)))
    if steps > max_steps:
        steps, bound = max_steps, f"checkpoint.max_interval_steps={max_steps}"
    return Interval(
        steps=steps,
        reason=(
            f"a save every {steps} steps, {_duration(steps * step_seconds)}: a save stops "
            f"training for {stall_seconds:.3g} s, a step takes {step_seconds:.3g} s, "
            f"{rate.per_day:.3g} failures a day ({rate.source}); the optimum is {_duration(best)}"
            f"{f', bounded by {bound}' if bound else ''}"
        ),
    )


def _duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 60 else f"{seconds / 60:.3g} min"
