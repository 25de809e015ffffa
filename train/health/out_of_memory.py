"""Out of memory, in one message: where, with what batch, what is in use, and what to change."""

from __future__ import annotations

import socket

import torch

from train.settings import RunConfig

_PHRASES = (
    "can't allocate memory",  # torch on CPUs
    "CUDA out of memory",
    "out of memory",
    "Cannot allocate memory",
)
_GIB = 2**30


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception says that there is no memory left, on the device or the host."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    is_plain = type(error) in (RuntimeError, OSError)
    return is_plain and any(phrase in str(error) for phrase in _PHRASES)


def advice(config: RunConfig, *, rank: int, num_ranks: int, device: torch.device, step: int) -> str:
    """Return the message: what was tried, what is in use, which settings need less."""
    share = -(-config.schedule.batch_samples // num_ranks)
    at_once = min(share, config.engine.micro_batch_samples or share)
    length = config.data.sequence_length
    ways = []
    if at_once > 1:
        ways.append(
            f"engine.micro_batch_samples={max(1, at_once // 2)} (now {at_once} of this rank's "
            f"{share} samples at a time; the same updates, a little slower)"
        )
    if num_ranks > 1 and config.engine.kind not in ("fsdp", "deepspeed"):
        ways.append(f"engine=fsdp (parameters and moments spread over {num_ranks} ranks)")
    elif num_ranks == 1:
        ways.append("more ranks with engine=fsdp")
    if config.checkpoint.keep_snapshots and device.type == "cpu":
        ways.append("checkpoint.keep_snapshots=0 (rewinds then go to disk)")
    ways.append(f"a shorter data.sequence_length than {length:,}, or a smaller model/size")
    return (
        f"rank {rank} ({device} on {socket.gethostname()}) ran out of memory after step {step}, "
        f"with {at_once} samples of {length:,} tokens at a time; {_in_use(device)}. What needs "
        f"less, best first: {'; '.join(ways)}"
    )


def _in_use(device: torch.device) -> str:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        ours, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        return (
            f"{(total - free) / _GIB:.1f} of {total / _GIB:.1f} GiB of the device are in use, "
            f"{ours / _GIB:.1f} GiB by tensors here, {(reserved - ours) / _GIB:.1f} GiB held free "
            f"by torch, peak {torch.cuda.max_memory_allocated(device) / _GIB:.1f} GiB"
        )
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    bound = "" if limit == resource.RLIM_INFINITY else f", limited to {limit / _GIB:.1f} GiB"
    return f"this process has held {peak / _GIB:.1f} GiB at most{bound}"
