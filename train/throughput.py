"""How fast a device could be: the peak that model FLOPs utilisation (MFU) is a share of."""

from __future__ import annotations

import time

import torch

# Dense bf16 tensor-core peaks in TFLOP/s, without sparsity. Source: NVIDIA's data sheets
# (A100 SXM, H100 SXM, H100 PCIe, H200 SXM, B200).
_PEAK_TFLOPS = (
    ("H100 PCIe", 756.0),
    ("H100", 989.0),
    ("H200", 989.0),
    ("A100", 312.0),
    ("B200", 2250.0),
)


def peak_flops(device: torch.device, configured_tflops: float | None) -> float | None:
    """Return the peak of one device in FLOP/s, None if it is not known.

    A configured value wins; GPUs are known by name; on a CPU, a matrix product is timed for about
    a tenth of a second, so a CPU's MFU is a share of what its own BLAS reaches.
    """
    if configured_tflops is not None:
        return configured_tflops * 1e12
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((peak * 1e12 for part, peak in _PEAK_TFLOPS if part in name), None)
    return _measured_cpu_flops()


def _measured_cpu_flops(size: int = 768, num_products: int = 8) -> float:
    left, right = torch.randn(size, size), torch.randn(size, size)
    torch.mm(left, right)
    best = float("inf")
    for _ in range(num_products):
        started = time.perf_counter()
        torch.mm(left, right)
        best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 / best
