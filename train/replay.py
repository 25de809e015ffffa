"""Replay an incident of a run: `torchrun train/replay.py RUN --incident N`. Thin: all else is in
`train.attribution.command`. `trimtab replay` starts it.

Exit codes: 0 there is an attribution, 2 the incident cannot be replayed, 1 anything else, 130
interrupted.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # `torchrun train/replay.py` puts train/ on the path; the packages lie one level up.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from train.attribution.command import main

    sys.exit(main())
