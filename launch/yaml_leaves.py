"""The leaves of one YAML file, each with its line and its comment.

Owns the reading of comments, which the YAML parser drops and which carry our sources.
Refuses files that are not YAML.
Called by `launch.explain`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.errors import LaunchError


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """One value as it is written."""

    key: str
    value: str
    line: int
    """Counted from 1."""
    comment: str
    """Beside the value, else directly above the key; empty where there is none."""


def read_leaves(path: Path) -> list[Leaf]:
    """Return the values of a config file in its order, without its defaults list.

    Raises:
        LaunchError: the file is not YAML; the message has the line.
    """
    import yaml

    text = path.read_text(encoding="utf-8")
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise LaunchError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if root is None or not isinstance(root, yaml.MappingNode):
        return []
    pairs = [(key, value) for key, value in root.value if key.value != "defaults"]
    return list(_leaves(pairs, "", text, text.splitlines()))


# PyYAML has no types, so its nodes are Any; they end here.
def _leaves(pairs: list[Any], prefix: str, text: str, lines: list[str]) -> Iterator[Leaf]:
    for key, value in pairs:
        name = f"{prefix}{key.value}"
        if value.id == "mapping" and value.value:
            yield from _leaves(value.value, f"{name}.", text, lines)
            continue
        is_one_line = value.start_mark.line == value.end_mark.line == key.start_mark.line
        after = value.end_mark.column if is_one_line else key.end_mark.column + 1
        yield Leaf(
            key=name,
            value=_written(value, text),
            line=key.start_mark.line + 1,
            comment=_comment(lines, key.start_mark.line, key.start_mark.column, after),
        )


def _written(node: Any, text: str) -> str:
    """Return a value as its author spelt it, on one line and without comments."""
    if node.id == "sequence":
        return f"[{', '.join(_written(item, text) for item in node.value)}]"
    if node.id == "mapping":
        pairs = (f"{key.value}: {_written(value, text)}" for key, value in node.value)
        return f"{{{', '.join(pairs)}}}"
    return " ".join(text[node.start_mark.index : node.end_mark.index].split())


def _comment(lines: list[str], number: int, indent: int, after: int) -> str:
    rest = lines[number][after:]
    if rest.lstrip().startswith("#"):
        column = after + rest.index("#")
        return _joined([lines[number][column:], *_block(lines[number + 1 :], column)])
    above = _block(lines[number - 1 :: -1] if number else [], indent)
    return _joined(above[::-1])


def _block(lines: list[str], column: int) -> list[str]:
    """Return the run of comment lines at the start of `lines` whose `#` is in `column`."""
    found: list[str] = []
    for line in lines:
        stripped = line.strip()
        is_comment = stripped.startswith("#") and line.index("#") == column
        if not is_comment or stripped.startswith("# @package"):
            break
        found.append(stripped)
    return found


def _joined(comments: list[str]) -> str:
    return " ".join(text for comment in comments if (text := comment.lstrip("# ").rstrip()))
