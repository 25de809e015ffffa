"""A small config tree, and cluster configs to vary."""

import shutil
from pathlib import Path

import pytest

from launch.cluster import ClusterConfig, ClusterKind
from launch.paths import conf_folder

FILES = {
    "train.yaml": """\
defaults:
  - optim: adamw
  - cluster: local
  - _self_

# how many updates
steps: 100
run:
  name: demo  # the folder
""",
    "optim/adamw.yaml": """\
# AdamW.

# Paper A, table 1
lr: 1e-3
betas: [0.9, 0.95]   # Paper B,
                     # section 2
names:  # all of them
  - a
  - b
label: "x # y"
""",
    "optim/muon.yaml": """\
# @package optim
lr: 2e-2  # Muon's own
""",
    "exp/falcon_like.yaml": """\
# @package _global_
defaults:
  - override /optim: muon
optim:
  # Falcon, table 16
  lr: 3e-4
""",
}


@pytest.fixture
def conf_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "conf"
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    shutil.copytree(conf_folder() / "cluster", folder / "cluster")
    return folder


@pytest.fixture
def two_nodes() -> ClusterConfig:
    return ClusterConfig(
        kind=ClusterKind.slurm,
        nodes=2,
        processes_per_node=8,
        cpus_per_process=6,
        gpus_per_node=8,
        time_limit="1-12:00:00",
        partition="main",
        account="lab",
        qos=None,
        job_name="falcon",
        rendezvous_port=29400,
        signal_seconds=300,
        max_restarts=3,
        requeue=True,
        exclude=["n07", "n[10-12]"],
        setup=["module load cuda/12.8"],
        environment={"NCCL_DEBUG": "WARN", "GREETING": "it's fine"},
    )
