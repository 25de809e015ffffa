"""Make checkpoints in DeepSpeed's own files readable by all engines. Thin: all else is in
`train.conversion`. `trimtab convert` starts it, on as many ranks as wrote them.

Exit codes: 0 done, 2 a checkpoint cannot be converted, 1 anything else, 130 interrupted.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # `torchrun train/convert.py` puts train/ on the path; the packages lie one level up.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from train.conversion import main

    sys.exit(main())
