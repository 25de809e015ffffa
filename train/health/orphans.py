"""No rank outlives its launcher: the kernel ends it when the launcher dies.

A SIGKILL of torchrun's agent leaves its workers behind; they would train on, unseen, while the
restarted job waits for the run folder. Linux alone; elsewhere nothing is done.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_launcher() -> None:
    """Ask the kernel for SIGKILL at the death of torchrun's agent; without one do nothing.

    Called first thing, by the thread that torchrun's agent started. If the agent is dead already,
    this process ends here.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or sys.platform != "linux":
        return
    parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        return
    # The agent may have died before the kernel knew of the wish: then somebody adopted us.
    if os.getppid() != parent or parent == 1:
        os.kill(os.getpid(), signal.SIGKILL)
