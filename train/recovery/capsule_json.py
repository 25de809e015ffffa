"""A capsule as text: bounded in size, readable line by line, no value that JSON does not have.

Owns what is left out, in which order, when a capsule is too large, and says so inside it. Numbers
that are not finite become null. Pure; called by `capsule`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

from monitoring.records import finite

MAX_BYTES = 512 * 1024

Capsule = dict[str, Any]


def as_text(capsule: Capsule, max_bytes: int = MAX_BYTES) -> str:
    """Return the capsule as JSON of at most `max_bytes`; `capsule` itself stays as it is.

    `left_out` in the text names what had to go. Each report and each suspect is one line.
    """
    text = _lines({**capsule, "left_out": []})
    if len(text.encode()) <= max_bytes:
        return text
    small = copy.deepcopy(capsule)
    small["left_out"] = []
    for words, leave_out in _REDUCTIONS:
        leave_out(small)
        small["left_out"].append(words)
        text = _lines(small)
        if len(text.encode()) <= max_bytes:
            break
    return text


def _lines(capsule: Capsule) -> str:
    """Return JSON with one line a key, and one line an item of lists of objects."""
    entries = []
    for key, value in capsule.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            items = ",\n".join(f"    {_compact(item)}" for item in value)
            entries.append(f"  {json.dumps(key)}: [\n{items}\n  ]")
        else:
            entries.append(f"  {json.dumps(key)}: {_compact(value)}")
    return "{\n" + ",\n".join(entries) + "\n}\n"


def _compact(value: object) -> str:
    # Lone surrogates, which no file takes, stay escaped, as does all that is not ASCII.
    return json.dumps(finite(value), allow_nan=False)


def _few_origins(capsule: Capsule) -> None:
    for suspect in capsule["suspects"]:
        suspect["origins"] = suspect["origins"][:4]
        for origin in suspect["origins"]:
            origin["file"] = _end_of(origin["file"], 200)


def _last_norms_only(capsule: Capsule) -> None:
    for report in capsule["reports"][:-16]:
        report["group_norms"] = []


def _last_reports_only(capsule: Capsule) -> None:
    capsule["reports"] = capsule["reports"][-16:]


def _short_texts(capsule: Capsule) -> None:
    for suspect in capsule["suspects"]:
        if suspect.get("text"):
            suspect["text"] = suspect["text"][:100]


def _no_rank_lists(capsule: Capsule) -> None:
    capsule["ranks"]["losses"] = []
    for key in ("hosts", "devices"):
        capsule["environment"][key] = {}


def _no_norms(capsule: Capsule) -> None:
    capsule["group_names"] = []
    for report in capsule["reports"]:
        report["group_norms"] = []


def _everything_short(capsule: Capsule) -> None:
    for key in list(capsule):
        capsule[key] = _shortened(capsule[key])


def _shortened(value: object) -> object:
    if isinstance(value, str):
        return _end_of(value, 300)
    if isinstance(value, dict):
        return {_end_of(str(key), 100): _shortened(item) for key, item in [*value.items()][:64]}
    if isinstance(value, list | tuple):
        return [_shortened(item) for item in value[:64]]
    return value


def _end_of(text: str, length: int) -> str:
    return text if len(text) <= length else "\N{HORIZONTAL ELLIPSIS}" + text[1 - length :]


_REDUCTIONS: tuple[tuple[str, Callable[[Capsule], None]], ...] = (
    ("all but four origins of each sample", _few_origins),
    ("group norms of all but the last 16 reports", _last_norms_only),
    ("all but 100 characters of each text", _short_texts),
    ("losses, hosts and devices by rank", _no_rank_lists),
    ("all but the last 16 reports", _last_reports_only),
    ("all group norms", _no_norms),
    ("the beginnings of long texts and the ends of long lists", _everything_short),
)
