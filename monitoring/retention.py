"""Which checkpoints of a run stay and which go: one pure function, and the words for both.

Owns the rules. Refuses to remove anything: `train/checkpoint/store.py` does so after each save, and
`launch/prune.py` when an operator asks. Both call `plan`, so a dry run tells what a run would do.
Standard library alone; nothing here is collective, and all ranks come to the same plan.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Protocol

from monitoring.records import Record

RULES_FILE = "retention.json"
"""In the folder of the checkpoints: the rules by which the run that holds it keeps them."""

GOOD, CANDIDATE = "good", "candidate"

NEWEST_GOOD = "newest good"
NEWEST = "newest"
LIVE_CANDIDATE = "may become good"
INCIDENT = "incident"
EVERY = "every M steps"
LAST_GOOD = "last N good"
REWIND = "rewind target"
SEEN_LATE = "seen late"
# A budget takes what is kept for these reasons alone.
_EXPENDABLE = frozenset({LAST_GOOD, REWIND, SEEN_LATE})

_SIZE = re.compile(r"^\s*([\d_]*\.?\d+)\s*([kmgtp]?)(i?)b\s*$", re.IGNORECASE)


class Entry(Protocol):
    """What retention needs to know of a checkpoint."""

    @property
    def name(self) -> str:
        """Its folder."""

    @property
    def step(self) -> int:
        """Updates in it."""

    @property
    def clock(self) -> int:
        """Updates executed before it: the order in which checkpoints were made."""

    @property
    def health(self) -> str:
        """`good`, `candidate` or `quarantined`."""

    @property
    def num_bytes(self) -> int:
        """What it takes on disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What to keep beside the newest good one, the newest one, and candidates after the former.

    `keep_good`: so many of the newest good ones. `keep_steps`: good ones back to one that is so
    many steps older than the newest checkpoint. `reach_steps`: up to that age, one good one for
    each doubling of the age: trouble that came slowly is seen late. `keep_every_steps`: for good,
    the first good one of each stretch of so many steps. `budget_bytes`: what all of them may take
    once a save is done; the oldest of the others go first. `keep_incidents`: whose needs count,
    for `needed_by_incidents`.
    """

    keep_good: int
    keep_steps: int = 0
    reach_steps: int = 0
    keep_every_steps: int | None = None
    budget_bytes: int | None = None
    keep_incidents: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What stays and what goes, each with its reasons, oldest first.

    `over_budget_bytes`: by how much what stays is above the budget, 0 if it is not.
    """

    kept: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    removed: Mapping[str, str] = field(default_factory=dict)
    over_budget_bytes: int = 0


def plan(entries: Iterable[Entry], rules: Rules, *, needed: Collection[str] = frozenset()) -> Plan:
    """Return what stays and what goes. Pure.

    The newest good checkpoint always stays, and nothing goes before a newer one is good, but
    what is quarantined. `needed`: names that incidents need; they stay, whatever their health.
    """
    ordered = sorted(entries, key=lambda entry: entry.clock)
    if not ordered:
        return Plan()
    reasons: dict[str, list[str]] = {entry.name: [] for entry in ordered}
    good = [entry for entry in ordered if entry.health == GOOD]
    _protect(ordered, good, rules, needed, reasons)
    _keep_good(ordered, good, rules, reasons)
    kept = {name: tuple(why) for name, why in reasons.items() if why}
    removed = {entry.name: _why_not(entry) for entry in ordered if not reasons[entry.name]}
    total = sum(entry.num_bytes for entry in ordered if entry.name in kept)
    budget = rules.budget_bytes
    for entry in ordered:
        if budget is None or total <= budget:
            break
        if entry.name in kept and _EXPENDABLE.issuperset(kept[entry.name]):
            removed[entry.name] = f"disk budget ({', '.join(kept.pop(entry.name))})"
            total -= entry.num_bytes
    order = [entry.name for entry in ordered]
    return Plan(
        kept=kept,
        removed={name: removed[name] for name in order if name in removed},
        over_budget_bytes=0 if budget is None else max(0, total - budget),
    )


