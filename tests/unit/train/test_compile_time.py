"""What torch.compile takes is found by whoever asks, without a word from whoever compiled."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from train.compile_time import compile_seconds


def test_nothing_was_compiled_where_the_compiler_was_not_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(__import__("sys").modules, "torch._dynamo.utils", raising=False)
    assert compile_seconds() == 0.0


def test_compiling_is_counted_and_calling_is_not() -> None:
    def slow(graph: torch.fx.GraphModule, _: list[Tensor]) -> object:
        time.sleep(0.2)
        return graph.forward

    double = torch.compile(lambda x: 2 * x, backend=slow)
    before = compile_seconds()
    double(torch.ones(3))
    after = compile_seconds()
    assert after - before > 0.2
    double(torch.ones(3))
    assert compile_seconds() == after
