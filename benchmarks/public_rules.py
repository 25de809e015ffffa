"""The public loss-spike rules, each in a few lines, behind the interface of our detector.

Written from the rules' descriptions, for comparison: the same numbers in, a kind of verdict out.
They keep the published defaults and the published defects. `RULES` names them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Protocol

from train.recovery.detector import Verdict, VerdictKind

OK, OUTLIER, SPIKE = VerdictKind.OK, VerdictKind.OUTLIER, VerdictKind.SPIKE
DIVERGENCE, NONFINITE = VerdictKind.DIVERGENCE, VerdictKind.NONFINITE


class Rule(Protocol):
    """What a rule, and our detector, looks like: it judges one step at a time."""

    def update(
        self, step: int, loss_nats: float, grad_norm: float | None = None
    ) -> VerdictKind | Verdict:
        """Judge one step by its loss and gradient norm."""


class LightningSpikeDetection:
    """PyTorch Lightning's `SpikeDetection`: a rising loss far from the mean of the last ten.

    Far is `relative_tolerance` (2) times the mean. A spike stays out of the mean.
    Source: Lightning-AI/pytorch-lightning, fabric/utilities/spike.py (documented behaviour).
    """

    def __init__(self, relative_tolerance: float = 2.0, window: int = 10) -> None:
        self._tolerance = relative_tolerance
        self._accepted: deque[float] = deque(maxlen=window)

    def update(self, step: int, loss_nats: float, grad_norm: float | None = None) -> VerdictKind:
        """Judge one step."""
        if not math.isfinite(loss_nats):
            return NONFINITE
        if self._accepted:
            mean = sum(self._accepted) / len(self._accepted)
            is_rising = loss_nats > self._accepted[-1]
            if is_rising and abs(loss_nats - mean) >= self._tolerance * abs(mean):
                return SPIKE
        self._accepted.append(loss_nats)
        return OK


class FoundryKillLossSpike:
    """LLM-Foundry's `KillLossSpike`: more than `patience` losses in a row of `factor` window means.

    Half a window above the highest loss of the first window (at most 10) is a divergence. Every
    loss enters the window. Source: mosaicml/llm-foundry, callbacks/kill_loss_spike_callback.py.
    """

    def __init__(self, factor: float = 10.0, patience: int = 4, window: int = 100) -> None:
        self._factor, self._patience, self._window = factor, patience, window
        self._losses: deque[float] = deque(maxlen=window)
        self._cap: float | None = None
        self._num_steps = self._num_high = 0

    def update(self, step: int, loss_nats: float, grad_norm: float | None = None) -> VerdictKind:
        """Judge one step."""
        self._num_steps += 1
        verdict = self._judge(loss_nats) if len(self._losses) == self._window else OK
        self._losses.append(loss_nats)
        return verdict

    def _judge(self, loss: float) -> VerdictKind:
        if self._cap is None:
            self._cap = min(10.0, max(self._losses))
        is_high = loss >= self._factor * sum(self._losses) / self._window
        self._num_high = self._num_high + 1 if is_high else 0
        if self._num_high > self._patience:
            return SPIKE
        num_above = sum(value > self._cap for value in self._losses)
        is_late = self._num_steps > 2 * self._window
        return DIVERGENCE if is_late and 2 * num_above >= self._window else OK


class OlmoSkipStep:
    """OLMo-core's skip-step: a loss or gradient norm of six deviations above the last 128.

    On from half a window. Every value enters the window, the skipped ones too; comparing with NaN
    is false, so a window with a NaN skips everything. Source: allenai/OLMo-core, optim/skip_step_*.
    """

    def __init__(self, window: int = 128, num_sigmas: float = 6.0) -> None:
        self._num_sigmas, self._least = num_sigmas, window // 2 - 1
        self._losses: deque[float] = deque(maxlen=window)
        self._norms: deque[float] = deque(maxlen=window)

    def update(self, step: int, loss_nats: float, grad_norm: float | None = None) -> VerdictKind:
        """Judge one step."""
        is_skipped = not self._is_inside(self._losses, loss_nats)
        self._losses.append(loss_nats)
        if grad_norm is not None:
            is_skipped = is_skipped or not self._is_inside(self._norms, grad_norm)
            self._norms.append(grad_norm)
        if not is_skipped:
            return OK
        is_finite = math.isfinite(loss_nats) and (grad_norm is None or math.isfinite(grad_norm))
        return OUTLIER if is_finite else NONFINITE

    def _is_inside(self, window: deque[float], value: float) -> bool:
        if len(window) < self._least:
            return True
        mean = sum(window) / len(window)
        if not math.isfinite(mean):
            return False
        variance = sum((other - mean) ** 2 for other in window) / (len(window) - 1)
        return value - mean <= self._num_sigmas * math.sqrt(variance)


class MetaseqRatio:
    """metaseq: a loss of `ratio` times its exponential average (span 9) is skipped.

    The average takes accepted losses alone. Source: facebookresearch/metaseq, trainer.py.
    """

    def __init__(self, ratio: float = 1.1, span: int = 9) -> None:
        self._ratio, self._gain = ratio, 2 / (span + 1)
        self._average: float | None = None

    def update(self, step: int, loss_nats: float, grad_norm: float | None = None) -> VerdictKind:
        """Judge one step."""
        if not math.isfinite(loss_nats):
            return NONFINITE
        if self._average is None:
            self._average = loss_nats
        if loss_nats / self._average > self._ratio:
            return OUTLIER
        self._average += self._gain * (loss_nats - self._average)
        return OK


class MegatronSpikyLoss:
    """Megatron-LM's rerun machine: ten times the highest of the first hundred losses.

    Source: NVIDIA/Megatron-LM, core/rerun_state_machine.py.
    """

    def __init__(self, factor: float = 10.0, num_first: int = 100) -> None:
        self._factor, self._num_left, self._highest = factor, num_first, 0.0

    def update(self, step: int, loss_nats: float, grad_norm: float | None = None) -> VerdictKind:
        """Judge one step."""
        if not math.isfinite(loss_nats):
            return NONFINITE
        if self._num_left:
            self._num_left -= 1
            self._highest = max(self._highest, loss_nats)
            return OK
        return SPIKE if loss_nats >= self._factor * self._highest else OK


class ZClip:
    """ZClip: a gradient norm of 2.5 deviations above its exponential mean; 25 steps of warm-up.

    A flagged norm enters the averages at the clipped value. Source: arXiv 2504.02507.
    """

    def __init__(self, threshold: float = 2.5, decay: float = 0.97, warm_up: int = 25) -> None:
        self._threshold, self._decay, self._warm_up = threshold, decay, warm_up
        self._first: list[float] = []
        self._mean = self._variance = 0.0

    def update(self, step: int, loss_nats: float, grad_norm: float | None = None) -> VerdictKind:
        """Judge one step."""
        if grad_norm is None:
            return OK
        if not math.isfinite(grad_norm):
            return NONFINITE
        if len(self._first) < self._warm_up:
            self._first.append(grad_norm)
            self._mean = sum(self._first) / len(self._first)
            squares = [(norm - self._mean) ** 2 for norm in self._first]
            self._variance = sum(squares) / len(squares)
            return OK
        sigma = math.sqrt(self._variance)
        score = (grad_norm - self._mean) / (sigma + 1e-6)
        is_high = score > self._threshold
        taken = self._mean + self._threshold**2 / score * sigma if is_high else grad_norm
        self._mean = self._decay * self._mean + (1 - self._decay) * taken
        spread = (taken - self._mean) ** 2
        self._variance = self._decay * self._variance + (1 - self._decay) * spread
        return OUTLIER if is_high else OK


RULES: Mapping[str, Callable[[], Rule]] = {
    "Lightning SpikeDetection": LightningSpikeDetection,
    "LLM-Foundry KillLossSpike 10x": FoundryKillLossSpike,
    "LLM-Foundry KillLossSpike 2x": lambda: FoundryKillLossSpike(2.0),
    "OLMo skip-step": OlmoSkipStep,
    "metaseq ratio 1.1": MetaseqRatio,
    "metaseq ratio 1.5": lambda: MetaseqRatio(1.5),
    "Megatron spiky loss 10x": MegatronSpikyLoss,
    "ZClip 2.5": ZClip,
}
