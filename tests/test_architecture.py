"""The rules of docs/architecture.md that a parser can check, and proof that each check can fail."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("train", "launch", "monitoring")

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

PRINTING_MODULES = {"train.main", "launch.cli", "launch.show"}
MODULES_WITH_SIDE_EFFECTS = {"train.main"}
WRAPPERS = {
    "deepspeed": {"train.engines.deepspeed"},
    "swanlab": {"monitoring.swanlab_tracker"},
    "wandb": {"monitoring.wandb_tracker"},
    "transformers": set(),
    "datasets": set(),
}
LOOP_MAY_IMPORT = {
    "train.state",
    "train.signals",
    "train.actions",
    "train.events",
    "train.schedule",
    "train.reports",
    "train.errors",
    "train.recovery.rewind",
    "train.recovery.control",
    "train.recovery.history",
    "train.engines.base",
    "train.health",
    "train.checkpoint",
    "train.data.stream",
    "train.data.validation",
}


@dataclass(frozen=True)
class Module:
    name: str
    source: str
    is_package: bool = False

    @property
    def tree(self) -> ast.Module:
        return _parse(self.source)

    @property
    def package(self) -> str:
        return self.name if self.is_package else self.name.rpartition(".")[0]


@cache
def _parse(source: str) -> ast.Module:
    return ast.parse(source)


@cache
def source_modules() -> tuple[Module, ...]:
    modules = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            is_package = parts[-1] == "__init__"
            name = ".".join(parts[:-1] if is_package else parts)
            modules.append(Module(name, path.read_text(encoding="utf-8"), is_package))
    return tuple(modules)


def source_module(name: str) -> Module:
    return next(module for module in source_modules() if module.name == name)


def _is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _is_name_guard(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)


def _walk(node: ast.AST, *, enters_functions: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt) and _is_type_checking(child):
            continue
        is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if is_function and not enters_functions:
            continue
        yield child
        yield from _walk(child, enters_functions=enters_functions)


def imported(module: Module, *, inside_functions: bool = True) -> set[str]:
    """Return full names of all imports that run; `from a import b` gives a and a.b."""
    names: set[str] = set()
    for node in _walk(module.tree, enters_functions=inside_functions):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.package.split(".")
                kept = parents[: len(parents) - node.level + 1]
                base = ".".join([*kept, *([base] if base else [])])
            names.add(base)
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def top_levels(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def outside_standard_library(module: Module, *, but: set[str] = frozenset()) -> set[str]:
    return {
        name
        for name in imported(module)
        if name.partition(".")[0] not in sys.stdlib_module_names
        and not any(name == allowed or name.startswith(f"{allowed}.") for allowed in but)
    }


def with_all_it_imports(name: str, modules: Mapping[str, Module]) -> set[str]:
    """Return a module of ours together with all of ours that it imports, directly or not."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += imported(modules[name]) & modules.keys()
    return found


def import_cycles(modules: Mapping[str, Module]) -> list[list[str]]:
    """Return the cycles that depth-first search meets among module-level imports."""
    edges = {
        name: sorted((imported(module, inside_functions=False) & modules.keys()) - {name})
        for name, module in modules.items()
    }
    cycles: list[list[str]] = []
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            cycles.append([*path[path.index(name) :], name])
            return
        if name in done:
            return
        for target in edges[name]:
            visit(target, [*path, name])
        done.add(name)

    for name in edges:
        visit(name, [])
    return cycles


def import_side_effects(module: Module) -> list[int]:
    """Return the lines of module-level statements that do more than define."""
    harmless = (
        ast.Import,
        ast.ImportFrom,
        ast.FunctionDef,
        ast.AsyncFunctionDef,
        ast.ClassDef,
        ast.Assign,
        ast.AnnAssign,
    )
    lines = []
    for node in module.tree.body:
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if not (
            isinstance(node, harmless) or is_text or _is_type_checking(node) or _is_name_guard(node)
        ):
            lines.append(node.lineno)
    return lines


