"""Learning rate and batch size as functions of the step."""

from __future__ import annotations

import random

import pytest

from train.amounts import Amount
from train.schedule import Schedule
from train.settings import Decay, ScheduleSettings

PEAK = 3e-3


def schedule(
    *,
    decay: Decay = Decay.COSINE,
    warmup_steps: int = 10,
    final_lr_ratio: float = 0.1,
    num_steps: int = 110,
    batch: int = 16,
    ramp_start: int = 8,
    ramp_steps: int = 0,
    increment: int = 4,
) -> Schedule:
    settings = ScheduleSettings(
        decay=decay,
        warmup_steps=warmup_steps,
        final_lr_ratio=final_lr_ratio,
        batch_samples=batch,
        batch_ramp_start_samples=ramp_start,
        batch_ramp_steps=ramp_steps,
        batch_ramp_increment_samples=increment,
    )
    return Schedule(settings, peak_lr=PEAK, num_steps=num_steps)


def test_warm_up_is_linear_never_zero_and_reaches_the_peak() -> None:
    rates = [schedule().lr_at(step) for step in range(10)]
    assert rates == pytest.approx([PEAK * step / 10 for step in range(1, 11)])


def test_run_without_warm_up_starts_at_the_peak() -> None:
    assert schedule(warmup_steps=0).lr_at(0) == PEAK


@pytest.mark.parametrize("decay", [Decay.COSINE, Decay.LINEAR])
def test_decay_is_half_way_down_in_the_middle(decay: Decay) -> None:
    assert schedule(decay=decay).lr_at(60) == pytest.approx(PEAK * 0.55)


@pytest.mark.parametrize("decay", [Decay.COSINE, Decay.LINEAR])
def test_decay_ends_at_its_share_of_the_peak_and_stays_there(decay: Decay) -> None:
    assert schedule(decay=decay).lr_at(110) == pytest.approx(PEAK * 0.1)
    assert schedule(decay=decay).lr_at(500) == pytest.approx(PEAK * 0.1)


@pytest.mark.parametrize("decay", [Decay.COSINE, Decay.LINEAR])
def test_rate_never_rises_after_the_warm_up(decay: Decay) -> None:
    rates = [schedule(decay=decay).lr_at(step) for step in range(9, 130)]
    assert rates == sorted(rates, reverse=True)


def test_constant_rate_stays_at_the_peak() -> None:
    constant = schedule(decay=Decay.CONSTANT, final_lr_ratio=1.0)
    assert {constant.lr_at(step) for step in range(9, 200)} == {PEAK}


def test_warm_up_as_long_as_the_run_does_not_divide_by_zero() -> None:
    assert schedule(warmup_steps=110).lr_at(110) == pytest.approx(PEAK)


def test_batch_without_a_ramp_is_the_full_one_from_the_start() -> None:
    assert {schedule().batch_samples_at(step) for step in range(50)} == {16}


def test_ramp_rises_in_whole_increments_from_its_start_to_the_full_batch() -> None:
    ramped = schedule(batch=32, ramp_start=8, ramp_steps=60, increment=4)
    sizes = [ramped.batch_samples_at(step) for step in range(61)]
    assert sizes[0] == 8
    assert sizes[60] == 32
    assert sizes == sorted(sizes)
    assert set(sizes) == {8, 12, 16, 20, 24, 28, 32}


@pytest.mark.parametrize("seed", range(50))
def test_samples_between_two_steps_are_the_sum_of_their_batches(seed: int) -> None:
    source = random.Random(seed)
    any_schedule = schedule(
        batch=source.randrange(20, 60),
        ramp_start=source.randrange(1, 20),
        ramp_steps=source.choice([0, 1, 7, 40]),
        increment=source.randrange(1, 9),
    )
    for _ in range(20):
        first = source.randrange(80)
        last = first + source.randrange(60)
        naive = sum(any_schedule.batch_samples_at(step) for step in range(first, last))
        assert any_schedule.samples_between(first, last) == naive


def test_samples_between_are_counted_at_once_beyond_the_ramp() -> None:
    assert schedule(ramp_steps=5).samples_between(5, 10**15) == 16 * (10**15 - 5)


def test_growth_of_the_batch_by_a_quarter_is_a_change() -> None:
    ramped = schedule(batch=32, ramp_start=8, ramp_steps=60, increment=4)
    changes = [step for step in range(100) if ramped.is_change_at(step)]
    # 8, 12, 16, 20, 24, 28, 32: from 20 on it grows by less than a quarter.
    assert [ramped.batch_samples_at(step) for step in changes] == [12, 16, 20]
    assert all(
        ramped.batch_samples_at(step - 1) + 4 == ramped.batch_samples_at(step) for step in changes
    )


def test_jump_at_the_end_of_a_ramp_is_a_change() -> None:
    ramped = schedule(batch=16, ramp_start=8, ramp_steps=10, increment=100)
    assert [step for step in range(40) if ramped.is_change_at(step)] == [10]


@pytest.mark.parametrize("ramp_steps", [0, 200])
def test_steady_batch_and_fine_ramp_have_no_change(ramp_steps: int) -> None:
    ramped = schedule(batch=200, ramp_start=100, ramp_steps=ramp_steps, increment=1)
    assert not any(ramped.is_change_at(step) for step in range(300))


def test_first_step_is_no_change() -> None:
    assert not schedule(ramp_steps=10).is_change_at(0)


def test_amount_of_tokens_is_rounded_up_to_whole_samples() -> None:
    amount = Amount.parse("1000 tokens")
    assert schedule().amount_in_samples(amount, from_step=3, sequence_length=128) == 8


@pytest.mark.parametrize("unit", ["batches", "steps"])
def test_amount_of_batches_follows_the_ramp_from_its_step_on(unit: str) -> None:
    ramped = schedule(batch=16, ramp_start=8, ramp_steps=10, increment=4)
    amount = Amount.parse(f"4 {unit}")
    expected = sum(ramped.batch_samples_at(step) for step in range(8, 12))
    assert ramped.amount_in_samples(amount, from_step=8, sequence_length=128) == expected
