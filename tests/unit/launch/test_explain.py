"""Where a value comes from, over a small config tree."""

from pathlib import Path

import pytest

from launch.compose import compose, select
from launch.errors import LaunchError
from launch.explain import COMMAND_LINE, DELETED, Setting, explain


def _places(settings: list[Setting]) -> list[tuple[str, str, bool]]:
    return [(setting.place, setting.value, setting.is_winner) for setting in settings]


def test_base_value_has_file_line_and_comment(conf_dir: Path) -> None:
    (setting,) = explain("steps", [], conf_dir=conf_dir)
    assert _places([setting]) == [("conf/train.yaml:7", "100", True)]
    assert setting.comment == "how many updates"


def test_group_file_sets_keys_under_its_group(conf_dir: Path) -> None:
    (setting,) = explain("optim.lr", [], conf_dir=conf_dir)
    assert _places([setting]) == [("conf/optim/adamw.yaml:4", "1e-3", True)]
    assert setting.comment == "Paper A, table 1"


def test_experiment_beats_the_group_it_overrides(conf_dir: Path) -> None:
    settings = explain("optim.lr", ["+exp=falcon_like"], conf_dir=conf_dir)
    assert _places(settings) == [
        ("conf/optim/muon.yaml:2", "2e-2", False),
        ("conf/exp/falcon_like.yaml:6", "3e-4", True),
    ]
    assert [s.comment for s in settings] == ["Muon's own", "Falcon, table 16"]


def test_command_line_comes_last_and_wins(conf_dir: Path) -> None:
    settings = explain("optim.lr", ["exp=falcon_like", "optim.lr=1"], conf_dir=conf_dir)
    assert _places(settings)[-1] == (COMMAND_LINE, "1", True)
    assert [s.is_winner for s in settings] == [False, False, True]


def test_group_lists_all_its_leaves(conf_dir: Path) -> None:
    found = {s.key: (s.value, s.comment) for s in explain("optim", [], conf_dir=conf_dir)}
    assert found == {
        "optim.lr": ("1e-3", "Paper A, table 1"),
        "optim.betas": ("[0.9, 0.95]", "Paper B, section 2"),
        "optim.names": ("[a, b]", "all of them"),
        "optim.label": ('"x # y"', ""),
    }


def test_added_group_and_deleted_key_are_shown(conf_dir: Path) -> None:
    settings = explain("run", ["+run={tags: {a: 1}}", "~run.name"], conf_dir=conf_dir)
    winners = {s.key: s.value for s in settings if s.is_winner}
    assert winners == {"run.name": DELETED, "run.tags.a": "1"}


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("optim.lrr", "optim.lr"),
        ("lr", "optim.lr"),
        ("lrr", "optim.lr"),
        ("optm", "optim"),
        ("run.nam", "run.name"),
    ],
)
def test_unknown_key_suggests_the_closest(conf_dir: Path, key: str, hint: str) -> None:
    with pytest.raises(LaunchError, match=rf"nothing sets '{key}'; did you mean .*\b{hint}\b"):
        explain(key, [], conf_dir=conf_dir)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("exp=falcn", "Could not find 'exp/falcn'; Available options in 'exp': falcon_like"),
        ("optim.x=1", "Could not override 'optim.x'; To append to your config use"),
        ("optim.lr=[1", r"^optim\.lr=\[1: cannot be read; "),
    ],
)
def test_hydra_errors_are_one_line(conf_dir: Path, override: str, message: str) -> None:
    with pytest.raises(LaunchError, match=message) as caught:
        compose([override], conf_dir=conf_dir)
    assert "\n" not in str(caught.value)


def test_missing_config_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"holds no train\.yaml"):
        compose([], conf_dir=tmp_path)


def test_broken_interpolation_is_a_launch_error(conf_dir: Path) -> None:
    config = compose(["run.name=${nowhere}"], conf_dir=conf_dir)
    with pytest.raises(LaunchError, match="nowhere"):
        select(config, "run.name")


def test_plain_exp_means_added_exp(conf_dir: Path) -> None:
    config = compose(["exp=falcon_like"], conf_dir=conf_dir)
    assert select(config, "optim") == {"lr": 3e-4}
    assert select(config, "no.such") is None
