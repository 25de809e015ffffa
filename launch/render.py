"""The Slurm job script, from the settings and the overrides.

Owns the template's inputs and the quoting of each one.
Refuses a config with problems, and a template that reads a value nobody gave.
Called by `launch.cli`; writes nothing.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

from launch.cluster import ClusterConfig, check
from launch.local import SIGNALS_TO_HANDLE

TEMPLATE = "slurm.sbatch.j2"


def render(
    cluster: ClusterConfig,
    overrides: Sequence[str],
    *,
    run_folder: Path,
    python: Path,
    entry: Path,
) -> str:
    """Return the sbatch script that starts `entry` with `overrides` on every node.

    `run_folder` comes from `launch.paths.run_folder`. A relative one is taken from the folder that
    the job is submitted in; its `logs` must exist by then, for Slurm makes none.

    Raises:
        LaunchError: `problems(cluster)` found some.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    check(cluster)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).resolve().parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # the output is a shell script: `quote` escapes, HTML rules would break
    )
    environment.filters["quote"] = _quote
    return environment.get_template(TEMPLATE).render(
        cluster=cluster,
        overrides=overrides,
        log_pattern=f"{run_folder}/logs/%x-%j.out",
        outcome_pattern=f"{run_folder}/launch/outcome-",
        signals_to_handle=SIGNALS_TO_HANDLE,
        python=python,
        entry=entry,
    )


def _quote(value: object) -> str:
    return shlex.quote(str(value))
