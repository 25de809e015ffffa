"""How the command line reaches Hydra."""

from __future__ import annotations

import pytest

from train.main import rewrite_arguments


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
