"""Where a value comes from: every file and override that sets a key, in the order of merging.

Owns the walk over Hydra's defaults list and the did-you-mean for keys.
Refuses keys that nothing sets.
Called by `launch.cli`.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.compose import CONFIG_NAME, normalise, searching
from launch.errors import LaunchError
from launch.paths import conf_folder
from launch.yaml_leaves import read_leaves

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

COMMAND_LINE = "command line"
DELETED = "(deleted)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One place that sets one key."""

    key: str
    value: str
    source: str
    """A file, from the config folder on, or `command line`."""
    line: int | None
    """Counted from 1; None on the command line."""
    comment: str
    is_winner: bool

    @property
    def place(self) -> str:
        """Return the source with its line, as editors take it."""
        return self.source if self.line is None else f"{self.source}:{self.line}"


def explain(key: str, overrides: Sequence[str], *, conf_dir: Path | None = None) -> list[Setting]:
    """Return each place that sets `key`, or one of its leaves where it is a group.

    Ordered by key as first met, then as merged: the last of each key is the winner.

    Raises:
        LaunchError: nothing sets the key, or the overrides do not compose.
    """
    folder = conf_folder() if conf_dir is None else conf_dir
    settings = _all_settings(normalise(overrides), folder)
    by_key: dict[str, list[Setting]] = {}
    for setting in settings:
        by_key.setdefault(setting.key, []).append(setting)
    wanted = [name for name in by_key if name == key or name.startswith(f"{key}.")]
    if not wanted:
        raise LaunchError(_unknown(key, list(by_key)))
    return [
        replace(setting, is_winner=setting is by_key[name][-1])
        for name in wanted
        for setting in by_key[name]
    ]


def _all_settings(overrides: list[str], folder: Path) -> list[Setting]:
    import hydra
    from hydra.types import RunMode

    with searching(folder) as loader:
        hydra.compose(CONFIG_NAME, overrides=overrides)  # refuses what training would refuse
        found = loader.compute_defaults_list(CONFIG_NAME, overrides, RunMode.RUN)
    settings: list[Setting] = []
    for default in found.defaults:
        settings += _from_file(folder, default.config_path, default.package)
    for override in found.config_overrides:
        settings += _from_override(override)
    return settings


def _from_file(folder: Path, config_path: str | None, package: str | None) -> Iterator[Setting]:
    path = folder / f"{config_path}.yaml"
    if config_path is None or not path.is_file():  # Hydra's own defaults live in its package
        return
    prefix = f"{package}." if package else ""
    for leaf in read_leaves(path):
        yield Setting(
            key=f"{prefix}{leaf.key}",
            value=leaf.value,
            source=f"{folder.name}/{config_path}.yaml",
            line=leaf.line,
            comment=leaf.comment,
            is_winner=False,
        )


def _from_override(override: "Override") -> Iterator[Setting]:
    name = override.key_or_group
    _, _, written = (override.input_line or "").partition("=")
    values = [(name, DELETED)] if override.is_delete() else _flat(name, override.value(), written)
    for key, value in values:
        yield Setting(
            key=key, value=value, source=COMMAND_LINE, line=None, comment="", is_winner=False
        )


def _flat(name: str, value: Any, written: str) -> list[tuple[str, str]]:
    # Any: what Hydra's override grammar can hold.
    if not isinstance(value, Mapping) or not value:
        return [(name, written)]
    return [
        leaf for key, inner in value.items() for leaf in _flat(f"{name}.{key}", inner, str(inner))
    ]


def _unknown(key: str, known: list[str]) -> str:
    groups = {name.rpartition(".")[0] for name in known} - {""}
    names = [*known, *groups]
    close = difflib.get_close_matches(key, names, n=3, cutoff=0.6)
    # A right last part in the wrong group is the commonest slip: lr for optim.lr.
    last_parts = [name.rpartition(".")[2] for name in known]
    near = difflib.get_close_matches(key.rpartition(".")[2], last_parts, n=2)
    close += [name for name in known if name.rpartition(".")[2] in near and name not in close]
    hint = f"did you mean {' or '.join(close[:4])}?" if close else "try a group, such as cluster"
    return f"nothing sets {key!r}; {hint}"
