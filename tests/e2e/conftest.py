"""Runs that several tests look at, each made once a session."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness import BAD_DATA, LADDER, MEMORY_FIRST, NEW_LEVEL, SHOCK, TINY, Fault, run


@dataclass(frozen=True)
class Reference:
    """A run that nobody disturbed: its folder, and the log of the samples that it consumed."""

    folder: Path
    samples: Path
    output: str


Oracle = Callable[..., Reference]


def _reference(
    folder: Path, arguments: tuple[str, ...], num_ranks: int = 1, **fault: object
) -> Reference:
    samples = folder.parent / f"{folder.name}.samples"
    faults = Fault(samples=samples, **fault)  # type: ignore[arg-type]
    result = run(arguments, folder, num_ranks=num_ranks, fault=faults).expect(0)
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


@pytest.fixture(scope="session")
def recovered_from_memory(runs: Path) -> Reference:
    """It went back to a state that was in memory alone."""
    return _reference(runs / "recovered-from-memory", (*MEMORY_FIRST, *BAD_DATA))


@pytest.fixture(scope="session")
def climbed_single(runs: Path) -> Reference:
    """It took all attempts of the ladder to get past the shock."""
    return _reference(runs / "climbed-single", (*LADDER, *SHOCK))


@pytest.fixture(scope="session")
def climbed_ddp(runs: Path) -> Reference:
    return _reference(runs / "climbed-ddp", (*LADDER, *SHOCK), num_ranks=2)


@pytest.fixture(scope="session")
def levelled_single(runs: Path) -> Reference:
    """Wherever it went, the data had changed at once, so it let the new level in."""
    return _reference(runs / "levelled-single", (*LADDER, *NEW_LEVEL))


@pytest.fixture(scope="session")
def oracle(runs: Path) -> Oracle:
    """Return a function that makes a run which never met `skips`: they are in its ledger from the
    first step on, so there was nothing to recover from. `cooled`: a cooling it has from the start.
    """
    made: dict[object, Reference] = {}

    def make(
        arguments: tuple[str, ...],
        skips: tuple[tuple[int, int], ...],
        *,
        num_ranks: int = 1,
        cooled: tuple[float, int, int, int] | None = None,
    ) -> Reference:
        key = (arguments, skips, num_ranks, cooled)
        if key not in made:
            folder = runs / f"oracle-{len(made)}"
            faults = {"never_sees": skips, "cooled": cooled}
            made[key] = _reference(folder, arguments, num_ranks, **faults)
        return made[key]

    return make


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[Path, str], None]]:
    """Return a function that mounts a small tmpfs."""
    mounted: list[Path] = []

    def mount(folder: Path, size: str) -> None:
        folder.mkdir(parents=True)
        arguments = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        try:
            done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip("there is no `mount` here")
        if done.returncode:
            pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
        mounted.append(folder)

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)
