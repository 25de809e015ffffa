"""`single`: one process, no process group."""

from __future__ import annotations

from train.engines.torch_engine import TorchEngine


class SingleEngine(TorchEngine):
    """The plain engine, as it is."""
