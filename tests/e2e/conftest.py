"""Runs that several tests look at, each made once a session."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from harness import BAD_DATA, TINY, Fault, run


@dataclass(frozen=True)
class Reference:
    """A run that nobody disturbed: its folder, and the log of the samples that it consumed."""

    folder: Path
    samples: Path
    output: str


def _reference(folder: Path, arguments: tuple[str, ...], num_ranks: int = 1) -> Reference:
    samples = folder.parent / f"{folder.name}.samples"
    result = run(arguments, folder, num_ranks=num_ranks, fault=Fault(samples=samples)).expect(0)
    return Reference(folder=folder, samples=samples, output=result.output)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def clean_single(runs: Path) -> Reference:
    return _reference(runs / "clean-single", TINY)


@pytest.fixture(scope="session")
def clean_ddp(runs: Path) -> Reference:
    return _reference(runs / "clean-ddp", TINY, num_ranks=2)


@pytest.fixture(scope="session")
def recovered_single(runs: Path) -> Reference:
    return _reference(runs / "recovered-single", (*TINY, *BAD_DATA))


@pytest.fixture(scope="session")
def recovered_ddp(runs: Path) -> Reference:
    return _reference(runs / "recovered-ddp", (*TINY, *BAD_DATA), num_ranks=2)
