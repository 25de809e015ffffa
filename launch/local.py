"""One machine: the torchrun command and its environment, and waiting for its end.

Owns the command line, the variables it runs with, and the exit code that a caller sees: torchrun
itself returns 1 whatever its ranks return, so the ranks say in a file how they ended.
Refuses nothing: `launch.cluster.problems` has seen the config before.
Called by `launch.cli`.
"""

import ctypes
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from launch.cluster import ClusterConfig
from launch.errors import LaunchError

OUTCOME_VARIABLE = "TRIMTAB_OUTCOME"
SIGNALS_TO_HANDLE = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)
_PR_SET_PDEATHSIG = 1
_SAME_SECONDS = 1.0  # one Ctrl-C may come twice


def command(
    cluster: ClusterConfig, overrides: Sequence[str], *, python: Path, entry: Path
) -> list[str]:
    """Return the torchrun command; `--standalone` finds a free port by itself."""
    return [
        str(python),
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={cluster.processes_per_node}",
        f"--max-restarts={cluster.max_restarts}",
        str(entry),
        *overrides,
    ]


def variables(cluster: ClusterConfig) -> dict[str, str]:
    """Return what the ranks' environment gets on top of the caller's."""
    return {
        "OMP_NUM_THREADS": str(cluster.cpus_per_process),
        # torchrun passes these signals on, and leaves the ranks so many seconds to save.
        "PET_SIGNALS_TO_HANDLE": SIGNALS_TO_HANDLE,
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(cluster.signal_seconds),
        **cluster.environment,
    }


def preview(arguments: Sequence[str], added: Mapping[str, str]) -> str:
    """Return the command as one line that a shell would run the same way."""
    assignments = [f"{name}={shlex.quote(value)}" for name, value in added.items()]
    return " ".join([*assignments, shlex.join(arguments)])


def run(arguments: Sequence[str], added: Mapping[str, str]) -> NoReturn:
    """Become the command, so that its exit code and every signal are the caller's own.

    Raises:
        LaunchError: the program cannot be started.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execvpe(arguments[0], list(arguments), {**os.environ, **added})
    except OSError as error:
        raise LaunchError(f"{arguments[0]} cannot be started: {error.strerror}") from error


def supervise(arguments: Sequence[str], added: Mapping[str, str]) -> int:
    """Run the command, pass every signal on to it, and return the exit code of the training.

    It is the one that the ranks have written down; without one it is the command's own. A second
    SIGINT ends the command at once, and the kernel its ranks: torchrun would wait for them.

    Raises:
        LaunchError: the program cannot be started.
    """
    with tempfile.TemporaryDirectory(prefix="trimtab-launch-") as folder:
        told = Path(folder) / "outcome.json"
        environment = {**os.environ, **added, OUTCOME_VARIABLE: str(told)}
        # One that comes before there is somebody to pass it on to waits.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)
        try:
            # A group of its own: a Ctrl-C of the terminal must not reach it twice.
            child = subprocess.Popen(
                list(arguments),
                env=environment,
                process_group=0,
                preexec_fn=_prepare_child,
            )
        except OSError as error:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            raise LaunchError(f"{arguments[0]} cannot be started: {error.strerror}") from error
        interrupts: list[float] = []

        def pass_on(number: int, _: object) -> None:
            if number == signal.SIGINT:
                interrupts.append(time.monotonic())
                if interrupts[-1] - interrupts[0] > _SAME_SECONDS:
                    child.kill()
            child.send_signal(number)

        before = {number: signal.signal(number, pass_on) for number in _PASSED_ON}
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        try:
            returned = child.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if interrupts and returned == -signal.SIGKILL:
            return 128 + signal.SIGINT
        returned = returned if returned >= 0 else 128 - returned
        return _told(told) or returned


def _told(path: Path) -> int:
    """Return the exit code that the ranks wrote down, 0 if there is none."""
    try:
        code = json.loads(path.read_text())["exit_code"]
    except (OSError, ValueError, KeyError, TypeError):
        return 0
    return code if isinstance(code, int) else 0


def _prepare_child() -> None:
    """Let signals through, and have the kernel tell the child to save if this process is killed."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
