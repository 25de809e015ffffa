"""One launch an engine and number of ranks, shared by all tests of the session."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from harness import Launch

Results = list[dict[str, Any]]
Ask = Callable[..., Results]


@pytest.fixture(scope="session")
def engines_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="session")
def ask(engines_folder: Path) -> Ask:
    """Return a function that runs a task once on some ranks and returns each rank's results."""

    @cache
    def launch(task: str, name: str, num_ranks: int, arguments: tuple[Any, ...]) -> str:
        import engine_tasks

        log = engines_folder / f"{name}.output"
        target = getattr(engine_tasks, task)
        run = Launch(target, str(engines_folder), name, *arguments, log=log, num_ranks=num_ranks)
        return f"{run.wait()}\n{run.output()}"

    def ask_it(task: str, name: str, num_ranks: int, *arguments: Any) -> Results:
        output = launch(task, name, num_ranks, arguments)
        paths = [engines_folder / f"{name}.{rank}.json" for rank in range(num_ranks)]
        assert all(path.exists() for path in paths), output
        return [json.loads(path.read_text()) for path in paths]

    return ask_it


@pytest.fixture(scope="session")
def conformance(ask: Ask) -> Callable[[str, int], Results]:
    """Return a function from an engine (`deepspeed-zero1` and so on too) to its results."""

    def ask_it(engine: str, num_ranks: int) -> Results:
        kind, _, stage = engine.partition("-zero")
        need(kind)
        stages = (int(stage),) if stage else ()
        return ask("conformance", f"{engine}-{num_ranks}", num_ranks, kind, *stages)

    return ask_it


def need(kind: str) -> None:
    """Skip, visibly, what needs DeepSpeed where it is not installed."""
    if kind == "deepspeed" and find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed; pip install 'trimtab[deepspeed]'")
