"""Prepare a corpus: `python train/prepare.py SOURCES... --output DIR`. Thin: all else is in
`train.data.prepare.command`. `trimtab prepare` starts it; it starts its own workers.

Exit codes: 0 the corpus is there and whole, 2 the sources, settings or output cannot be used, 1
anything else, 130 interrupted, 143 stopped by SIGTERM.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # `python train/prepare.py` puts train/ on the path; the packages lie one level up.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    try:
        from train.data.prepare.command import main
    except KeyboardInterrupt:
        sys.stderr.write("trimtab: interrupted; nothing was begun\n")
        sys.exit(130)

    sys.exit(main())
