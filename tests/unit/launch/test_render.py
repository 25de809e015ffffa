"""The Slurm script: golden, clean, and safe with hostile values."""

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from launch.cluster import ClusterConfig
from launch.errors import LaunchError
from launch.render import render

GOLDEN = Path(__file__).parent / "golden" / "slurm_two_nodes.sbatch"
HOSTILE = "run.notes='a b; rm -rf /' $(touch x) `touch y` \"z\" !"


def _render(cluster: ClusterConfig, overrides: list[str]) -> str:
    return render(
        cluster,
        overrides,
        run_folder=Path("runs/falcon-1"),
        python=Path("/opt/trimtab/bin/python"),
        entry=Path("/opt/trimtab/train/main.py"),
    )


def _variants(two_nodes: ClusterConfig) -> list[ClusterConfig]:
    return [
        two_nodes,
        replace(two_nodes, gpus_per_node=0, requeue=False, setup=[], environment={}, exclude=[]),
    ]


def test_two_node_script_matches_its_golden_file(two_nodes: ClusterConfig) -> None:
    script = _render(two_nodes, ["+exp=falcon_like", "run.notes='a b; rm -rf /'"])
    assert script == GOLDEN.read_text(encoding="utf-8")


def test_script_is_valid_bash(two_nodes: ClusterConfig) -> None:
    for cluster in _variants(two_nodes):
        script = _render(cluster, [HOSTILE])
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_script_passes_shellcheck(two_nodes: ClusterConfig) -> None:
    for cluster in _variants(two_nodes):
        done = subprocess.run(
            ["shellcheck", "-"],
            input=_render(cluster, [HOSTILE]),
            text=True,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout


def test_hostile_values_arrive_unchanged_and_run_nothing(
    two_nodes: ClusterConfig, tmp_path: Path
) -> None:
    # The real script, with stand-ins for Slurm's commands: srun shows what training would get.
    cluster = replace(two_nodes, setup=[], environment={"NOTE": HOSTILE})
    tools = {
        "scontrol": "printf 'n1\\nn2\\n'",
        "srun": 'printf "%s\\0" "$NOTE" "$@" >got',
    }
    for name, body in tools.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", _render(cluster, [HOSTILE, "~key", "+a={b: [1, 2]}"])],
        cwd=tmp_path,
        env={
            "PATH": f"{tmp_path}:/usr/bin:/bin",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_JOB_ID": "7",
            "SLURM_CPUS_PER_TASK": "48",
        },
        check=False,
    )
    assert done.returncode == 1, "a step that returns 0, and no rank that says that it is complete"
    got = (tmp_path / "got").read_text().split("\0")[:-1]
    assert got[0] == HOSTILE
    assert got[-3:] == [HOSTILE, "~key", "+a={b: [1, 2]}"]
    assert "--rdzv-endpoint=n1:29400" in got
    assert "--rdzv-id=7-0" in got
    assert sorted(p.name for p in tmp_path.iterdir()) == ["got", "scontrol", "srun"]


def test_exit_code_is_that_of_the_step(two_nodes: ClusterConfig, tmp_path: Path) -> None:
    assert _run_with_srun(two_nodes, tmp_path, "exit 5") == 5
    assert not (tmp_path / "requeued").exists()


def test_time_limit_signal_reaches_the_step_and_requeues(
    two_nodes: ClusterConfig, tmp_path: Path
) -> None:
    # The stand-in for Slurm sends USR1 twice, as Slurm has been seen to do.
    srun = 'trap "echo saved >saved; exit 4" USR1; kill -USR1 $PPID; sleep 0.2; kill -USR1 $PPID; :'
    assert _run_with_srun(two_nodes, tmp_path, srun) == 4
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"


def _told(code: int) -> str:
    return f"""mkdir -p runs/falcon-1/launch
printf '{{\n  "code": "x",\n  "exit_code": {code},\n  "reason": ""\n}}\n' >"$TRIMTAB_OUTCOME"
exit 1"""


@pytest.mark.parametrize(
    ("code", "is_requeued"), [(75, True), (3, False), (2, False), (130, False)]
)
def test_what_the_ranks_have_said_decides_on_the_queue(
    two_nodes: ClusterConfig, tmp_path: Path, code: int, is_requeued: bool
) -> None:
    assert _run_with_srun(two_nodes, tmp_path, _told(code)) == code
    assert (tmp_path / "requeued").exists() is is_requeued


def test_a_step_that_loses_a_node_and_returns_0_is_no_success(
    two_nodes: ClusterConfig, tmp_path: Path
) -> None:
    assert _run_with_srun(two_nodes, tmp_path, "exit 0") == 1


def test_without_requeue_the_time_limit_ends_the_job(
    two_nodes: ClusterConfig, tmp_path: Path
) -> None:
    srun = 'trap "exit 4" USR1; kill -USR1 $PPID; sleep 0.2; :'
    assert _run_with_srun(replace(two_nodes, requeue=False), tmp_path, srun) == 4
    assert not (tmp_path / "requeued").exists()


def _run_with_srun(cluster: ClusterConfig, folder: Path, srun: str) -> int:
    tools = {
        "scontrol": 'if [ "$1" = show ]; then echo n1; else echo "$@" >requeued; fi',
        "srun": srun,
    }
    for name, body in tools.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    return subprocess.run(
        ["bash", "-c", _render(replace(cluster, setup=[]), [])],
        cwd=folder,
        env={
            "PATH": f"{folder}:/usr/bin:/bin",
            "SLURM_JOB_NODELIST": "n1",
            "SLURM_JOB_ID": "7",
            "SLURM_CPUS_PER_TASK": "1",
        },
        check=False,
    ).returncode


def test_config_with_problems_is_not_rendered(two_nodes: ClusterConfig) -> None:
    with pytest.raises(LaunchError, match=r"cluster\.nodes=0"):
        _render(replace(two_nodes, nodes=0), [])
