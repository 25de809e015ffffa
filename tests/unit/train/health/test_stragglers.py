"""Who is called slow, when, and how often."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from train.health.stragglers import ForwardTimer, Speed, Speeds, deviations


def window(forwards: list[float], waits: list[float] | None = None) -> list[Speed]:
    return [
        Speed(
            rank=rank,
            host=f"h{rank // 2}",
            device="cpu",
            forward_seconds=forward,
            data_seconds=waits[rank] if waits else 0.0,
            step_seconds=0.1,
        )
        for rank, forward in enumerate(forwards)
    ]


@pytest.mark.parametrize("num_ranks", [2, 3, 8])
def test_the_slow_rank_stands_out_and_the_others_do_not(num_ranks: int) -> None:
    values = [0.1 + 0.001 * rank for rank in range(num_ranks - 1)] + [0.16]
    found = deviations(values, noise=1e-4)
    assert found[-1] > 6
    assert all(abs(sigma) < 6 or sigma < 0 for sigma in found[:-1])


def test_noise_of_equal_ranks_is_no_deviation() -> None:
    assert max(deviations([0.100, 0.101, 0.102, 0.104], noise=1e-4)) < 1


def test_one_slow_window_is_chance_and_two_are_told_once_until_it_is_over() -> None:
    speeds = Speeds(6)
    slow, fine = window([0.1, 0.1, 0.2, 0.1]), window([0.1, 0.1, 0.1, 0.1])
    assert speeds.judge(slow) == []
    assert speeds.judge(fine) == []
    assert speeds.judge(slow) == []
    (found,) = speeds.judge(slow)
    assert found.speed.rank == 2
    assert str(found).startswith(
        "rank 2 (cpu on h1) is slow: a forward takes 200.0 ms, 100.0 ms elsewhere"
    )
    assert speeds.judge(slow) == [], "told already"
    assert speeds.judge(fine) == []
    speeds.judge(slow)
    assert len(speeds.judge(slow)) == 1, "slow once more"


def test_waiting_for_data_counts_against_the_step_not_against_nothing() -> None:
    speeds = Speeds(6)
    little = window([0.1] * 3, [0.0, 0.0, 0.005])
    assert [speeds.judge(little) for _ in range(3)] == [[], [], []]
    much = window([0.1] * 3, [0.0, 0.0, 0.05])
    speeds.judge(much)
    (found,) = speeds.judge(much)
    assert (found.what, found.speed.rank) == ("waiting for data", 2)


def test_timer_knows_the_forward_of_training_alone() -> None:
    class Sleepy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            time.sleep(0.01)
            return x

    model = Sleepy()
    timer = ForwardTimer(model, torch.device("cpu"))
    assert timer.take() == 0.0
    model(torch.ones(1))
    time.sleep(0.05)
    assert 0.01 <= timer.take() < 0.05
    with torch.no_grad():
        model(torch.ones(1))
    assert timer.take() == 0.0
