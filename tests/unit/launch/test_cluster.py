"""Cluster settings: the shipped files parse, and what cannot run is refused with its key."""

from dataclasses import fields, replace
from typing import Any

import pytest
import yaml

from launch.cluster import ClusterConfig, ClusterKind, parse_cluster, problems
from launch.errors import LaunchError
from launch.paths import conf_folder


@pytest.mark.parametrize("kind", list(ClusterKind))
def test_shipped_file_sets_every_value_and_has_no_problem(kind: ClusterKind) -> None:
    values = yaml.safe_load((conf_folder() / "cluster" / f"{kind}.yaml").read_text())
    assert list(values) == [field.name for field in fields(ClusterConfig)]
    assert parse_cluster(values).kind is kind


def test_valid_config_has_no_problem(two_nodes: ClusterConfig) -> None:
    assert problems(two_nodes) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nodes": 0}, "cluster.nodes=0: a run needs at least one"),
        ({"processes_per_node": 0}, "cluster.processes_per_node=0: a run needs"),
        ({"cpus_per_process": -1}, "cluster.cpus_per_process=-1: a run needs"),
        ({"gpus_per_node": -1}, "cluster.gpus_per_node=-1: use 0 for CPU"),
        ({"gpus_per_node": 4}, "cluster.processes_per_node=8: more processes than"),
        ({"rendezvous_port": 80}, "cluster.rendezvous_port=80: not a free user port"),
        ({"time_limit": "5h"}, "cluster.time_limit='5h': not a time"),
        ({"time_limit": "00:00:00"}, "cluster.time_limit='00:00:00': not a time"),
        ({"time_limit": "00:01:00"}, "cluster.signal_seconds=300: must lie within"),
        ({"signal_seconds": 70000}, "cluster.signal_seconds=70000: must lie within"),
        ({"job_name": "a b"}, "cluster.job_name='a b': not a plain name"),
        ({"partition": "x\n#SBATCH -A y"}, "cluster.partition='x\\n#SBATCH -A y': not a"),
        ({"exclude": ["a,b"]}, "cluster.exclude='a,b': not a node name"),
        ({"environment": {"A B": "1"}}, "cluster.environment.A B: not a variable name"),
    ],
)
def test_problem_names_the_key_and_what_was_found(
    two_nodes: ClusterConfig, changes: dict[str, Any], message: str
) -> None:
    (found,) = problems(replace(two_nodes, **changes))
    assert found.startswith(message)


def test_local_refuses_what_needs_a_cluster(two_nodes: ClusterConfig) -> None:
    found = problems(replace(two_nodes, kind=ClusterKind.local))
    assert [text.partition("=")[0] for text in found] == ["cluster.nodes", "cluster.setup"]


def test_all_problems_come_in_one_message() -> None:
    values = yaml.safe_load((conf_folder() / "cluster" / "slurm.yaml").read_text())
    with pytest.raises(LaunchError, match=r"cluster\.nodes=0.*cluster\.time_limit=.*"):
        parse_cluster({**values, "nodes": 0, "time_limit": "long"})


def test_unknown_and_mistyped_keys_are_refused() -> None:
    values = yaml.safe_load((conf_folder() / "cluster" / "slurm.yaml").read_text())
    with pytest.raises(LaunchError, match=r"cluster\.nodez=1.*cluster\.|cluster\..*nodez=1"):
        parse_cluster({**values, "nodez": 1, "requeue": "perhaps"})


def test_missing_group_says_what_to_add() -> None:
    with pytest.raises(LaunchError, match="use cluster=local or cluster=slurm"):
        parse_cluster(None)
