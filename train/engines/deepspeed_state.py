"""Which tensors of a ZeRO optimizer are this rank's state, and with which settings that is known.

Read from DeepSpeed 0.19.8, `runtime/zero/stage_1_and_2.py` and `stage3.py`; imports none of it.
Stages 1 and 2 keep all parameters flat, and this rank's part once more in fp32; stage 3 keeps this
rank's part of the parameters, and in bf16 that part once more in fp32. Precision is ours, fp32 or
bf16, so no loss is scaled and no scaler has a state.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from train.engines.optimizer import MOMENTS

# Each puts state in places that are not read here: other devices, quantised copies, schedules.
_ELSEWHERE = frozenset(
    {
        "compression_training",
        "data_efficiency",
        "elasticity",
        "expert_parallel",
        "hybrid_engine",
        "progressive_layer_drop",
        "weight_quantization",
    }
)
_ELSEWHERE_IN_ZERO = frozenset(
    {
        "mics_shard_size",
        "offload_optimizer",
        "offload_param",
        "zenflow",
        "zero_hpz_partition_size",
        "zero_quantized_nontrainable_weights",
        "zero_quantized_weights",
    }
)


def is_stage_3(optimizer: Any) -> bool:
    """Return whether `optimizer` is that of ZeRO 3."""
    return hasattr(optimizer, "fp32_partitioned_groups_flat")


def obstacles_to_snapshots(settings: Mapping[str, object], optimizer: Any) -> tuple[str, ...]:
    """Return the config keys, or the class, that keep snapshots from being sound; none is good.

    `settings`: engine.deepspeed, as the user wrote it.
    """
    zero = settings.get("zero_optimization")
    names = zero.keys() if isinstance(zero, Mapping) else ()
    found = [f"engine.deepspeed.{key}" for key in settings if key in _ELSEWHERE]
    found += [
        f"engine.deepspeed.zero_optimization.{key}" for key in names if key in _ELSEWHERE_IN_ZERO
    ]
    if not is_stage_3(optimizer) and not hasattr(optimizer, "single_partition_of_fp32_groups"):
        found.append(f"DeepSpeed's optimizer {type(optimizer).__name__}")
    return tuple(found)


def masters(optimizer: Any) -> list[Tensor]:
    """Return this rank's fp32 partitions, which AdamW updates and keys its state by."""
    if is_stage_3(optimizer):
        return list(optimizer.fp32_partitioned_groups_flat)
    return list(optimizer.single_partition_of_fp32_groups)


def state_tensors(optimizer: Any) -> dict[str, Tensor]:
    """Return this rank's state by name: parameters, fp32 partitions, moments, step counters."""
    flat = (
        optimizer.fp16_partitioned_groups_flat
        if is_stage_3(optimizer)
        else optimizer.bit16_groups_flat
    )
    tensors: dict[str, Tensor] = {}
    for number, (parameters, master) in enumerate(zip(flat, masters(optimizer), strict=True)):
        tensors[f"group{number}/parameters"] = parameters
        if parameters.data_ptr() != master.data_ptr():  # one and the same in stage 3 with fp32
            tensors[f"group{number}/master"] = master
        state = optimizer.optimizer.state[master]
        tensors |= {f"group{number}/{kind}": state[kind] for kind in ("step", *MOMENTS)}
    return tensors
