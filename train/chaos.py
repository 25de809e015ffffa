"""Faults that are put into a run on purpose. Called by `build.py` and by a replay, by no one else.

The product has no hooks for them: a fault is a wrapper of the part that would have it in real
life, of the schedule, the samples or the engine. What is keyed by the *step* or by the data comes
again after a rewind, as a wrong setting or a bad shard does. What is keyed by the run's *clock*
comes once, as failing hardware does: neither a rewind nor a later restart brings it back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from train.amounts import AmountUnit
from train.data.layout import DocumentLayout
from train.data.source import SampleSource
from train.data.spoiled import PoisonedSource, ShiftedSource
from train.distributed import World
from train.engines.base import Engine
from train.engines.snapshot import HostSnapshot
from train.engines.update_norm import local_part
from train.schedule import Schedule
from train.settings import ChaosKind, ChaosSettings, RunConfig
from train.signals import Gate

LR_FAULTS = frozenset({ChaosKind.LR_SHOCK, ChaosKind.SLOW_DIVERGENCE})
# A learning rate that creeps up stays here: what diverges has diverged long before.
MAX_CREEP = 1e3
_NO_CLOCK = -1


def schedule_of(config: RunConfig) -> Schedule:
    """Return the run's schedule, with the fault that the config puts in, if any."""
    settings, lr, steps = config.schedule, config.optim.lr, config.run.steps
    if config.chaos.kind in LR_FAULTS:
        return FaultySchedule(settings, peak_lr=lr, num_steps=steps, chaos=config.chaos)
    return Schedule(settings, peak_lr=lr, num_steps=steps)


def inject_into_source(
    source: SampleSource, config: RunConfig, vocab_size: int, schedule: Schedule
) -> SampleSource:
    """Return the samples in order, with the fault that the config puts in, if any."""
    chaos, seed = config.chaos, config.run.seed
    if chaos.kind not in (ChaosKind.BAD_DATA, ChaosKind.LEVEL_SHIFT):
        return source
    length = config.data.sequence_length
    start = schedule.amount_in_samples(chaos.start, from_step=0, sequence_length=length)
    if chaos.kind is ChaosKind.LEVEL_SHIFT:
        return ShiftedSource(source, start=start, seed=seed)
    is_tokens = chaos.start.unit is AmountUnit.TOKENS
    from_step = config.run.steps if is_tokens else chaos.start.value
    count = schedule.amount_in_samples(chaos.length, from_step=from_step, sequence_length=length)
    return PoisonedSource(source, start=start, stop=start + count, vocab_size=vocab_size, seed=seed)


def inject_into_engine(
    engine: Engine, config: RunConfig, world: World, *, clock: int = 0, is_replay: bool = False
) -> Engine:
    """Return the engine, with the fault that the config puts in, if any.

    `clock`: where the run's clock stands before the next step. `is_replay`: the steps of a run are
    executed again to find out why they went wrong; what strikes once does not come again.
    """
    chaos = config.chaos
    if is_replay or world.rank != chaos.rank:
        return engine
    first, last = chaos.start.value, chaos.start.value + chaos.length.value
    fault: Callable[[int], None]
    if chaos.kind in (ChaosKind.BIT_FLIP, ChaosKind.QUIET_BIT_FLIP):
        is_quiet = chaos.kind is ChaosKind.QUIET_BIT_FLIP
        fault = BitFlip(engine.model, at_clock=first, seed=config.run.seed, is_quiet=is_quiet)
    elif chaos.kind is ChaosKind.NAN_ON_ONE_RANK:
        fault = NanOutput(engine.model, clocks=range(first, last))
    else:
        return engine
    return cast(Engine, FaultyEngine(engine, fault, clock=clock))


