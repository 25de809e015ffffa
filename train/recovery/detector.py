"""Loss-spike detector: numbers in, verdict out. Standard library alone; no torch, no clock, no I/O.

What separates a spike from noise is persistence and the run's own noise, not height. Therefore:
the level is the median, and the noise the MAD, of log values over *accepted* steps alone, so that
a spike never enters its own baseline; one high step is an outlier, several within a few steps are
a spike; and the lock-out is bounded: a level that holds for `max_flagged_steps` is accepted as a
level shift, so a lasting change is never an endless spike.

Every rank runs it on the same globally reduced numbers and so reaches the same verdict. Its state
is part of every checkpoint and is rewound with the model: there is no blind period after a resume.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

# 1.4826 MAD estimates the standard deviation of normal noise.
_MAD_TO_SIGMA = 1.4826
# A run's logged loss moves by at least this share from step to step; guards against a zero MAD.
_MIN_SIGMA = 0.004
# Before there is a baseline, only a loss this many times the lowest so far is called absurd.
_ABSURD_RATIO = 1.6


class VerdictKind(StrEnum):
    """What a step is."""

    WARMUP = "warmup"
    OK = "ok"
    OUTLIER = "outlier"
    SPIKE = "spike"
    DIVERGENCE = "divergence"
    LEVEL_SHIFT = "level_shift"
    NONFINITE = "nonfinite"
    SUSPICIOUSLY_LOW = "suspiciously_low"
    RESUME_DISCONTINUITY = "resume_discontinuity"


CALM_KINDS = frozenset({VerdictKind.OK, VerdictKind.WARMUP, VerdictKind.LEVEL_SHIFT})
ROLLBACK_KINDS = frozenset(
    {
        VerdictKind.SPIKE,
        VerdictKind.DIVERGENCE,
        VerdictKind.NONFINITE,
        VerdictKind.RESUME_DISCONTINUITY,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The judgement of one step.

    `onset_step` is the first step of the stretch that this step belongs to. `deviation` is in
    robust standard deviations of the log loss above `baseline_nats`. `led_by` names the signal
    that left its band first, `lead_steps` by how many steps.
    """

    kind: VerdictKind
    step: int
    onset_step: int
    deviation: float = 0.0
    baseline_nats: float | None = None
    sigma: float = 0.0
    led_by: str = "loss"
    lead_steps: int = 0

    @property
    def is_calm(self) -> bool:
        """True if nothing is wrong with the step."""
        return self.kind in CALM_KINDS

    @property
    def needs_rollback(self) -> bool:
        """True if a veto of one update is not enough."""
        return self.kind in ROLLBACK_KINDS