def global_statements(module: Module) -> list[int]:
    return [node.lineno for node in ast.walk(module.tree) if isinstance(node, ast.Global)]


def print_calls(module: Module) -> list[int]:
    return [
        node.lineno
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]


def long_functions(module: Module) -> list[str]:
    return [
        f"{module.name}.{node.name}: {length} lines"
        for node in ast.walk(module.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or node.lineno) - node.lineno + 1) > MAX_FUNCTION_LINES
    ]


def num_lines(module: Module) -> int:
    return len(module.source.splitlines())


def misplaced_wrapped_imports(module: Module) -> set[str]:
    return {
        sdk
        for sdk, homes in WRAPPERS.items()
        if sdk in top_levels(imported(module)) and module.name not in homes
    }


def forbidden_loop_imports(module: Module) -> set[str]:
    ours = {name for name in imported(module) if name.startswith("train")}
    return {
        name
        for name in ours
        if not any(name == allowed or name.startswith(f"{allowed}.") for allowed in LOOP_MAY_IMPORT)
    }


# The rules.


@pytest.mark.parametrize("name", ["train.recovery.detector", "train.recovery.policy"])
def test_detector_and_policy_need_the_standard_library_alone(name: str) -> None:
    modules = {module.name: module for module in source_modules()}
    parts = with_all_it_imports(name, modules)
    assert {part.rpartition(".")[0] for part in parts} == {"train.recovery"}
    assert {part: outside_standard_library(modules[part], but=parts) for part in parts} == {
        part: set() for part in parts
    }


@pytest.mark.parametrize("package", ["launch", "monitoring"])
def test_launch_and_monitoring_never_import_training_code(package: str) -> None:
    offenders = {
        module.name
        for module in source_modules()
        if module.name.partition(".")[0] == package and "train" in top_levels(imported(module))
    }
    assert offenders == set()


def test_launch_never_imports_torch() -> None:
    offenders = {
        module.name
        for module in source_modules()
        if module.name.partition(".")[0] == "launch" and "torch" in top_levels(imported(module))
    }
    assert offenders == set()


def test_outside_packages_are_imported_only_where_they_are_wrapped() -> None:
    offenders = {module.name: misplaced_wrapped_imports(module) for module in source_modules()}
    assert {name: sdks for name, sdks in offenders.items() if sdks} == {}


def test_every_wrapper_still_wraps_its_package() -> None:
    for sdk, homes in WRAPPERS.items():
        for home in homes:
            assert sdk in top_levels(imported(source_module(home)))


def test_loop_imports_only_its_parts() -> None:
    assert forbidden_loop_imports(source_module("train.loop")) == set()


def test_callbacks_know_no_engine_and_no_collective() -> None:
    for module in source_modules():
        if module.name.startswith("train.callbacks."):
            names = imported(module)
            assert "torch" not in top_levels(names), module.name
            assert not any(
                name.startswith(("train.engines", "train.distributed")) for name in names
            )


def test_no_import_cycle() -> None:
    assert import_cycles({module.name: module for module in source_modules()}) == []


def test_no_global_statement() -> None:
    found = {module.name: global_statements(module) for module in source_modules()}
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_importing_a_module_only_defines_things() -> None:
    found = {
        module.name: import_side_effects(module)
        for module in source_modules()
        if module.name not in MODULES_WITH_SIDE_EFFECTS
    }
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_no_module_of_train_hides_one_of_the_standard_library() -> None:
    names = {path.stem for path in (ROOT / "train").iterdir() if not path.name.startswith("__")}
    assert names & sys.stdlib_module_names == set()


def test_no_file_is_too_long() -> None:
    found = {module.name: num_lines(module) for module in source_modules()}
    assert {name: lines for name, lines in found.items() if lines > MAX_FILE_LINES} == {}


def test_no_function_is_too_long() -> None:
    assert [line for module in source_modules() for line in long_functions(module)] == []


