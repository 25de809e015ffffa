"""Run folders: which names are safe, and where a run is found."""

from pathlib import Path

import pytest

from launch.compose import compose, pin_run_name
from launch.errors import LaunchError
from launch.paths import find_run, run_folder


def test_run_folder_joins_its_parts() -> None:
    assert run_folder("runs", "falcon-1.b") == Path("runs/falcon-1.b")
    assert run_folder("/data/me", "x") == Path("/data/me/x")


@pytest.mark.parametrize("name", ["a b; rm -rf /", "../up", ".hidden", "a\nb", "", "50%"])
def test_unsafe_run_name_is_refused(name: str) -> None:
    with pytest.raises(LaunchError, match=r"run\.name=.* cannot name a folder"):
        run_folder("runs", name)


@pytest.mark.parametrize("parent", ["a b", "x\n#SBATCH -A y", "%j", ""])
def test_unsafe_parent_is_refused(parent: str) -> None:
    with pytest.raises(LaunchError, match=r"run\.dir=.* cannot stand in a job script"):
        run_folder(parent, "x")


@pytest.mark.parametrize(
    ("given", "name", "added"),
    [
        ([], "demo", []),
        (["run.name='${run_name:}'"], "trimtab", ["run.name=trimtab"]),
        (
            ["+exp=falcon_like", "run.name='${run_name:}-2'"],
            "falcon_like-2",
            ["run.name=falcon_like-2"],
        ),
        (["~run.name"], "trimtab", ["++run.name=trimtab"]),
    ],
)
def test_default_run_name_is_said_outright(
    conf_dir: Path, given: list[str], name: str, added: list[str]
) -> None:
    found, overrides = pin_run_name(compose(given, conf_dir=conf_dir), given)
    assert found == name
    assert overrides == [*given, *added]
    compose(overrides, conf_dir=conf_dir)


def test_run_is_found_by_path_or_by_name(tmp_path: Path) -> None:
    (tmp_path / "falcon-1").mkdir()
    assert find_run("falcon-1", tmp_path) == tmp_path / "falcon-1"
    assert find_run(str(tmp_path / "falcon-1")) == tmp_path / "falcon-1"


def test_unknown_run_suggests_the_closest(tmp_path: Path) -> None:
    (tmp_path / "falcon-1").mkdir()
    with pytest.raises(LaunchError, match=r"no run 'falcon1'.*did you mean falcon-1\?"):
        find_run("falcon1", tmp_path)


def test_unknown_run_without_any_asks_for_a_path(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="give the path of a run folder"):
        find_run("falcon1", tmp_path / "runs")