class RobustBaseline:
    """Median level and MAD noise of the log of one positive signal over its accepted values.

    `window` values are kept. The noise is that of the residuals at acceptance, so a falling loss
    does not inflate it.
    """

    def __init__(self, window: int) -> None:
        self.values: deque[float] = deque(maxlen=window)
        self.residuals: deque[float] = deque(maxlen=2 * window)
        self._num_accepted = 0
        self._level = 0.0
        self._sigma = _MIN_SIGMA

    def __len__(self) -> int:
        return len(self.values)

    def is_known(self, num_steps: int) -> bool:
        """True once `num_steps` values were accepted; a new level keeps what is known."""
        return self._num_accepted >= num_steps

    @property
    def level(self) -> float:
        """Median of the accepted log values."""
        return self._level

    @property
    def sigma(self) -> float:
        """Robust standard deviation of the accepted log values around their level."""
        return self._sigma

    def deviation(self, log_value: float) -> float:
        """Return how many robust standard deviations `log_value` lies above the level."""
        return (log_value - self._level) / self._sigma

    def accept(self, log_value: float) -> None:
        """Let a value into the baseline."""
        if self.values:
            self.residuals.append(log_value - self._level)
        self.values.append(log_value)
        self._num_accepted += 1
        self._refresh()

    def reanchor(self, log_values: Sequence[float]) -> None:
        """Forget the level and start from `log_values`, keeping the known noise."""
        self.values.clear()
        self.values.extend(log_values)
        self._refresh()

    def _refresh(self) -> None:
        self._level = _median(sorted(self.values))
        if len(self.residuals) >= 4:
            centre = _median(sorted(self.residuals))
            spread = _median(sorted(abs(value - centre) for value in self.residuals))
            self._sigma = max(_MIN_SIGMA, _MAD_TO_SIGMA * spread)

    def state_dict(self) -> dict[str, object]:
        """Return the state as JSON values."""
        return {
            "values": list(self.values),
            "residuals": list(self.residuals),
            "num_accepted": self._num_accepted,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the state of another instance."""
        self.values = deque(state["values"], maxlen=self.values.maxlen)
        self.residuals = deque(state["residuals"], maxlen=self.residuals.maxlen)
        self._num_accepted = state["num_accepted"]
        self._level, self._sigma = 0.0, _MIN_SIGMA
        if self.values:
            self._refresh()


class SpikeDetector:
    """Judge each step by its loss and gradient norm.

    `window`: accepted steps in the baseline. `warm_up_steps`: steps before the band is trusted;
    until then non-finite and absurd values alone are flagged. `threshold`: robust standard
    deviations that make a step high. `persistence`: high steps, within `persistence + 1` steps,
    that make a spike. `max_flagged_steps`: high steps in a row after which the level is accepted.
    """

    def __init__(
        self,
        *,
        window: int = 48,
        warm_up_steps: int = 16,
        threshold: float = 6.0,
        persistence: int = 2,
        max_flagged_steps: int = 100,
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
        self._grad_norm = RobustBaseline(window)
        self._recent: deque[bool] = deque(maxlen=persistence + 1)
        self._flagged_logs: deque[float] = deque(maxlen=max(4, window // 4))
        self._onset_step: int | None = None
        self._num_flagged = 0
        self._grad_high_since: int | None = None

    def announce(self, step: int, num_steps: int | None = None) -> None:
        """Say that a known change takes effect at `step`."""

    def resumed(self) -> None:
        """Say that the next update is the first after a resume or a rewind."""

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
        """Judge one step and take it into the baseline if it is accepted.

        `loss_nats`: mean loss in nats a token; `grad_norm`: norm before clipping, None if unknown.
        """
        if (
            not math.isfinite(loss_nats)
            or (grad_norm is not None and not math.isfinite(grad_norm))
            or not all(map(math.isfinite, group_norms))
            or (nonfinite_share is not None and not nonfinite_share <= 0)
        ):
            return self._flag(step, VerdictKind.NONFINITE, math.inf)
        log_loss = math.log(max(loss_nats, 1e-9))
        self._watch_grad_norm(step, grad_norm)
        if not self._loss.is_known(self.warm_up_steps):
            return self._warm_up(step, log_loss, grad_norm)
        deviation = self._loss.deviation(log_loss)
        is_high = deviation > self.threshold
        self._recent.append(is_high)
        if not is_high:
            self._clear_if_calm()
            self._accept(log_loss, grad_norm)
            return self._verdict(VerdictKind.OK, step, step, deviation)
        self._flagged_logs.append(log_loss)
        if self._is_level(step):
            return self._accept_level(step, deviation)
        is_spike = sum(self._recent) >= self.persistence
        kind = VerdictKind.SPIKE if is_spike else VerdictKind.OUTLIER
        return self._flag(step, kind, deviation)

    def limits(self) -> tuple[float, float]:
        """Return the highest loss in nats and the highest gradient norm that are not outliers."""
        if not self._loss.is_known(self.warm_up_steps):
            return math.inf, math.inf
        loss = math.exp(self._loss.level + self.threshold * self._loss.sigma)
        norm = math.inf
        if self._grad_norm.is_known(self.warm_up_steps):
            # Gradient norms are heavy-tailed: only an extreme one is an outlier by itself.
            exponent = self._grad_norm.level + 3 * self.threshold * self._grad_norm.sigma
            norm = math.exp(min(exponent, 700.0))
        return loss, norm

    def _watch_grad_norm(self, step: int, grad_norm: float | None) -> None:
        if grad_norm is None or not self._grad_norm.is_known(self.warm_up_steps):
            return
        is_high = self._grad_norm.deviation(math.log(max(grad_norm, 1e-12))) > self.threshold
        if not is_high:
            self._grad_high_since = None
        elif self._grad_high_since is None:
            self._grad_high_since = step

    def _warm_up(self, step: int, log_loss: float, grad_norm: float | None) -> Verdict:
        is_absurd = len(self._loss) > 0 and log_loss > min(self._loss.values) + math.log(
            _ABSURD_RATIO
        )
        self._recent.append(is_absurd)
        if is_absurd and self._num_flagged + 1 < self.max_flagged_steps:
            is_spike = sum(self._recent) >= self.persistence
            kind = VerdictKind.SPIKE if is_spike else VerdictKind.OUTLIER
            return self._flag(step, kind, self._loss.deviation(log_loss))
        self._clear_if_calm()
        self._accept(log_loss, grad_norm)
        return self._verdict(VerdictKind.WARMUP, step, step, 0.0)

    def _flag(self, step: int, kind: VerdictKind, deviation: float) -> Verdict:
        if self._onset_step is None:
            self._onset_step = step
        if kind is not VerdictKind.NONFINITE:  # a run of NaN is no level that could be accepted
            self._num_flagged += 1
        return self._verdict(kind, step, self._onset_step, deviation)

    def _accept(self, log_loss: float, grad_norm: float | None) -> None:
        self._loss.accept(log_loss)
        if grad_norm is not None and grad_norm > 0:
            self._grad_norm.accept(math.log(grad_norm))

    def _is_level(self, step: int) -> bool:
        """True if enough steps were high, and most of those since the onset."""
        onset = self._onset_step if self._onset_step is not None else step
        num_high = self._num_flagged + 1
        return num_high >= self.max_flagged_steps and 2 * num_high > step - onset

    def _accept_level(self, step: int, deviation: float) -> Verdict:
        onset = self._onset_step if self._onset_step is not None else step
        verdict = self._verdict(VerdictKind.LEVEL_SHIFT, step, onset, deviation)
        self._loss.reanchor(list(self._flagged_logs))
        self._reset_stretch()
        return verdict

    def _clear_if_calm(self) -> None:
        if not any(self._recent):
            self._reset_stretch()

    def _reset_stretch(self) -> None:
        self._onset_step = None
        self._num_flagged = 0
        self._recent.clear()
        self._flagged_logs.clear()

    def _verdict(self, kind: VerdictKind, step: int, onset_step: int, deviation: float) -> Verdict:
        led_by, lead_steps = "loss", 0
        if self._grad_high_since is not None and self._grad_high_since < onset_step:
            led_by, lead_steps = "grad_norm", onset_step - self._grad_high_since
        return Verdict(
            kind=kind,
            step=step,
            onset_step=onset_step,
            deviation=deviation,
            baseline_nats=math.exp(self._loss.level) if len(self._loss) else None,
            sigma=self._loss.sigma,
            led_by=led_by,
            lead_steps=lead_steps,
        )

    def state_dict(self) -> dict[str, object]:
        """Return all state as JSON values; it belongs in every checkpoint."""
        return {
            "loss": self._loss.state_dict(),
            "grad_norm": self._grad_norm.state_dict(),
            "recent": list(self._recent),
            "flagged_logs": list(self._flagged_logs),
            "onset_step": self._onset_step,
            "num_flagged": self._num_flagged,
            "grad_high_since": self._grad_high_since,
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take up the state of another instance with the same settings."""
        loss, grad_norm = state["loss"], state["grad_norm"]
        recent, flagged_logs = state["recent"], state["flagged_logs"]
        onset, since, flagged = state["onset_step"], state["grad_high_since"], state["num_flagged"]
        assert isinstance(loss, Mapping) and isinstance(grad_norm, Mapping)
        assert isinstance(recent, Sequence) and isinstance(flagged_logs, Sequence)
        assert isinstance(flagged, int)
        assert onset is None or isinstance(onset, int)
        assert since is None or isinstance(since, int)
        self._loss.load_state_dict(loss)
        self._grad_norm.load_state_dict(grad_norm)
        self._recent = deque(recent, maxlen=self._recent.maxlen)
        self._flagged_logs = deque(flagged_logs, maxlen=self._flagged_logs.maxlen)
        self._onset_step, self._num_flagged, self._grad_high_since = onset, flagged, since


def _median(ordered: Sequence[float]) -> float:
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) / 2


def default_detector() -> SpikeDetector:
    """Return the detector with its default settings, for replaying any curve."""
    return SpikeDetector(has_low_verdict=False)
