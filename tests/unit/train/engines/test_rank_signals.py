"""What a rank knows alone."""

from __future__ import annotations

import math

import pytest
import torch

from train.distributed import World
from train.engines.rank_signals import SampleLosses, own_signals

CPU = torch.device("cpu")


def test_losses_of_micro_batches_are_kept_as_means_in_row_order() -> None:
    losses = SampleLosses()
    total = losses.add([torch.tensor([8.0, 4.0]), torch.tensor([12.0])], num_predictions=4)
    assert total.tolist() == [24.0] and total.dtype is torch.float64
    losses.add([torch.tensor([6.0])], num_predictions=2)
    assert losses.recent() == [[2.0, 1.0, 3.0], [3.0]]


def test_only_the_last_32_steps_are_kept() -> None:
    losses = SampleLosses()
    for step in range(40):
        losses.add([torch.tensor([float(step)])], num_predictions=1)
    assert losses.recent() == [[float(step)] for step in range(8, 40)]


def test_nothing_is_left_once_cleared() -> None:
    losses = SampleLosses()
    losses.add([torch.tensor([1.0])], num_predictions=1)
    losses.clear()
    assert losses.recent() == []


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_rank_whose_loss_is_no_number_says_so(loss: float) -> None:
    world = World(rank=3, size=4, device=CPU)
    found = own_signals(torch.tensor([loss], dtype=torch.float64), world, flag=False)
    assert found[1:].tolist() == [1.0, 3.0, 0.0]


def test_rank_with_a_sane_loss_adds_nothing_but_its_flag() -> None:
    world = World(rank=3, size=4, device=CPU)
    found = own_signals(torch.tensor([2.5], dtype=torch.float64), world, flag=True)
    assert found.tolist() == [2.5, 0.0, 0.0, 1.0]


def test_mean_of_a_sample_is_over_its_own_predictions() -> None:
    losses = SampleLosses()
    own = torch.tensor([4, 1, 0], dtype=torch.int32)
    total = losses.add([torch.tensor([8.0, 4.0]), torch.tensor([0.0])], num_predictions=own)
    assert total.tolist() == [12.0]
    assert losses.recent() == [[2.0, 4.0, 0.0]]


def test_step_that_is_taken_back_leaves_the_losses_of_those_before() -> None:
    losses = SampleLosses()
    for step in (1.0, 2.0, 3.0):
        losses.add([torch.tensor([step])], num_predictions=1)
    losses.drop_last()
    assert losses.recent() == [[1.0], [2.0]]
