"""One machine: the torchrun command and its environment.

Owns the command line and the variables it runs with.
Refuses nothing: `launch.cluster.problems` has seen the config before.
Called by `launch.cli`.
"""

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from launch.cluster import ClusterConfig
from launch.errors import LaunchError


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
        str(entry),
        *overrides,
    ]


def variables(cluster: ClusterConfig) -> dict[str, str]:
    """Return what the ranks' environment gets on top of the caller's."""
    return {"OMP_NUM_THREADS": str(cluster.cpus_per_process), **cluster.environment}


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
