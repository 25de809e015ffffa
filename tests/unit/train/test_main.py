"""How the command line reaches Hydra."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig

from train.main import CONF, rewrite_arguments, run_name


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("exp=falcon_like", "+exp=falcon_like"),
        ("+exp=falcon_like", "+exp=falcon_like"),
        ("run.steps=5", "++run.steps=5"),
        ("typo=3", "++typo=3"),
        ("data.paths=[a=b,c]", "++data.paths=[a=b,c]"),
        ("run.name=", "++run.name="),
        ("optim.lr=1e-3,3e-3", "++optim.lr=1e-3,3e-3"),
        ("model=llama", "model=llama"),
        ("model/size=nano", "model/size=nano"),
        ("recovery=palm", "recovery=palm"),
        ("+engine.deepspeed.aio={}", "+engine.deepspeed.aio={}"),
        ("++run.steps=5", "++run.steps=5"),
        ("~chaos", "~chaos"),
        ("~chaos=none", "~chaos=none"),
        ("optim@other=adamw", "optim@other=adamw"),
        ("hydra.verbose=true", "hydra.verbose=true"),
        ("hydra/launcher=basic", "hydra/launcher=basic"),
        ("-m", "-m"),
        ("--multirun", "--multirun"),
        ("--cfg", "--cfg"),
        ("job", "job"),
        ("--config-dir=conf", "--config-dir=conf"),
    ],
)
def test_argument_is_rewritten_only_where_hydra_would_refuse_it(
    argument: str, expected: str
) -> None:
    assert rewrite_arguments([argument]) == [expected]


def test_arguments_keep_their_order() -> None:
    assert rewrite_arguments(["-m", "exp=a", "run.seed=1,2"]) == ["-m", "+exp=a", "++run.seed=1,2"]


def test_rewriting_twice_is_rewriting_once() -> None:
    once = rewrite_arguments(["exp=a", "run.seed=1", "model=llama"])
    assert rewrite_arguments(once) == once


@pytest.fixture
def hydra_config() -> Iterator[Callable[..., None]]:
    """Return a function that makes Hydra's own config as it is within a job."""

    def make(*overrides: str) -> None:
        with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
            node = compose("train", overrides=list(overrides), return_hydra_config=True)
        HydraConfig.instance().set_config(node)

    yield make
    HydraConfig.instance().cfg = None


def test_run_is_named_after_its_experiment(hydra_config: Callable[..., None]) -> None:
    hydra_config("+exp=falcon_like", "++optim.lr=0.1")
    assert run_name(["+exp=falcon_like", "++optim.lr=0.1"]) == "falcon_like"


def test_run_without_an_experiment_has_a_name_too(hydra_config: Callable[..., None]) -> None:
    hydra_config()
    assert run_name([]) == "trimtab"


def test_job_of_a_sweep_is_named_after_what_it_varies(hydra_config: Callable[..., None]) -> None:
    hydra_config("+exp=falcon_like", "++optim.lr=0.1", "++run.seed=7", "++run.steps=50")
    arguments = ["-m", "+exp=falcon_like", "++optim.lr=0.1,0.2", "++run.seed=7,8", "++run.steps=50"]
    assert run_name(arguments) == "falcon_like,optim.lr=0.1,run.seed=7"


@pytest.mark.parametrize(
    ("swept", "chosen"),
    [
        ("model/size=nano,falcon_7b", "model/size=nano"),
        ("++recovery.skip=1B tokens,2B tokens", "++recovery.skip=1B tokens"),
        ("++optim.betas=[0.9,0.95],[0.9,0.99]", "++optim.betas=[0.9,0.95]"),
    ],
)
def test_name_of_any_sweep_can_name_a_folder(
    swept: str, chosen: str, hydra_config: Callable[..., None]
) -> None:
    hydra_config(chosen)
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._,=+@-]*", run_name(["-m", swept]))
