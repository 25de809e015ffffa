"""Which tensors of a ZeRO optimizer are this rank's state, and with which settings that is known.

Read from DeepSpeed 0.19.8, `runtime/zero/stage_1_and_2.py` and `stage3.py`; imports none of it.
Stages 1 and 2 keep all parameters flat, and this rank's part once more in fp32; stage 3 keeps this
rank's part of the parameters, and in bf16 that part once more in fp32. Precision is ours, fp32 or
bf16, so no loss is scaled and no scaler has a state.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from train.engines.flat_state import FlatPart
from train.engines.optimizer import MOMENTS
from train.errors import CheckpointError

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


def obstacles_to_sharing(
    settings: Mapping[str, object], optimizer: Any, model: nn.Module
) -> tuple[str, ...]:
    """Return what keeps checkpoints from being written as all engines read them; none is good.

    What is offloaded to host memory lies in the same tensors; what is anywhere else does not.
    """
    found = list(obstacles_to_snapshots(settings, optimizer))
    zero = settings.get("zero_optimization")
    for key, value in zero.items() if isinstance(zero, Mapping) else ():
        name = f"engine.deepspeed.zero_optimization.{key}"
        is_on_host = isinstance(value, Mapping) and value.get("device") in (None, "none", "cpu")
        if name in found and key.startswith("offload_") and is_on_host:
            found.remove(name)
    if not found:
        flats, is_3 = _flats(optimizer), is_stage_3(optimizer)
        parameters: Iterable[tuple[str, Any]] = model.named_parameters()
        found += [
            f"parameter {name}, which lies in no flat group"
            for name, parameter in parameters
            if _place(parameter.ds_tensor if is_3 else parameter.detach(), flats) is None
        ]
        found += [
            f"fp32 partitions of type {master.dtype}"
            for master in masters(optimizer)
            if master.dtype is not torch.float32
        ]
    return tuple(found)


def _flats(optimizer: Any) -> list[Any]:
    """Return the flat groups of what computes; in fp32 and stage 3, those are the masters."""
    is_3 = is_stage_3(optimizer)
    return list(optimizer.fp16_partitioned_groups_flat if is_3 else optimizer.bit16_groups_flat)


def masters(optimizer: Any) -> list[Tensor]:
    """Return this rank's fp32 partitions, which AdamW updates and keys its state by."""
    if is_stage_3(optimizer):
        return list(optimizer.fp32_partitioned_groups_flat)
    return list(optimizer.single_partition_of_fp32_groups)


def state_tensors(optimizer: Any) -> dict[str, Tensor]:
    """Return this rank's state by name: parameters, fp32 partitions, moments, step counters."""
    tensors: dict[str, Tensor] = {}
    pairs = zip(_flats(optimizer), masters(optimizer), strict=True)
    for number, (parameters, master) in enumerate(pairs):
        tensors[f"group{number}/parameters"] = parameters
        if parameters.data_ptr() != master.data_ptr():  # one and the same in stage 3 with fp32
            tensors[f"group{number}/master"] = master
        state = optimizer.optimizer.state[master]
        tensors |= {f"group{number}/{kind}": state[kind] for kind in ("step", *MOMENTS)}
    return tensors


def group_settings(
    named_parameters: Iterable[tuple[str, Tensor]], optimizer: torch.optim.Optimizer
) -> dict[str, dict[str, object]]:
    """Return the settings of each parameter's group, before DeepSpeed rearranges the groups."""
    by_parameter = {
        id(parameter): {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    return {name: by_parameter[id(parameter)] for name, parameter in named_parameters}


def shared_state(
    model: nn.Module, optimizer: Any, tensors: Mapping[str, Tensor], *, rank: int
) -> dict[str, dict[str, Any]]:
    """Return what this rank holds of the fp32 parameters and moments, as all engines name it.

    `tensors`: what `state_tensors` returns, or a copy of it. Views of them, but for the step
    counters, which are copies: one a parameter, as AdamW has them.
    """
    weights: dict[str, Any] = {}
    moments: dict[str, Any] = {}
    parameters: Iterable[tuple[str, Any]] = model.named_parameters()
    for name, parameter in parameters:
        shape = tuple(parameter.ds_shape if is_stage_3(optimizer) else parameter.shape)
        number, start, stop, first = _held(parameter, optimizer, rank)
        group, part = f"group{number}", slice(start, stop)
        master = tensors.get(f"{group}/master", tensors[f"{group}/parameters"])
        weights[name] = FlatPart(shape, first, master.detach()[part])
        step = tensors[f"{group}/step"]
        moments[f"state.{name}.step"] = step.detach().clone().reshape(())
        for kind in MOMENTS:
            moments[f"state.{name}.{kind}"] = FlatPart(
                shape, first, tensors[f"{group}/{kind}"][part]
            )
    return {"model": weights, "optimizer": moments}


def _held(parameter: Any, optimizer: Any, rank: int) -> tuple[int, int, int, int]:
    """Return what this rank's partitions hold of a parameter.

    `(group, start, stop, first)`: elements `[start, stop)` of the group's fp32 partition are those
    of the parameter from `first` on. Read off the addresses, so that it is what is really there.
    """
    is_3 = is_stage_3(optimizer)
    local = parameter.ds_tensor if is_3 else parameter.detach()
    found = _place(local, _flats(optimizer))
    assert found is not None, "without a place, checkpoints are written otherwise"
    number, place = found
    if is_3:
        first = min(rank * local.numel(), parameter.ds_numel)
        # The last ranks' parts are filled up to the size of the others.
        return number, place, place + min(local.numel(), parameter.ds_numel - first), first
    size = masters(optimizer)[number].numel()
    start = min(max(place - rank * size, 0), size)
    stop = min(max(place + parameter.numel() - rank * size, 0), size)
    return number, start, stop, max(rank * size - place, 0) if start < stop else 0


def _place(tensor: Tensor, flats: Sequence[Tensor | None]) -> tuple[int, int] | None:
    """Return which of the flat tensors holds `tensor`, and from which element on."""
    for number, flat in enumerate(flats):
        if flat is None:  # it lies on a disk
            continue
        offset = (tensor.data_ptr() - flat.data_ptr()) // flat.element_size()
        if offset >= 0 and offset + tensor.numel() <= flat.numel():
            return number, offset
    return None


def take_up_masters(optimizer: Any, steps: Iterable[Tensor]) -> None:
    """Make parameters and step counters those of the fp32 partitions that were just loaded.

    `steps`: the counters of all parameters. A collective. Raises: CheckpointError if they differ.
    """
    numbers = {float(step) for step in steps}  # host sync
    if len(numbers) != 1:
        raise CheckpointError(
            f"the parameters of the checkpoint have made {sorted(numbers)} steps; DeepSpeed counts "
            "them together, so only a checkpoint in which all have made as many can be read"
        )
    for master in masters(optimizer):
        optimizer.optimizer.state[master]["step"].fill_(numbers.copy().pop())
    if not is_stage_3(optimizer):
        optimizer.update_lp_params()
        return
    for parameters, master in zip(_flats(optimizer), masters(optimizer), strict=True):
        parameters.data.copy_(master.data)  # one and the same in fp32
    optimizer._partition_all_parameters()  # the next forward gathers what was loaded
