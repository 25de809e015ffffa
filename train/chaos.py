"""Faults that are put into a run on purpose. Called by `build.py` alone."""

from __future__ import annotations

from train.data.stream import PoisonedSource, SampleSource
from train.distributed import World
from train.engines.base import Engine
from train.schedule import Schedule
from train.settings import AmountUnit, ChaosKind, RunConfig


def inject_into_engine(engine: Engine, config: RunConfig, world: World) -> Engine:
    """Return the engine, with the fault that the config puts in, if any."""
    del config, world
    return engine


def inject_into_source(
    source: SampleSource, config: RunConfig, vocab_size: int, schedule: Schedule
) -> SampleSource:
    """Return the samples in order, with the fault that the config puts in, if any."""
    if config.chaos.kind is ChaosKind.BAD_DATA:
        length = config.data.sequence_length
        start = schedule.amount_in_samples(config.chaos.start, from_step=0, sequence_length=length)
        is_tokens = config.chaos.start.unit is AmountUnit.TOKENS
        count = schedule.amount_in_samples(
            config.chaos.length,
            from_step=config.run.steps if is_tokens else config.chaos.start.value,
            sequence_length=length,
        )
        return PoisonedSource(
            source,
            start=start,
            stop=start + count,
            vocab_size=vocab_size,
            seed=config.run.seed,
        )
    return source
