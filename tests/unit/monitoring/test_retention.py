"""Retention: what never goes, what a budget takes, and that a plan is at rest once it is done."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from monitoring.retention import (
    EVERY,
    INCIDENT,
    NEWEST_GOOD,
    RULES_FILE,
    Rules,
    needed_by_incidents,
    parse_size,
    plan,
    read_rules,
)

GOOD, CANDIDATE, QUARANTINED = "good", "candidate", "quarantined"


@dataclass(frozen=True)
class Entry:
    name: str
    step: int
    clock: int
    health: str = GOOD
    num_bytes: int = 10


def at(*steps: int, health: str = GOOD) -> list[Entry]:
    return [Entry(f"step-{step}", step, step, health) for step in steps]


@st.composite
def histories(draw: st.DrawFn) -> list[Entry]:
    """Checkpoints of a run that now and then goes back to one of them."""
    entries: list[Entry] = []
    step = clock = 0
    for number in range(draw(st.integers(0, 25))):
        if entries and draw(st.integers(0, 6)) == 0:
            step = draw(st.sampled_from(entries)).step
        advance = draw(st.integers(1, 40))
        step, clock = step + advance, clock + advance
        health = draw(st.sampled_from((GOOD, GOOD, CANDIDATE, QUARANTINED)))
        entries.append(Entry(f"c{number}", step, clock, health, draw(st.integers(1, 30))))
    return entries


RULES = st.builds(
    Rules,
    keep_good=st.integers(1, 4),
    keep_steps=st.integers(0, 100),
    reach_steps=st.integers(0, 300),
    keep_every_steps=st.none() | st.integers(1, 200),
    budget_bytes=st.none() | st.integers(1, 200),
)
NEEDED = st.sets(st.integers(0, 25).map(lambda number: f"c{number}"), max_size=3)


def newest_good(entries: list[Entry]) -> Entry | None:
    return max((e for e in entries if e.health == GOOD), key=lambda e: e.clock, default=None)


@given(histories(), RULES, NEEDED)
def test_every_checkpoint_stays_or_goes_and_says_why(
    entries: list[Entry], rules: Rules, needed: set[str]
) -> None:
    decided = plan(entries, rules, needed=needed)
    assert decided.kept.keys() | decided.removed.keys() == {entry.name for entry in entries}
    assert not decided.kept.keys() & decided.removed.keys()
    assert all(decided.kept.values())
    assert all(decided.removed.values())


@given(histories(), RULES, NEEDED)
def test_the_newest_good_one_the_newest_one_and_what_incidents_need_stay(
    entries: list[Entry], rules: Rules, needed: set[str]
) -> None:
    kept = plan(entries, rules, needed=needed).kept
    good = newest_good(entries)
    assert good is None or NEWEST_GOOD in kept[good.name]
    assert not entries or entries[-1].name in kept
    assert {entry.name for entry in entries} & needed <= kept.keys()


@given(histories(), RULES, NEEDED)
def test_nothing_goes_before_a_newer_one_is_good(
    entries: list[Entry], rules: Rules, needed: set[str]
) -> None:
    good = newest_good(entries)
    for entry in entries:
        if entry.name in plan(entries, rules, needed=needed).removed:
            is_bad = entry.health == QUARANTINED
            assert is_bad or (good is not None and good.clock > entry.clock)


@given(histories(), RULES, NEEDED)
def test_doing_it_twice_changes_nothing(
    entries: list[Entry], rules: Rules, needed: set[str]
) -> None:
    first = plan(entries, rules, needed=needed)
    left = [entry for entry in entries if entry.name in first.kept]
    assert plan(left, rules, needed=needed).removed == {}


@given(histories(), RULES, NEEDED)
def test_a_budget_is_kept_or_what_is_left_over_is_what_must_stay(
    entries: list[Entry], rules: Rules, needed: set[str]
) -> None:
    decided = plan(entries, rules, needed=needed)
    taken = sum(entry.num_bytes for entry in entries if entry.name in decided.kept)
    budget = taken if rules.budget_bytes is None else rules.budget_bytes
    assert decided.over_budget_bytes == max(0, taken - budget)
    without = plan(entries, replace(rules, budget_bytes=None), needed=needed)
    if decided.over_budget_bytes:
        least = plan(
            entries, replace(rules, keep_good=1, keep_steps=0, reach_steps=0), needed=needed
        )
        assert decided.kept.keys() == least.kept.keys()
    lost = [entry for entry in entries if entry.name in without.kept.keys() - decided.kept.keys()]
    for entry in lost:
        assert "disk budget" in decided.removed[entry.name]


@given(histories(), RULES, NEEDED, st.randoms())
def test_the_order_in_which_a_folder_lists_them_does_not_matter(
    entries: list[Entry], rules: Rules, needed: set[str], random: object
) -> None:
    shuffled = list(entries)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert plan(shuffled, rules, needed=needed) == plan(entries, rules, needed=needed)


def test_one_of_each_stretch_stays_for_good_whatever_the_interval_and_the_budget() -> None:
    rules = Rules(keep_good=1, keep_every_steps=100, budget_bytes=1)
    entries: list[Entry] = []
    for step in range(0, 500, 30):  # no multiple of 100 but the first is ever saved
        entries += at(step)
        decided = plan(entries, rules)
        entries = [entry for entry in entries if entry.name in decided.kept]
    assert [entry.step for entry in entries] == [0, 120, 210, 300, 420, 480]
    assert EVERY in decided.kept["step-120"]
    assert decided.over_budget_bytes == 59


def test_a_budget_takes_the_oldest_first() -> None:
    decided = plan(at(1, 2, 3, 4, 5), Rules(keep_good=4, budget_bytes=25))
    assert list(decided.kept) == ["step-4", "step-5"]
    assert decided.removed["step-1"] == "good, and newer ones are"
    assert decided.removed["step-2"] == "disk budget (last N good)"
    assert decided.over_budget_bytes == 0


def test_a_candidate_before_the_newest_good_one_goes_and_one_after_it_stays() -> None:
    entries = [*at(1, health=CANDIDATE), *at(2), *at(3, 4, health=CANDIDATE)]
    decided = plan(entries, Rules(keep_good=2))
    assert decided.kept == {
        "step-2": (NEWEST_GOOD, "last N good"),
        "step-3": ("may become good",),
        "step-4": ("newest",),
    }
    assert decided.removed == {"step-1": "candidate, and a newer one is good"}


def test_what_the_last_incidents_and_an_unfinished_rewind_need() -> None:
    journal = [
        {"phase": "intent", "incident": 1, "kept": ["a"], "target_checkpoint": "a"},
        {"phase": "done", "incident": 1, "kept": ["a"], "target_checkpoint": "a"},
        {"phase": "intent", "incident": 2, "kept": ["b", "c"], "target_checkpoint": "t"},
        {"phase": "done", "incident": 2, "kept": ["b", "c"], "target_checkpoint": "t"},
        {"phase": "observed", "incident": 3, "kept": []},
    ]
    assert needed_by_incidents(journal, num_incidents=1) == {"b", "c"}
    assert needed_by_incidents(journal, num_incidents=5) == {"a", "b", "c"}
    assert needed_by_incidents(journal, num_incidents=0) == set()
    assert needed_by_incidents(journal[:3], num_incidents=0) == {"t"}
    kept = plan(at(1, 2, health=QUARANTINED), Rules(keep_good=1), needed={"step-1"}).kept
    assert kept["step-1"] == (INCIDENT,)


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("2TB", 2 * 10**12),
        ("1.5 GB", 1_500_000_000),
        ("500GiB", 500 * 2**30),
        ("10b", 10),
        ("3 kib", 3072),
        (4096, 4096),
    ],
)
def test_size_is_read(text: object, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize("text", ["2", "TB", "0 GB", "-1GB", 0, -5, True, None, 1.5, "2 XB"])
def test_size_that_is_none_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse_size(text)


@given(RULES)
def test_rules_come_back_from_their_file(
    tmp_path_factory: pytest.TempPathFactory, rules: Rules
) -> None:
    folder = tmp_path_factory.mktemp("rules")
    (folder / RULES_FILE).write_text(json.dumps(asdict(rules)))
    assert read_rules(folder) == rules


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "[[]]", '{"keep_good": "3"}', '{"keep_good": null}', "7"]
)
def test_rules_that_cannot_be_read_are_not_guessed(tmp_path: Path, text: str) -> None:
    (tmp_path / RULES_FILE).write_text(text)
    assert read_rules(tmp_path) is None
    assert read_rules(tmp_path / "nowhere") is None
