"""Fixtures of all tests: composed configs, a disk that does not wait."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from train.config import parse_config
from train.main import rewrite_arguments
from train.settings import RunConfig

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"


@pytest.fixture
def fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait for the disk: no test of one process can see the difference."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def compose_node(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Return a function from command-line arguments to the resolved node, as `train/main.py`."""

    def compose_it(arguments: list[str] | None = None) -> dict[str, Any]:
        OmegaConf.register_new_resolver("run_name", lambda: "a-run", replace=True)
        OmegaConf.register_new_resolver("scratch_dir", lambda: str(tmp_path), replace=True)
        overrides = rewrite_arguments(list(arguments or []))
        with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
            node = compose("train", overrides=overrides)
        plain: Any = OmegaConf.to_container(node, resolve=True)
        return plain

    return compose_it


@pytest.fixture
def compose_config(
    compose_node: Callable[..., dict[str, Any]],
) -> Callable[..., tuple[RunConfig, dict[str, Any]]]:
    """Return a function from command-line arguments to the typed config and its node."""

    def compose_it(
        arguments: list[str] | None = None, *, world_size: int = 1
    ) -> tuple[RunConfig, dict[str, Any]]:
        node = compose_node(arguments)
        return parse_config(node, world_size=world_size), node

    return compose_it
