"""One launch an engine and number of ranks, shared by all tests of the session."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from engine_names import kind_and_stage
from harness import Launch

Results = list[dict[str, Any]]
Ask = Callable[..., Results]


@pytest.fixture(scope="session")
def engines_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="session")
def ask(engines_folder: Path) -> Ask:
    """Return a function that runs a task once on some ranks and returns each rank's results.

    A task is a function of `engine_tasks`, or of another module: "signal_tasks:signals".
    """

    @cache
    def launch(task: str, name: str, num_ranks: int, arguments: tuple[Any, ...]) -> str:
        module, _, function = task.rpartition(":")
        log = engines_folder / f"{name}.output"
        target = getattr(import_module(module or "engine_tasks"), function)
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
        return ask("conformance", f"{engine}-{num_ranks}", num_ranks, *kind_and_stage(engine))

    return ask_it
