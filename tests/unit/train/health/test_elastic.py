"""Which launches are warned."""

from __future__ import annotations

import pytest

from train.health.elastic import warning


@pytest.mark.parametrize(
    ("command", "environment", "is_warned"),
    [
        (["torchrun", "--nnodes=1:2", "train/main.py"], {}, True),
        (["torchrun", "--nnodes", "1:4", "train/main.py"], {}, True),
        (["torchrun", "train/main.py"], {"PET_NNODES": "2:3"}, True),
        (["torchrun", "--nnodes=2", "train/main.py"], {}, False),
        (["torchrun", "--nnodes=2:2", "train/main.py"], {}, False),
        (["torchrun", "--standalone", "train/main.py"], {}, False),
        (["torchrun", "--nnodes=1:2"], {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}, False),
        (["python", "train/main.py", "--nnodes=1:2"], {"TORCHELASTIC_RUN_ID": ""}, False),
    ],
)
def test_an_elastic_launch_that_shares_its_store_is_warned(
    command: list[str], environment: dict[str, str], is_warned: bool
) -> None:
    given = {"TORCHELASTIC_RUN_ID": "x", **environment}
    if not given["TORCHELASTIC_RUN_ID"]:
        del given["TORCHELASTIC_RUN_ID"]
    said = warning(command, given)
    assert (said is not None) is is_warned
    assert said is None or "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in said