def test_nothing_prints_outside_the_command_line() -> None:
    found = {
        module.name: print_calls(module)
        for module in source_modules()
        if module.name not in PRINTING_MODULES
    }
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_every_file_is_named_for_what_it_owns() -> None:
    vague = {"utils", "util", "helpers", "helper", "misc", "common"}
    assert {m.name for m in source_modules() if m.name.rpartition(".")[2] in vague} == set()


def test_every_module_says_what_it_is() -> None:
    assert [m.name for m in source_modules() if not ast.get_docstring(m.tree)] == []


# Each check can fail.


def test_check_sees_imports_of_every_form() -> None:
    module = Module(
        "train.data.x",
        "import os.path\n"
        "from train.engines import ddp\n"
        "from . import store\n"
        "from ..state import TrainState\n"
        "def f():\n    import torch.nn\n",
    )
    names = imported(module)
    assert {"os.path", "train.engines.ddp", "train.data.store", "train.state", "torch.nn"} <= names
    assert "torch.nn" not in imported(module, inside_functions=False)


def test_check_sees_a_package_s_relative_import() -> None:
    assert "train.data.store" in imported(Module("train.data", "from . import store", True))


def test_check_leaves_out_imports_for_types_alone() -> None:
    source = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\n"
    assert "torch" not in imported(Module("launch.x", source))


def test_check_sees_a_foreign_import() -> None:
    module = Module("train.recovery.detector", "import math\nimport numpy as np\n")
    assert outside_standard_library(module) == {"numpy"}
    assert outside_standard_library(module, but={"numpy"}) == set()


def test_check_sees_what_is_imported_by_what_is_imported() -> None:
    sources = {
        "a": "def f():\n    from b import x\n",
        "b": "import c\n",
        "c": "import b\n",
        "d": "",
    }
    modules = {name: Module(name, source) for name, source in sources.items()}
    assert with_all_it_imports("a", modules) == {"a", "b", "c"}
    assert with_all_it_imports("d", modules) == {"d"}


def test_check_sees_a_misplaced_wrapper() -> None:
    source = "def f():\n    from wandb.sdk import run\n"
    assert misplaced_wrapped_imports(Module("monitoring.console", source)) == {"wandb"}
    assert misplaced_wrapped_imports(Module("monitoring.wandb_tracker", source)) == set()


def test_check_sees_a_loop_that_knows_too_much() -> None:
    module = Module("train.loop", "from train.build import execute\nfrom train.state import A\n")
    assert forbidden_loop_imports(module) == {"train.build", "train.build.execute"}


def test_check_sees_a_cycle() -> None:
    sources = {"a": "import b\n", "b": "from c import x\n", "c": "import a\n", "d": "import a\n"}
    modules = {name: Module(name, source) for name, source in sources.items()}
    assert import_cycles(modules) == [["a", "b", "c", "a"]]
    late = {**modules, "c": Module("c", "def f():\n    import a\n")}
    assert import_cycles(late) == []


def test_check_sees_side_effects() -> None:
    source = '"""Doc."""\nimport os\nX = 1\nY: int = 2\nos.environ.clear()\nfor i in X: pass\n'
    assert import_side_effects(Module("train.x", source)) == [5, 6]
    guarded = 'if __name__ == "__main__":\n    run()\n'
    assert import_side_effects(Module("train.x", guarded)) == []


def test_check_sees_global_statements_and_prints() -> None:
    module = Module("train.x", "def f():\n    global a\n    a = 1\n    print(a)\n    x.print(a)\n")
    assert global_statements(module) == [2]
    assert print_calls(module) == [4]


def test_check_sees_long_functions_and_files() -> None:
    body = "    x = 1\n" * MAX_FUNCTION_LINES
    module = Module("train.x", f"class A:\n  def f(self):\n{body.replace('    ', '      ')}")
    assert long_functions(module) == [f"train.x.f: {MAX_FUNCTION_LINES + 1} lines"]
    assert num_lines(Module("train.x", "x = 1\n" * 7)) == 7
