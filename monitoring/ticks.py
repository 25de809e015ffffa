"""Round tick values for linear and logarithmic axes.

Owns the choice of ticks, so that the report and the comparison picture read alike. Needs the
standard library alone. Called by `figure` and `comparison`.
"""

from __future__ import annotations

import math


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round values (1, 2 or 5 times a power of ten) inside `[low, high]`."""
    rough = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def log_ticks(low_exponent: float, high_exponent: float) -> list[float]:
    """Round values inside `[10**low_exponent, 10**high_exponent]`, sparser over more decades.

    Over less than a third of a decade a logarithmic axis is nearly straight: linear ticks then.
    """
    span = high_exponent - low_exponent
    if span < 0.35:
        return nice_ticks(10.0**low_exponent, 10.0**high_exponent, 5)
    digits = (1, 2, 3, 5) if span < 1.6 else (1, 3) if span < 3 else (1,)
    stride = max(1, math.ceil(span / 6))
    first = math.floor(low_exponent / stride) * stride
    decades = range(first, math.ceil(high_exponent) + 1, stride)
    ticks = [float(f"{digit}e{decade}") for decade in decades for digit in digits]
    return [tick for tick in ticks if low_exponent <= math.log10(tick) <= high_exponent]
