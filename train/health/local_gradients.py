"""Checksums of the gradients that one rank computes, before they travel to others.

Works for whole and for sharded models: in forward, a module's parameters are what it computes
with. Used for single steps only: each gradient is summed once more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from train.engines.snapshot import tensor_checksum


class LocalGradients:
    """What was computed while `watch` was open, by parameter."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def checksums(self) -> dict[str, int]:
        """Return the checksums by parameter, over all micro-batches. A host sync."""
        if not self._sums:
            return {}
        sums = torch.stack(list(self._sums.values())).tolist()
        return dict(sorted(zip(self._sums, sums, strict=True)))

    def add(self, name: str, gradient: Tensor) -> None:
        """Take one gradient up; no host sync."""
        total = tensor_checksum(gradient.contiguous())
        self._sums[name] = self._sums[name] + total if name in self._sums else total


@contextmanager
def watch(model: nn.Module) -> Iterator[LocalGradients]:
    """Watch every parameter of `model` that takes part in a forward. No collective."""
    found = LocalGradients()
    handles: list[RemovableHandle] = []
    seen: dict[int, Tensor] = {}

    def before_forward(prefix: str, module: nn.Module, _: object) -> None:
        for name, parameter in _own_parameters(module).items():
            if id(parameter) not in seen and parameter.requires_grad and torch.is_grad_enabled():
                seen[id(parameter)] = parameter  # one hook, whoever shares it, in all micro-batches
                full_name = f"{prefix}.{name}" if prefix else name
                take_up = partial(found.add, full_name)
                handles.append(parameter.register_hook(take_up))  # type: ignore[no-untyped-call]  # torch lacks the annotation

    for prefix, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(partial(before_forward, prefix)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _own_parameters(module: nn.Module) -> Mapping[str, Tensor]:
    return {name: each for name, each in module._parameters.items() if each is not None}
