"""Which settings of DeepSpeed rule snapshots out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from train.engines.deepspeed_state import obstacles_to_snapshots

STAGE_2: Any = SimpleNamespace(single_partition_of_fp32_groups=[])
STAGE_3: Any = SimpleNamespace(fp32_partitioned_groups_flat=[])


@pytest.mark.parametrize("optimizer", [STAGE_2, STAGE_3])
def test_settings_that_move_no_state_are_fine(optimizer: Any) -> None:
    settings = {"zero_optimization": {"overlap_comm": True}, "wall_clock_breakdown": True}
    assert obstacles_to_snapshots(settings, optimizer) == ()
    assert obstacles_to_snapshots({}, optimizer) == ()


def test_every_obstacle_is_named() -> None:
    settings = {
        "compression_training": {},
        "zero_optimization": {"offload_param": {"device": "nvme"}, "overlap_comm": False},
    }
    assert obstacles_to_snapshots(settings, STAGE_3) == (
        "engine.deepspeed.compression_training",
        "engine.deepspeed.zero_optimization.offload_param",
    )


def test_optimizer_of_another_kind_is_named() -> None:
    found = obstacles_to_snapshots({}, SimpleNamespace())
    assert found == ("DeepSpeed's optimizer SimpleNamespace",)