class FaultySchedule(Schedule):
    """The schedule of a run whose learning rate is set wrong, for a while or more and more."""

    def __init__(self, *arguments: Any, chaos: ChaosSettings, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._chaos = chaos

    def lr_at(self, step: int) -> float:
        """Return the learning rate of the update that follows `step` finished ones."""
        return super().lr_at(step) * self._factor_at(step)

    def _factor_at(self, step: int) -> float:
        chaos = self._chaos
        progress = (step - chaos.start.value) / chaos.length.value
        if progress < 0:
            return 1.0
        if chaos.kind is ChaosKind.LR_SHOCK:
            return chaos.factor if progress < 1 else 1.0
        exponent = progress * math.log(chaos.factor)
        return math.exp(min(exponent, math.log(MAX_CREEP)))


class FaultyEngine:
    """An engine before each step of which `fault` is told the clock; all else is the engine's own.

    The clock counts executed steps, so it is known without anyone saying so.
    """

    def __init__(self, engine: Engine, fault: Callable[[int], None], *, clock: int) -> None:
        self._engine = engine
        self._fault = fault
        self._clock = clock
        self._next_new = clock

    def step(
        self,
        rows: npt.NDArray[np.integer],
        *,
        num_tokens: int,
        lr: float,
        gate: Gate,
        layout: DocumentLayout | None = None,
        flag: bool = False,
    ) -> Tensor:
        """See `Engine.step`."""
        self._fault(self._clock if self._clock == self._next_new else _NO_CLOCK)
        self._clock += 1
        self._next_new = max(self._next_new, self._clock)
        return self._engine.step(
            rows, layout=layout, num_tokens=num_tokens, lr=lr, gate=gate, flag=flag
        )

    def undo(self, snapshot: HostSnapshot) -> None:
        """See `Engine.undo`; what struck in that step does not strike in it again."""
        self._engine.undo(snapshot)
        self._clock -= 1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


class BitFlip:
    """The highest exponent bit of one weight of this rank turns over: 0.02 becomes 7e36.

    `is_quiet`: the highest bit of its mantissa instead, and 0.02 becomes 0.028.

    The seed chooses it among the weights that are smaller than 2, so that it becomes huge.
    """

    def __init__(
        self, model: nn.Module, *, at_clock: int, seed: int, is_quiet: bool = False
    ) -> None:
        self._model = model
        self._at_clock = at_clock
        self._seed = seed
        # Below the sign are the eight bits of the exponent, in bf16 too.
        self._bits_from_top = 10 if is_quiet else 2

    def __call__(self, clock: int) -> None:
        """Strike, if it is time. Called before each step; waits for the device when it strikes."""
        if clock != self._at_clock:
            return
        matrices = [local_part(p) for p in self._model.parameters() if p.ndim >= 2]
        sizes = np.array([matrix.numel() for matrix in matrices])
        place = int(np.random.default_rng(self._seed % 2**64).integers(sizes.sum()))
        number = int(np.searchsorted(sizes.cumsum(), place, side="right"))
        flat = matrices[number].view(-1)
        offset = place - int(sizes[:number].sum())
        if flat.is_cuda:
            torch.cuda.synchronize(flat.device)  # a snapshot may still be copied from it
        # From there on, the first that is not zero and below 2: its highest exponent bit is 0.
        eligible = (flat != 0) & (flat.abs() < 2)
        order = torch.cat((eligible[offset:], eligible[:offset])).to(torch.uint8)
        index = (offset + int(order.argmax())) % len(flat)
        bits = flat.view({2: torch.int16, 4: torch.int32}[flat.element_size()])
        bits[index] ^= 1 << (8 * flat.element_size() - self._bits_from_top)


class NanOutput:
    """Everything that the model of this rank returns is NaN while the clock is in `clocks`."""

    def __init__(self, model: nn.Module, *, clocks: range) -> None:
        self._clocks = clocks
        self._is_active = False
        model.register_forward_hook(self._spoil)

    def __call__(self, clock: int) -> None:
        """Note whether the step that begins now is one of those. Called before each step."""
        self._is_active = clock in self._clocks

    def _spoil(self, model: nn.Module, inputs: object, outputs: tuple[Tensor, ...]) -> Any:
        del model, inputs
        is_training = torch.is_grad_enabled()  # an evaluation is no step
        if not (self._is_active and is_training):
            return outputs
        return tuple(output * torch.nan for output in outputs)
