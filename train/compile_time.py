"""How long torch.compile has taken in this process, whoever called it.

Owns the one look into torch's own count. Refuses to import the compiler, which takes a second: if
nobody has, nothing was compiled. Called once a step, for two look-ups in a dictionary.
"""

from __future__ import annotations

import sys


def compile_seconds() -> float:
    """Return the seconds so far, forward and backward; 0 where this torch keeps no such count."""
    module = sys.modules.get("torch._dynamo.utils")
    nanoseconds = getattr(module, "cumulative_time_spent_ns", None)
    if not isinstance(nanoseconds, dict):
        return 0.0
    names = ("entire_frame_compile", "entire_backward_compile")
    return float(sum(nanoseconds.get(name, 0.0) for name in names)) / 1e9
