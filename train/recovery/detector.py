"""Loss-spike detector: numbers in, verdict out. Standard library alone; no torch, no clock, no I/O.

What separates a spike from noise is persistence and the run's own noise, not height. Therefore
each step adds evidence, its deviation in robust standard deviations less a slack (Page's cumulative
sum, Biometrika 41, 1954), and no step adds more than an outlier's worth:

    one outlier's worth            outlier: veto the update at most
    one and a half, at step three  spike
    eight steps flagged            spike, even if they are outliers only together

A plateau with all norms calm is not a spike but another level (`Stretch.is_plateau`).

Accepted steps alone make the baseline, so that a spike never enters its own. The lock-out is
bounded: a level that holds for `max_flagged_steps` is accepted, and after `max_vetoed_steps` the
limits open. A rise inside the band is found over hundreds of steps (`SlowRise`).

Every rank runs it on the same globally reduced numbers and so reaches the same verdict, without a
collective. Its state is part of every checkpoint and is rewound with the model: there is no blind
period after a resume.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from train.recovery.baseline import (
    RobustBaseline,
    exp,
    number,
    numbers,
    optional_integer,
    part,
)
from train.recovery.evidence import ABSURD, HIGH_SIGMA, LEAST_PEAK, SlowRise, Stretch, Trace
from train.recovery.norms import Norms
from train.recovery.verdict import CALM_KINDS, ROLLBACK_KINDS, Verdict, VerdictKind

__all__ = [
    "CALM_KINDS",
    "ROLLBACK_KINDS",
    "SpikeDetector",
    "Verdict",
    "VerdictKind",
    "default_detector",
]

# The least fall that is worth a word.
_LEAST_FALL = math.log(1 / 0.9)
# An announced change widens the band by this factor at least.
_ANNOUNCED_FACTOR = 2.0
# Gradient norms are heavy-tailed: only one this many times further out is an outlier by itself.
_NORM_FACTOR = 3.0
_LOWEST_LOSS = 1e-9


class SpikeDetector:
    """Judge each step by its loss and gradient norm.

    `window`: accepted steps in the baseline; the memory of the noise (3 windows) and of slow rises
    (8 windows) follow from it. `warm_up_steps`: steps before the band is trusted; until then
    non-finite and absurd values alone are flagged. `threshold`: robust standard deviations that
    make one step an outlier. `persistence`: how many more steps must confirm an outlier before it
    is a spike. `max_flagged_steps`: flagged steps after which a level is accepted.
    `max_vetoed_steps`: flagged steps in a row after which the limits open until the run is calm.
    `announced_steps`: how long an announced change widens the band. `has_low_verdict`: whether a
    loss that falls far below its band is news.
    """

    def __init__(
        self,
        *,
        window: int = 64,
        warm_up_steps: int = 16,
        threshold: float = 6.0,
        persistence: int = 2,
        max_flagged_steps: int = 32,
        max_vetoed_steps: int = 4,
        announced_steps: int = 32,
        has_low_verdict: bool = True,
    ) -> None:
        self.window = window
        self.warm_up_steps = warm_up_steps
        self.threshold = threshold
        self.persistence = persistence
        self.max_flagged_steps = max_flagged_steps
        self.max_vetoed_steps = max_vetoed_steps
        self.announced_steps = announced_steps
        self.has_low_verdict = has_low_verdict
        self._loss = RobustBaseline(window)
        self._norms = Norms(
            window=window,
            warm_up_steps=warm_up_steps,
            threshold=threshold,
            persistence=persistence,
        )
        self._slow_rise = SlowRise(max(4, window // 8))
        self._stretch = Stretch(threshold, persistence)
        self._trace = Trace(window // 2)
        self._announced: list[list[int]] = []
        self._low_logs: list[float] = []
        self._low_since: int | None = None
        self._num_low = 0
        self._settling_logs: list[float] = []
        self._last_step: int | None = None
        self._num_vetoed = 0
        self._num_diverging = 0
        self._nonfinite_since: int | None = None
        self._is_resuming = False
        self._resumed_at: int | None = None

    def update(
        self,
        step: int,
        loss_nats: float,
        grad_norm: float | None = None,
        *,
        update_norm: float | None = None,
        group_norms: Sequence[float] = (),
        nonfinite_share: float | None = None,
    ) -> Verdict:
        """Judge one step and take it into the baseline if it is accepted. Never raises.

        `loss_nats`: mean loss in nats a token; `grad_norm`: norm before clipping; `update_norm`:
        norm of the applied update, unknown if not finite; `group_norms`: gradient norm of each
        layer group; `nonfinite_share`: share of gradient values that are not finite. None: unknown.
        """
        is_finite = (
            math.isfinite(loss_nats)
            and (grad_norm is None or math.isfinite(grad_norm))
            and (nonfinite_share is None or nonfinite_share <= 0)
            and all(map(math.isfinite, group_norms))
        )
        self._begin(step)
        if not is_finite:
            verdict = self._nonfinite(step)
        else:
            self._nonfinite_since = None
            norm_deviation = self._norms.watch(step, grad_norm, update_norm, group_norms)
            log_loss = math.log(max(loss_nats, _LOWEST_LOSS))
            verdict, is_accepted = self._judge(step, log_loss, norm_deviation)
            if is_accepted:
                self._norms.accept()
        self._num_vetoed = 0 if verdict.is_calm else self._num_vetoed + 1
        return verdict

    def announce(self, step: int, num_steps: int | None = None) -> None:
        """Say that a known change takes effect at `step`: a ramp, a restart, a new mixture.

        For `num_steps` (default: `announced_steps`) from then on the band is at least twice as
        wide and reaches at least to twice the level; a loss that settles elsewhere inside it is a
        level shift after `window // 8` steps; slow rises and low losses are not looked for.
        """
        end = step + (self.announced_steps if num_steps is None else num_steps)
        is_past = self._last_step is not None and end <= self._last_step + 1
        if end > step and not is_past and [step, end] not in self._announced:
            self._announced.append([step, end])

    def resumed(self) -> None:
        """Say that the next update is the first after a resume or a rewind.

        A spike that begins at that very update, and of which each step is high, is a
        `resume_discontinuity` from the step before on. Nothing else changes.
        """
        self._is_resuming = True

    def limits(self) -> tuple[float, float]:
        """Return the highest loss in nats and gradient norm that the next step may have.

        A step above them is an outlier, and the device refuses its update. Both are infinite while
        nothing is known, and from `max_vetoed_steps` flagged steps in a row until a calm one: an
        update is never refused for ever. After an announced change they are as wide as its band.
        """
        if self._num_vetoed >= self.max_vetoed_steps or not len(self._loss):
            return math.inf, math.inf
        is_announced = self._is_announced((self._last_step or 0) + 1)
        level, width = self._band(is_announced)
        factor = _NORM_FACTOR * (_ANNOUNCED_FACTOR if is_announced else 1.0)
        highest = self._norms.highest_log(factor * self.threshold)
        return exp(level + width), exp(highest) if highest < math.inf else math.inf

    def _begin(self, step: int) -> None:
        """Take note of a new step: its number, and whether it is the first after a resume."""
        if self._announced:
            self._announced = [span for span in self._announced if span[1] > step]
        if self._is_resuming:
            self._is_resuming = False
            self._resumed_at = None if self._stretch.num_flagged else step
        self._last_step = step

    def _nonfinite(self, step: int) -> Verdict:
        if self._nonfinite_since is None:
            self._nonfinite_since = step
        return self._verdict(VerdictKind.NONFINITE, step, self._nonfinite_since, math.inf)

    def _judge(self, step: int, log_loss: float, norm_deviation: float) -> tuple[Verdict, bool]:
        """Return the verdict of a finite step and whether it was accepted."""
        loss = self._loss
        is_warm_up = loss.num_accepted < self.warm_up_steps
        is_announced = self._is_announced(step)
        level, width = self._band(is_announced)
        rise = log_loss - level if len(loss) else 0.0
        deviation = self.threshold * rise / width
        if not is_warm_up and not is_announced and -rise > max(width, _LEAST_FALL):
            return self._fallen(step, log_loss, deviation)
        self._low_logs, self._low_since = [], None
        worth, is_confirmed = deviation, False
        if is_warm_up or is_announced:  # the level is not known yet: a step is absurd or nothing
            worth = deviation if deviation > self.threshold else 0.0
        else:
            is_norm_high = norm_deviation > self.threshold or self._norms.is_update_outside
            is_confirmed = is_norm_high and deviation > HIGH_SIGMA
            loss.observe(log_loss)
        stretch = self._stretch
        if stretch.add(step, worth, rise, is_confirmed, self._norms.are_calm):
            stretch.led_by, stretch.lead_steps = self._norms.leader(step)
        if worth <= HIGH_SIGMA:
            self._resumed_at = None
        if stretch.is_flagged(worth):
            return self._flag(step, log_loss, deviation, rise), False
        if is_announced and rise > self.threshold / 2 * loss.noise:
            return self._settle(step, log_loss, deviation)
        self._settling_logs = []
        if self._trace.add(log_loss, loss.sigma):
            return self._verdict(VerdictKind.SPIKE, step, self._trace.onset_step, deviation), False
        loss.accept(log_loss)
        kind, onset_step = VerdictKind.WARMUP if is_warm_up else VerdictKind.OK, step
        if is_announced:
            self._slow_rise.reset()
        elif not is_warm_up:
            kind, onset_step = self._follow(step, log_loss)
        if kind is VerdictKind.OK and norm_deviation > _NORM_FACTOR * self.threshold:
            kind = VerdictKind.OUTLIER
        return self._verdict(kind, step, onset_step, deviation), True

    def _band(self, is_announced: bool) -> tuple[float, float]:
        """Return the log level and how far above it an outlier begins."""
        loss = self._loss
        if loss.num_accepted < self.warm_up_steps:
            return (loss.lowest if len(loss) else 0.0), ABSURD
        width = self.threshold * loss.noise
        return loss.level, max(_ANNOUNCED_FACTOR * width, ABSURD) if is_announced else width

    def _is_announced(self, step: int) -> bool:
        return any(start <= step < end for start, end in self._announced)

    def _flag(self, step: int, log_loss: float, deviation: float, rise: float) -> Verdict:
        """Return the verdict of a step of a stretch that is flagged."""
        stretch = self._stretch
        onset = stretch.onset_step if stretch.onset_step is not None else step
        stretch.flag(log_loss, self.window // 2)
        if stretch.is_level(self.max_flagged_steps):
            verdict = self._verdict(VerdictKind.LEVEL_SHIFT, step, onset, deviation)
            self._start_level(stretch.logs)
            return verdict
        is_plateau = stretch.is_plateau(self._loss.noise) and not self._norms.stay_high
        if rise > LEAST_PEAK and not is_plateau:
            self._trace.start(onset, self._loss.level)
        kind = VerdictKind.OUTLIER
        if stretch.is_spike and self._resumed_at is not None and onset == self._resumed_at:
            kind, onset = VerdictKind.RESUME_DISCONTINUITY, onset - 1
        elif stretch.is_spike and not is_plateau:
            kind = VerdictKind.SPIKE
        return self._verdict(kind, step, onset, deviation)

    def _fallen(self, step: int, log_loss: float, deviation: float) -> tuple[Verdict, bool]:
        """Hold back a value far below the band; accept its level if it stays."""
        if self._low_since is None:
            self._low_since, self._num_low = step, 0
        self._num_low += 1
        self._low_logs = [*self._low_logs[-(self.window // 2) + 1 :], log_loss]
        onset = self._low_since
        if self._num_low >= self.max_flagged_steps:
            verdict = self._verdict(VerdictKind.LEVEL_SHIFT, step, onset, deviation)
            self._start_level(self._low_logs)
            return verdict, False
        is_news = self.has_low_verdict and self._num_low >= self.persistence
        kind = VerdictKind.SUSPICIOUSLY_LOW if is_news else VerdictKind.OK
        return self._verdict(kind, step, onset, deviation), False

    def _settle(self, step: int, log_loss: float, deviation: float) -> tuple[Verdict, bool]:
        """Hold back a high value after an announced change; accept its level soon."""
        self._settling_logs.append(log_loss)
        if len(self._settling_logs) < max(2, self.window // 8):
            return self._verdict(VerdictKind.OK, step, step, deviation), False
        verdict = self._verdict(VerdictKind.LEVEL_SHIFT, step, step, deviation)
        self._start_level(self._settling_logs)
        return verdict, False

    def _follow(self, step: int, log_loss: float) -> tuple[VerdictKind, int]:
        """Look for a slow rise over the accepted steps; a lasting one becomes the level."""
        rise = self._slow_rise
        rise.accept(step, log_loss, self._loss.noise)
        onset = rise.onset_step
        self._num_diverging = self._num_diverging + 1 if rise.is_divergence else 0
        lock_out = self.max_flagged_steps
        if self._num_diverging >= lock_out or rise.is_level(lock_out):
            self._num_diverging = 0
            rise.reset()
            return VerdictKind.LEVEL_SHIFT, onset
        if rise.is_divergence:
            return VerdictKind.DIVERGENCE, onset
        if rise.is_suspect:
            return VerdictKind.OUTLIER, rise.onset_step
        return VerdictKind.OK, step

    def _start_level(self, logs: Sequence[float]) -> None:
        """Take the level of `logs` for the new one."""
        self._loss.reanchor(logs)
        self._slow_rise.reset()
        self._num_diverging = 0
        self._stretch.clear()
        self._trace.clear()
        self._low_logs, self._settling_logs, self._low_since = [], [], None
        self._resumed_at = None

    def _verdict(self, kind: VerdictKind, step: int, onset_step: int, deviation: float) -> Verdict:
        led_by, lead_steps = "loss", 0
        if kind not in CALM_KINDS and self._stretch.onset_step is not None:
            led_by, lead_steps = self._stretch.led_by, self._stretch.lead_steps
        return Verdict(
            kind=kind,
            step=step,
            onset_step=onset_step,
            deviation=deviation,
            baseline_nats=exp(self._loss.level) if len(self._loss) else None,
            sigma=self._loss.noise,
            led_by=led_by,
            lead_steps=lead_steps,
        )

    def state_dict(self) -> dict[str, object]:
        """Return all state as JSON values; it belongs in every checkpoint."""
        return {
            **{name: member.state_dict() for name, member in self._members().items()},
            "announced": [list(span) for span in self._announced],
            "low_logs": list(self._low_logs),
            "settling_logs": list(self._settling_logs),
            "num_vetoed": self._num_vetoed,
            "num_diverging": self._num_diverging,
            "num_low": self._num_low,
            "is_resuming": self._is_resuming,
            "last_step": self._last_step,
            "nonfinite_since": self._nonfinite_since,
            "low_since": self._low_since,
            "resumed_at": self._resumed_at,
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take up the state of another instance; of other settings, what fits."""
        for name, member in self._members().items():
            member.load_state_dict(part(state, name))
        spans = state.get("announced")
        self._announced = [list(span) for span in spans] if isinstance(spans, list) else []
        self._low_logs = numbers(state, "low_logs")
        self._settling_logs = numbers(state, "settling_logs")
        self._num_vetoed = int(number(state, "num_vetoed"))
        self._num_diverging = int(number(state, "num_diverging"))
        self._num_low = int(number(state, "num_low"))
        self._is_resuming = bool(state.get("is_resuming"))
        self._last_step = optional_integer(state, "last_step")
        self._nonfinite_since = optional_integer(state, "nonfinite_since")
        self._low_since = optional_integer(state, "low_since")
        self._resumed_at = optional_integer(state, "resumed_at")

    def _members(self) -> dict[str, RobustBaseline | Norms | SlowRise | Stretch | Trace]:
        return {
            "loss": self._loss,
            "norms": self._norms,
            "slow_rise": self._slow_rise,
            "stretch": self._stretch,
            "trace": self._trace,
        }


def default_detector() -> SpikeDetector:
    """Return the detector with its default settings, for replaying bare curves.

    It says nothing of a falling loss, which is news only to someone who knows the data.
    """
    return SpikeDetector(has_low_verdict=False)
