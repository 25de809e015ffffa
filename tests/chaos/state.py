"""The state of a run as one number, to compare it bit for bit."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any


def digest(checkpoint: Path) -> str:
    """Return a digest of all tensors of a checkpoint, by name: weights, moments, step counters.

    Raises: ValueError if it holds none.
    """
    import torch
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    tree: dict[str, Any] = {}
    _load_state_dict(
        tree,
        storage_reader=FileSystemReader(checkpoint),
        planner=_EmptyStateDictLoadPlanner(),
        no_dist=True,
    )
    hashed, num_tensors = sha256(), 0

    def walk(prefix: str, node: Any) -> None:
        nonlocal num_tensors
        if isinstance(node, torch.Tensor):
            num_tensors += 1
            hashed.update(f"{prefix} {node.dtype} {tuple(node.shape)}".encode())
            hashed.update(node.reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(node, dict):
            for key in sorted(node, key=str):
                walk(f"{prefix}/{key}", node[key])

    walk("", tree)
    if num_tensors == 0:
        raise ValueError(f"{checkpoint} holds no tensors")
    return hashed.hexdigest()
