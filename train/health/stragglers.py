"""Which rank is slow: each one's own forward and its waiting for data, compared now and then.

What is measured: the forward of the model, by the host's clock on CPUs and by events on GPUs. In a
step of `single` and `ddp` it is what a rank does before it has to wait for another, so it tells who
is slow and not who waited; under `fsdp` and ZeRO 3 ranks wait for each other's parameters in it
too, and a slow one stands out less. The backward is not measured: gradients travel in it.

Costs two hooks a forward, and one small gather in `health.straggler_interval_steps` steps.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import nn

from train.distributed import World
from train.health.pulse import Phase, Pulse

logger = logging.getLogger(__name__)

_NUM_WINDOWS = 2
_MAD_TO_SIGMA = 1.4826
# Differences below this share of what is typical are no trouble, however small the noise.
_NOISE_SHARE = 0.05
_NOISE_SECONDS = 5e-4
_MAX_EVENTS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """One rank in one window: seconds a forward, and seconds that a step waited for data."""

    rank: int
    host: str
    device: str
    forward_seconds: float
    data_seconds: float
    step_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Straggler:
    """A rank that is slow at something, window after window; `others_seconds`: their median."""

    speed: Speed
    what: str
    seconds: float
    others_seconds: float
    sigma: float

    def __str__(self) -> str:
        return (
            f"rank {self.speed.rank} ({self.speed.device} on {self.speed.host}) is slow: "
            f"{self.what} takes {self.seconds * 1e3:.1f} ms, "
            f"{self.others_seconds * 1e3:.1f} ms elsewhere ({self.sigma:.0f} sigma)"
        )


def deviations(values: Sequence[float], *, noise: float) -> list[float]:
    """Return how far each value lies above the others', in their robust standard deviations.

    Each is compared with the median of the *others*, so two ranks can be told apart. `noise`: the
    smallest deviation that counts as one.
    """
    found = []
    for index, value in enumerate(values):
        others = [*values[:index], *values[index + 1 :]]
        middle = median(others)
        spread = _MAD_TO_SIGMA * median(abs(other - middle) for other in others)
        found.append((value - middle) / max(spread, _NOISE_SHARE * middle, noise))
    return found


class Speeds:
    """Judges windows; a rank is told of once, when it is slow for two in a row, until it is not."""

    def __init__(self, threshold_sigma: float) -> None:
        self._threshold_sigma = threshold_sigma
        self._streaks: dict[tuple[int, str], int] = {}

    def judge(self, speeds: Sequence[Speed]) -> list[Straggler]:
        """Return whom to tell of now; the same on every rank."""
        typical = median(speed.step_seconds for speed in speeds)
        kinds = {
            "a forward": ([speed.forward_seconds for speed in speeds], _NOISE_SECONDS),
            "waiting for data": (
                [speed.data_seconds for speed in speeds],
                max(_NOISE_SECONDS, _NOISE_SHARE * typical),
            ),
        }
        found = []
        for what, (values, noise) in kinds.items():
            for speed, value, sigma in zip(
                speeds, values, deviations(values, noise=noise), strict=True
            ):
                key = (speed.rank, what)
                if sigma <= self._threshold_sigma:
                    if self._streaks.pop(key, 0) >= _NUM_WINDOWS:
                        logger.info("rank %d is no longer slow at %s", speed.rank, what)
                    continue
                self._streaks[key] = self._streaks.get(key, 0) + 1
                if self._streaks[key] == _NUM_WINDOWS:
                    others = median(v for s, v in zip(speeds, values, strict=True) if s != speed)
                    found.append(
                        Straggler(
                            speed=speed,
                            what=what,
                            seconds=value,
                            others_seconds=others,
                            sigma=sigma,
                        )
                    )
        return found


class ForwardTimer:
    """Mean seconds of the forwards of a model that is being trained; no host sync."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._started: float | torch.cuda.Event | None = None
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds, self._count = 0.0, 0
        model.register_forward_pre_hook(self._before)
        model.register_forward_hook(self._after)

    def take(self) -> float:
        """Return the mean since the last call, 0 if nothing is known."""
        if self._is_cuda:
            done = [(first, last) for first, last in self._pairs if last.query()]  # type: ignore[no-untyped-call]
            self._seconds = sum(first.elapsed_time(last) for first, last in done) / 1e3
            self._count, self._pairs = len(done), []
        mean = self._seconds / self._count if self._count else 0.0
        self._seconds, self._count = 0.0, 0
        return mean

    def _before(self, *_: object) -> None:
        if not torch.is_grad_enabled():
            self._started = None  # an evaluation
        elif self._is_cuda:
            self._started = self._mark() if len(self._pairs) < _MAX_EVENTS else None
        else:
            self._started = time.perf_counter()

    def _after(self, *_: object) -> None:
        started, self._started = self._started, None
        if isinstance(started, float):
            self._seconds += time.perf_counter() - started
            self._count += 1
        elif started is not None:
            self._pairs.append((started, self._mark()))

    @staticmethod
    def _mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


class Stragglers:
    """Compares this rank with the others, every so many steps."""

    def __init__(
        self, model: nn.Module, world: World, pulse: Pulse, *, interval_steps: int, sigma: float
    ) -> None:
        self._world = world
        self._pulse = pulse
        self._interval_steps = interval_steps
        self._timer = ForwardTimer(model, world.device)
        self._speeds = Speeds(sigma)
        self._before: dict[Phase, float] | None = None
        name = f" {torch.cuda.get_device_name(world.device)}" if world.device.type == "cuda" else ""
        self._place = (socket.gethostname(), f"{world.device}{name}")

    def look(self, step: int) -> list[Straggler]:
        """Return who has turned out slow. A collective, in every so many steps alone."""
        if step % self._interval_steps:
            return []
        forward_seconds, now = self._timer.take(), dict(self._pulse.seconds)
        before, self._before = self._before, now
        if before is None:
            return []  # this window had the start and the compilation in it
        spent = {
            phase: (now.get(phase, 0.0) - before.get(phase, 0.0)) / self._interval_steps
            for phase in (Phase.DATA, Phase.STEP)
        }
        host, device = self._place
        own = Speed(
            rank=self._world.rank,
            host=host,
            device=device,
            forward_seconds=forward_seconds,
            data_seconds=spent[Phase.DATA],
            step_seconds=spent[Phase.STEP] + spent[Phase.DATA],
        )
        return self._speeds.judge(self._world.gather(own))