def _protect(
    ordered: Sequence[Entry],
    good: Sequence[Entry],
    rules: Rules,
    needed: Collection[str],
    reasons: dict[str, list[str]],
) -> None:
    """Add the reasons that no budget overrides."""
    newest_good_clock = good[-1].clock if good else -1
    if good:
        reasons[good[-1].name].append(NEWEST_GOOD)
    for entry in ordered:
        if entry.clock == ordered[-1].clock:
            reasons[entry.name].append(NEWEST)
        elif entry.health == CANDIDATE and entry.clock >= newest_good_clock:
            reasons[entry.name].append(LIVE_CANDIDATE)
        if entry.name in needed:
            reasons[entry.name].append(INCIDENT)
    stretches: set[int] = set()
    for entry in good if rules.keep_every_steps else ():
        stretch = entry.step // (rules.keep_every_steps or 1)
        if stretch not in stretches:
            stretches.add(stretch)
            reasons[entry.name].append(EVERY)


def _keep_good(
    ordered: Sequence[Entry],
    good: Sequence[Entry],
    rules: Rules,
    reasons: dict[str, list[str]],
) -> None:
    """Add the reasons for which good ones stay while there is room."""
    newest = ordered[-1].step
    last = good[-rules.keep_good :]
    for entry in last:
        reasons[entry.name].append(LAST_GOOD)
    if rules.keep_steps:
        before = [entry.step for entry in good if entry.step <= newest - rules.keep_steps]
        for entry in good:
            if entry.step >= max(before, default=0) and entry not in last:
                reasons[entry.name].append(REWIND)
    age = max(1, newest - (last or ordered[-1:])[0].step)
    while age < 2 * rules.reach_steps:
        # The oldest of each doubling: it is the one that moves on to the next.
        for entry in [one for one in good if age < newest - one.step <= 2 * age][:1]:
            reasons[entry.name].append(SEEN_LATE)
        age *= 2


def _why_not(entry: Entry) -> str:
    if entry.health == CANDIDATE:
        return "candidate, and a newer one is good"
    return "good, and newer ones are" if entry.health == GOOD else entry.health


def needed_by_incidents(journal: Iterable[Record], *, num_incidents: int) -> frozenset[str]:
    """Return the checkpoints that incidents need.

    Those that attribution of the last `num_incidents` will read, and the target of a rewind that
    was begun and is not finished.
    """
    kept: dict[int, set[str]] = {}
    unfinished: set[str] = set()
    for record in journal:
        names, incident = record.get("kept"), record.get("incident")
        if isinstance(names, list) and names and isinstance(incident, int):
            kept.setdefault(incident, set()).update(str(name) for name in names)
        if record.get("phase") in ("intent", "done"):
            is_begun = record["phase"] == "intent" and bool(record.get("target_checkpoint"))
            unfinished = {str(record["target_checkpoint"])} if is_begun else set()
    numbers = sorted(kept)[-num_incidents:] if num_incidents > 0 else []
    return frozenset(unfinished.union(*(kept[number] for number in numbers)))


def parse_size(text: object) -> int:
    """Return the bytes of `2TB` (10^12), `500 GiB` (2^30), or a whole number of bytes.

    Raises: ValueError with the accepted forms.
    """
    if isinstance(text, int) and not isinstance(text, bool) and text > 0:
        return text
    match = _SIZE.match(text) if isinstance(text, str) else None
    if match is None:
        raise ValueError('expected a size such as "2TB", "500 GiB" or "1500000000b"')
    number, unit, is_binary = match.groups()
    base = 1024.0 if is_binary else 1000.0
    value = round(float(number.replace("_", "")) * base ** " kmgtp".index(unit.lower() or " "))
    if value <= 0:
        raise ValueError("expected more than nothing")
    return value


def read_rules(checkpoints: Path) -> Rules | None:
    """Return the rules of the run that wrote `checkpoints`, None if they are not known."""
    try:
        record = json.loads((checkpoints / RULES_FILE).read_text())
        rules = Rules(**{key: record[key] for key in (one.name for one in fields(Rules))})
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    counts = (rules.keep_good, rules.keep_steps, rules.reach_steps, rules.keep_incidents)
    limits = (rules.keep_every_steps, rules.budget_bytes)
    are_sound = all(type(count) is int and count >= 0 for count in counts) and all(
        limit is None or (type(limit) is int and limit > 0) for limit in limits
    )
    return rules if are_sound and rules.keep_good > 0 else None
