"""Each fault by itself: where and when it strikes, and that it does nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sources import RowSource, rows_of
from torch import Tensor

from train.amounts import Amount, AmountUnit
from train.chaos import (
    MAX_CREEP,
    BitFlip,
    FaultyEngine,
    inject_into_engine,
    inject_into_source,
    schedule_of,
)
from train.data.spoiled import PoisonedSource, ShiftedSource
from train.distributed import World
from train.engines.build import build_engine
from train.schedule import Schedule
from train.settings import ChaosKind, RunConfig
from train.signals import Gate, StepSignals

START = 4
LENGTH = 3
ONLY = World(rank=0, size=1, device=torch.device("cpu"))
RANK_0, RANK_1 = (World(rank=rank, size=2, device=torch.device("cpu")) for rank in range(2))
EVERY_KIND = list(ChaosKind)
ComposeConfig = Callable[..., tuple[RunConfig, dict[str, Any]]]
ConfigOf = Callable[..., RunConfig]


def steps(value: int) -> Amount:
    return Amount(value, AmountUnit.STEPS)


@pytest.fixture
def config_of(compose_config: ComposeConfig) -> ConfigOf:
    """Return a function from a kind of fault to the config of a tiny run that has it."""
    tiny = ["model.hidden_size=16", "model.num_layers=2", "model.num_heads=2", "tokenizer=bytes"]
    config, _ = compose_config([*tiny, "run.steps=40", "schedule.warmup_steps=2"])

    def make(kind: ChaosKind, *, factor: float = 10.0, rank: int = 0) -> RunConfig:
        chaos = replace(
            config.chaos,
            kind=kind,
            start=steps(START),
            length=steps(LENGTH),
            factor=factor,
            rank=rank,
        )
        return replace(config, chaos=chaos)

    return make


def rows(step: int) -> np.ndarray[Any, np.dtype[np.uint16]]:
    return np.random.default_rng(step).integers(0, 257, (4, 9)).astype(np.uint16)


def run_steps(engine: Any, first: int, last: int) -> list[StepSignals]:
    vectors = [
        engine.step(rows(step), num_tokens=4 * 8, lr=1e-3, gate=Gate())
        for step in range(first, last)
    ]
    return [StepSignals.from_vector(vector.tolist()) for vector in vectors]


class Source(RowSource):
    """The sample at each index is the index, over and over."""

    sample_tokens = 16

    def rows(self, indices: Any) -> Any:
        return np.repeat(indices[:, None] % 200, 16, axis=1)


# The learning rate.


def lr_factors(config: RunConfig) -> list[float]:
    plain = schedule_of(replace(config, chaos=replace(config.chaos, kind=ChaosKind.NONE)))
    faulty = schedule_of(config)
    return [faulty.lr_at(step) / plain.lr_at(step) for step in range(40)]


def test_shock_multiplies_the_rate_in_its_window_alone(config_of: ConfigOf) -> None:
    factors = lr_factors(config_of(ChaosKind.LR_SHOCK, factor=30.0))
    after = START + LENGTH
    assert factors[:START] == [1.0] * START
    assert factors[START:after] == pytest.approx([30.0] * LENGTH)
    assert factors[after:] == [1.0] * (40 - after)


def test_creep_starts_from_the_whole_rate_and_grows_by_the_factor_over_each_length(
    config_of: ConfigOf,
) -> None:
    factors = lr_factors(config_of(ChaosKind.SLOW_DIVERGENCE, factor=8.0))
    assert factors[: START + 1] == [1.0] * (START + 1)
    assert factors[START + 1] == pytest.approx(2.0)
    assert factors[START + LENGTH] == pytest.approx(8.0)
    assert factors[START + 2 * LENGTH] == pytest.approx(64.0)


def test_creep_stays_finite(config_of: ConfigOf) -> None:
    config = config_of(ChaosKind.SLOW_DIVERGENCE, factor=1e6)
    assert max(lr_factors(config)) == pytest.approx(MAX_CREEP)


def test_fault_of_the_rate_depends_on_the_step_alone_so_it_comes_again(config_of: ConfigOf) -> None:
    schedule = schedule_of(config_of(ChaosKind.LR_SHOCK))
    once = [schedule.lr_at(step) for step in range(40)]
    assert [schedule.lr_at(step) for step in range(40)] == once


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_batches_are_the_same_with_any_fault(kind: ChaosKind, config_of: ConfigOf) -> None:
    config = config_of(kind)
    plain = Schedule(config.schedule, peak_lr=config.optim.lr, num_steps=config.run.steps)
    schedule = schedule_of(config)
    assert [schedule.batch_samples_at(s) for s in range(40)] == [
        plain.batch_samples_at(s) for s in range(40)
    ]


# The data.


def test_bad_data_lie_in_the_batches_that_the_config_names(config_of: ConfigOf) -> None:
    config = config_of(ChaosKind.BAD_DATA)
    schedule = schedule_of(config)
    start = schedule.samples_between(0, START)
    stop = schedule.samples_between(0, START + LENGTH)
    source = inject_into_source(Source(), config, 257, schedule)
    assert isinstance(source, PoisonedSource)
    indices = np.arange(200, dtype=np.int64)
    is_changed = (rows_of(source, indices) != rows_of(Source(), indices)).any(axis=1)
    assert not is_changed[:start].any() and not is_changed[stop:].any()
    assert is_changed[start:stop].mean() > 0.9, "a permutation leaves a token or two where they are"


def test_bad_data_in_tokens_are_rounded_up_to_samples(config_of: ConfigOf) -> None:
    config = config_of(ChaosKind.BAD_DATA)
    tokens = {
        "start": Amount(10 * config.data.sequence_length, AmountUnit.TOKENS),
        "length": Amount(1, AmountUnit.TOKENS),
    }
    config = replace(config, chaos=replace(config.chaos, **tokens))
    source = inject_into_source(Source(), config, 257, schedule_of(config))
    indices = np.arange(20, dtype=np.int64)
    is_changed = (rows_of(source, indices) != rows_of(Source(), indices)).any(axis=1)
    assert np.flatnonzero(is_changed).tolist() == [10]


def test_level_shifts_from_the_start_on_for_good(config_of: ConfigOf) -> None:
    class Words(Source):
        sample_tokens = 64

        def rows(self, indices: Any) -> Any:
            return (indices[:, None] + np.arange(64)) % 200

    config = config_of(ChaosKind.LEVEL_SHIFT)
    schedule = schedule_of(config)
    source = inject_into_source(Words(), config, 257, schedule)
    assert isinstance(source, ShiftedSource)
    indices = np.arange(2000, dtype=np.int64)
    is_changed = (rows_of(source, indices) != rows_of(Words(), indices)).any(axis=1)
    start = schedule.samples_between(0, START)
    assert not is_changed[:start].any() and is_changed[start:].all()


@pytest.mark.parametrize(
    "kind", [kind for kind in EVERY_KIND if kind not in ("bad_data", "level_shift")]
)
def test_other_faults_leave_the_data_alone(kind: ChaosKind, config_of: ConfigOf) -> None:
    config, source = config_of(kind), Source()
    assert inject_into_source(source, config, 257, schedule_of(config)) is source


# The bit.


def bits_of(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().view(torch.int32) for p in model.parameters()])


def test_bit_turns_over_once_in_one_value_before_the_step_at_its_clock(config_of: ConfigOf) -> None:
    config = config_of(ChaosKind.BIT_FLIP)
    engine = build_engine(config, ONLY)
    before = bits_of(engine.model).clone()
    fault = BitFlip(engine.model, at_clock=START, seed=1)
    for clock in range(START):
        fault(clock)
    assert torch.equal(bits_of(engine.model), before), "not before its time"
    fault(START)
    changed = bits_of(engine.model) ^ before
    assert changed.count_nonzero() == 1
    assert changed.max() == 1 << 30, "the highest exponent bit of fp32"
    struck = bits_of(engine.model).clone()
    for clock in range(START + 1, 40):
        fault(clock)
    assert torch.equal(bits_of(engine.model), struck), "and never again"


@pytest.mark.parametrize("seed", range(5))
def test_flipped_weight_becomes_huge(seed: int, config_of: ConfigOf) -> None:
    model = build_engine(config_of(ChaosKind.BIT_FLIP), ONLY).model
    BitFlip(model, at_clock=0, seed=seed)(0)
    largest = max(float(p.detach().abs().max()) for p in model.parameters() if p.ndim == 2)
    assert largest > 1e30
    assert all(float(p.detach().abs().max()) <= 1 for p in model.parameters() if p.ndim == 1)


def test_seed_chooses_the_weight(config_of: ConfigOf) -> None:
    places = set()
    for seed in (1, 1, 2, 3):
        model = build_engine(config_of(ChaosKind.BIT_FLIP), ONLY).model
        before = bits_of(model).clone()
        BitFlip(model, at_clock=0, seed=seed)(0)
        places.add(int((bits_of(model) ^ before).argmax()))
    assert len(places) == 3


def test_zeros_and_large_weights_are_passed_over() -> None:
    model = torch.nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        model.weight.fill_(3.0)
        model.weight[0] = 0.0
        model.weight[2, 1] = 0.5
    for seed in range(20):
        fresh = torch.nn.Linear(4, 4, bias=False)
        fresh.load_state_dict(model.state_dict())
        BitFlip(fresh, at_clock=0, seed=seed)(0)
        assert float(fresh.weight[2, 1].detach()) > 1e37


def test_half_precision_weights_have_their_own_highest_bit() -> None:
    model = torch.nn.Linear(4, 4, bias=False, dtype=torch.bfloat16)
    before = model.weight.detach().clone().view(torch.int16)
    BitFlip(model, at_clock=0, seed=0)(0)
    changed = model.weight.detach().view(torch.int16) ^ before
    assert changed.count_nonzero() == 1
    assert changed.max() == 1 << 14


def test_engine_with_the_fault_goes_wrong_at_its_step_and_not_before(config_of: ConfigOf) -> None:
    config = config_of(ChaosKind.BIT_FLIP)
    plain = run_steps(build_engine(config, ONLY), 0, START)
    engine = inject_into_engine(build_engine(config, ONLY), config, ONLY)
    signals = run_steps(engine, 0, START + 1)
    assert signals[:START] == plain
    # A weight that drowns all others in its layer also stops the gradients of the layers below.
    assert signals[START].grad_norm < 0.1 * plain[-1].grad_norm


# The NaN.


def test_output_is_nan_at_its_clocks_alone_and_the_update_is_refused(config_of: ConfigOf) -> None:
    config = config_of(ChaosKind.NAN_ON_ONE_RANK)
    engine = inject_into_engine(build_engine(config, ONLY), config, ONLY)
    signals = run_steps(engine, 0, 10)
    bad = [step for step, signal in enumerate(signals) if not signal.is_finite]
    assert bad == list(range(START, START + LENGTH))
    assert all(signals[step].is_vetoed and signals[step].bad_rank == 0 for step in bad)
    assert all(parameter.isfinite().all() for parameter in engine.model.parameters())


def test_evaluation_amid_the_fault_is_sound(config_of: ConfigOf) -> None:
    config = config_of(ChaosKind.NAN_ON_ONE_RANK)
    engine = inject_into_engine(build_engine(config, ONLY), config, ONLY)
    run_steps(engine, 0, START + 1)
    assert np.isfinite(engine.evaluate(rows(0)))
    assert not run_steps(engine, START + 1, START + 2)[0].is_finite


def test_each_micro_batch_of_such_a_step_is_nan(config_of: ConfigOf) -> None:
    config = config_of(ChaosKind.NAN_ON_ONE_RANK)
    config = replace(config, engine=replace(config.engine, micro_batch_samples=1))
    engine = inject_into_engine(build_engine(config, ONLY), config, ONLY)
    run_steps(engine, 0, START + 1)
    assert all(np.isnan(loss) for loss in engine.recent_sample_losses()[-1])


# Rank, clock, replay.

ENGINE_KINDS = [ChaosKind.BIT_FLIP, ChaosKind.QUIET_BIT_FLIP, ChaosKind.NAN_ON_ONE_RANK]
at_the_engine = pytest.mark.parametrize("kind", ENGINE_KINDS)


@at_the_engine
def test_only_the_rank_that_is_named_has_the_fault(kind: ChaosKind, config_of: ConfigOf) -> None:
    config = config_of(kind, rank=1)
    engine = build_engine(config, ONLY)
    assert inject_into_engine(engine, config, RANK_0) is engine
    assert isinstance(inject_into_engine(engine, config, RANK_1), FaultyEngine)


@at_the_engine
def test_run_that_is_taken_up_behind_the_fault_does_not_have_it_again(
    kind: ChaosKind, config_of: ConfigOf
) -> None:
    config = config_of(kind)
    plain = run_steps(build_engine(config, ONLY), 0, 12)
    taken_up = inject_into_engine(build_engine(config, ONLY), config, ONLY, clock=START + LENGTH)
    assert run_steps(taken_up, 0, 12) == plain


@at_the_engine
def test_run_that_is_taken_up_before_the_fault_meets_it_at_the_same_clock(
    kind: ChaosKind, config_of: ConfigOf
) -> None:
    config = config_of(kind)
    whole = run_steps(inject_into_engine(build_engine(config, ONLY), config, ONLY), 0, 8)
    first = inject_into_engine(build_engine(config, ONLY), config, ONLY)
    run_steps(first, 0, 3)
    second = build_engine(config, ONLY)
    second.restore(first.snapshot())
    taken_up = run_steps(inject_into_engine(second, config, ONLY, clock=3), 3, 8)
    assert [s.loss_nats for s in taken_up] == pytest.approx(
        [s.loss_nats for s in whole[3:]], rel=0, abs=0, nan_ok=True
    )


@at_the_engine
def test_rewind_heals_what_struck_once(kind: ChaosKind, config_of: ConfigOf) -> None:
    config = config_of(kind)
    plain = run_steps(build_engine(config, ONLY), 0, 10)
    engine = inject_into_engine(build_engine(config, ONLY), config, ONLY)
    run_steps(engine, 0, 2)
    good = engine.snapshot()
    run_steps(engine, 2, START + LENGTH)
    engine.restore(good)
    assert run_steps(engine, 2, 10) == plain[2:]


@at_the_engine
def test_replay_leaves_out_what_strikes_once(kind: ChaosKind, config_of: ConfigOf) -> None:
    config = config_of(kind)
    engine = build_engine(config, ONLY)
    assert inject_into_engine(engine, config, ONLY, clock=START, is_replay=True) is engine


@pytest.mark.parametrize("kind", [kind for kind in EVERY_KIND if kind not in ENGINE_KINDS])
def test_other_faults_leave_the_engine_alone(kind: ChaosKind, config_of: ConfigOf) -> None:
    config = config_of(kind)
    engine = build_engine(config, ONLY)
    assert inject_into_engine(engine, config, ONLY) is engine


def test_everything_but_the_step_is_the_engines_own(config_of: ConfigOf, tmp_path: Path) -> None:
    config = config_of(ChaosKind.BIT_FLIP)
    engine = build_engine(config, ONLY)
    faulty = inject_into_engine(engine, config, ONLY)
    assert faulty.name == engine.name
    assert faulty.group_names == engine.group_names
    assert faulty.can_snapshot
    assert faulty.state_digest() == engine.state_digest()
    run_steps(faulty, 0, 2)
    faulty.begin_save().write(tmp_path, ONLY)
    digest = faulty.state_digest()
    run_steps(faulty, 2, 4)
    faulty.load(tmp_path)
    assert engine.state_digest() == digest
