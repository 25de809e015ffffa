"""Names of engines in tests: `deepspeed-zero1` is a kind and a ZeRO stage."""

from __future__ import annotations

from importlib.util import find_spec

import pytest


def kind_and_stage(engine: str) -> tuple[str, int]:
    """Return what a name means; skip, visibly, what is not installed."""
    kind, _, stage = engine.partition("-zero")
    if kind == "deepspeed" and find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed; pip install 'trimtab[deepspeed]'")
    return kind, int(stage or 2)
