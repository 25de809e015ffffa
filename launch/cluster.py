"""Where a run runs: the settings of one machine or of a Slurm allocation.

Owns `ClusterConfig`, how it is read from the composed config, and its cross-checks.
Refuses a config that could not run, with every problem in one message, before anything is written.
Called by `launch.cli`; `launch.local` and `launch.render` take the result.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from pydantic import ConfigDict

from launch.errors import LaunchError

_TIME_LIMIT = re.compile(
    r"(?:(?P<days>\d+)-)?(?P<hours>\d{1,3}):(?P<minutes>[0-5]\d):(?P<seconds>[0-5]\d)"
)
_SLURM_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._@+-]*")
_NODE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(?:\[[0-9,-]+\])?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

# Slurm keeps the warning time in 16 bits (sbatch --signal).
_MAX_SIGNAL_SECONDS = 65535


class ClusterKind(StrEnum):
    """What starts the processes."""

    local = "local"
    slurm = "slurm"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """One group, `cluster`: values come from `conf/cluster/*.yaml`, none from here."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    kind: ClusterKind
    nodes: int
    processes_per_node: int
    cpus_per_process: int
    gpus_per_node: int
    """0 trains on the CPU, over gloo."""
    time_limit: str
    """`HH:MM:SS` or `D-HH:MM:SS`."""
    partition: str | None
    account: str | None
    qos: str | None
    job_name: str
    rendezvous_port: int
    signal_seconds: int
    """How long ranks have to save and leave after a signal; Slurm's comes so long before the limit.
    """
    max_restarts: int
    """How often torchrun starts the ranks again after a failure, before the job ends."""
    requeue: bool
    exclude: list[str]
    """Names of nodes to keep off."""
    setup: list[str]
    """Shell lines, run as they stand before training: module loads, a virtual environment."""
    environment: dict[str, str]
    """Exported to all ranks. Written into the job script, so no place for secrets."""


def parse_cluster(values: object) -> ClusterConfig:
    """Return the typed config of the composed `cluster` group.

    Raises:
        LaunchError: a key is missing, unknown or of the wrong type, or `problems` found some.
    """
    from pydantic import TypeAdapter, ValidationError

    if not isinstance(values, Mapping):
        raise LaunchError(f"cluster={values!r} is no group; use cluster=local or cluster=slurm")
    try:
        config = TypeAdapter(ClusterConfig).validate_python(dict(values))
    except ValidationError as error:
        found = [
            f"cluster.{'.'.join(str(part) for part in item['loc'])}={item['input']!r}:"
            f" {item['msg']}"
            for item in error.errors()
        ]
        raise LaunchError("; ".join(found)) from error
    check(config)
    return config


def check(config: ClusterConfig) -> None:
    """Raise `LaunchError` with all of `problems(config)` in one message, if there are any."""
    found = problems(config)
    if found:
        raise LaunchError("; ".join(found))


def problems(config: ClusterConfig) -> list[str]:
    """Return what keeps this config from running: key, what was found, what to do."""
    return [*_size_problems(config), *_time_problems(config), *_text_problems(config)]


def _size_problems(config: ClusterConfig) -> list[str]:
    found = []
    for key in ("nodes", "processes_per_node", "cpus_per_process"):
        value = getattr(config, key)
        if value < 1:
            found.append(f"cluster.{key}={value}: a run needs at least one; use 1 or more")
    if config.max_restarts < 0:
        found.append(f"cluster.max_restarts={config.max_restarts}: use 0 for none, or a count")
    if config.gpus_per_node < 0:
        found.append(f"cluster.gpus_per_node={config.gpus_per_node}: use 0 for CPU, or a count")
    elif 0 < config.gpus_per_node < config.processes_per_node:
        found.append(
            f"cluster.processes_per_node={config.processes_per_node}: more processes than"
            f" cluster.gpus_per_node={config.gpus_per_node}; use {config.gpus_per_node} or fewer"
        )
    if config.kind is ClusterKind.local and config.nodes > 1:
        found.append(
            f"cluster.nodes={config.nodes}: cluster.kind=local is one machine; use 1, or"
            " cluster=slurm"
        )
    if not 1024 <= config.rendezvous_port <= 65535:
        found.append(
            f"cluster.rendezvous_port={config.rendezvous_port}: not a free user port; use one"
            " from 1024 to 65535"
        )
    return found


def _time_problems(config: ClusterConfig) -> list[str]:
    limit_seconds = _seconds(config.time_limit)
    if not limit_seconds:
        return [
            f"cluster.time_limit={config.time_limit!r}: not a time; use HH:MM:SS or"
            " D-HH:MM:SS, in quotes in YAML, and more than zero"
        ]
    if not 1 <= config.signal_seconds <= min(limit_seconds - 1, _MAX_SIGNAL_SECONDS):
        return [
            f"cluster.signal_seconds={config.signal_seconds}: must lie within the time limit of"
            f" {limit_seconds} s and be at most {_MAX_SIGNAL_SECONDS}; use the time that one"
            " checkpoint takes, doubled"
        ]
    return []


def _seconds(time_limit: str) -> int | None:
    match = _TIME_LIMIT.fullmatch(time_limit)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _text_problems(config: ClusterConfig) -> list[str]:
    # sbatch reads #SBATCH lines by rules of its own, not the shell's: only plain names go there.
    names = {
        "job_name": config.job_name,
        "partition": config.partition,
        "account": config.account,
        "qos": config.qos,
    }
    found = [
        f"cluster.{key}={value!r}: not a plain name; use letters, digits and . _ @ + -"
        for key, value in names.items()
        if value is not None and not _SLURM_NAME.fullmatch(value)
    ]
    found += [
        f"cluster.exclude={node!r}: not a node name; use one entry a node, such as n07 or n[1-4]"
        for node in config.exclude
        if not _NODE_NAME.fullmatch(node)
    ]
    found += [
        f"cluster.environment.{name}: not a variable name; use letters, digits and underscores"
        for name in config.environment
        if not _VARIABLE.fullmatch(name)
    ]
    if config.kind is ClusterKind.local and config.setup:
        found.append(
            f"cluster.setup={config.setup!r}: cluster.kind=local starts no shell; run these"
            " lines before trimtab, and leave cluster.setup=[]"
        )
    return found
