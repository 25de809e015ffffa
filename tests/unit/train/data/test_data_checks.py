"""What is refused of `data` before any file is opened."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from train.data.checks import data_problems
from train.settings import RunConfig

TWO = ("data.sources.a.paths=[x]", "data.sources.b.paths=[y]")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), []),
        (("data.sources.a.paths=[]",), ["data.sources.a.paths is empty"]),
        (
            ("data.paths=[z]", *TWO),
            ["data.paths and data.sources are both set"],
        ),
        (
            (*TWO, "data.sources.a.weight=0", "data.sources.b.weight=0"),
            ["data.sources: every weight is 0"],
        ),
        (
            (*TWO, "data.stages=[{start: 9 steps, weights: {a: 1}}]"),
            ["data.stages[0].start=9 steps: a mixture is scheduled over tokens"],
        ),
        (
            (*TWO, "data.stages=[{start: 1k tokens, weights: {aa: 1}}]"),
            ["data.stages[0].weights.aa: there is no such source; did you mean a?"],
        ),
        (
            (
                *TWO,
                "data.stages=[{start: 1k tokens, ramp: 5k tokens, weights: {a: 1}}, "
                "{start: 4k tokens, weights: {b: 1}}]",
            ),
            ["data.stages[0]: its ramp ends at 6,000 tokens, and another stage starts at 4,000"],
        ),
        (
            (
                *TWO,
                "data.stages=[{start: 1k tokens, ramp: 3k tokens, weights: {a: 1}}, "
                "{start: 4k tokens, weights: {b: 1}}]",
            ),
            [],
        ),
        (("data.token_dtype=float32",), ["data.token_dtype=float32: should be uint16"]),
    ],
)
def test_each_problem_is_named_with_its_key(
    arguments: tuple[str, ...],
    expected: list[str],
    compose_node: Callable[..., dict[str, Any]],
) -> None:
    from pydantic import TypeAdapter

    config = TypeAdapter(RunConfig).validate_python(compose_node(arguments))
    found = list(data_problems(config.data))
    assert len(found) == len(expected)
    for line, start in zip(found, expected, strict=True):
        assert line.startswith(start)
