"""Amounts, as people write them in YAML, and what a rule makes of them."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from train.amounts import Amount, AmountUnit
from train.recovery.policy import Rule, Rung
from train.settings import CheckpointSettings, RecoverySettings, Veto


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("1B tokens", 10**9, AmountUnit.TOKENS),
        ("1b Tokens", 10**9, AmountUnit.TOKENS),
        ("1.5T tokens", 15 * 10**11, AmountUnit.TOKENS),
        (".5M tokens", 500_000, AmountUnit.TOKENS),
        ("30_000 tokens", 30_000, AmountUnit.TOKENS),
        ("2K batches", 2000, AmountUnit.BATCHES),
        ("300 batches", 300, AmountUnit.BATCHES),
        ("  100steps  ", 100, AmountUnit.STEPS),
        ("0 tokens", 0, AmountUnit.TOKENS),
    ],
)
def test_amount_is_read(text: str, value: int, unit: AmountUnit) -> None:
    assert Amount.parse(text) == Amount(value, unit)


@pytest.mark.parametrize(
    "text",
    ["", "tokens", "1B", "1 G tokens", "-1 tokens", "1 token", "1B tokens!", "a lot", "_ tokens"],
)
def test_text_that_is_no_amount_is_refused_with_the_accepted_forms(text: str) -> None:
    with pytest.raises(ValueError, match='such as "1B tokens", "300 batches" or "100 steps"'):
        Amount.parse(text)


@pytest.mark.parametrize("value", [None, 5, 1.0, True, ["1B tokens"], {}])
def test_value_that_is_no_text_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="expected an amount"):
        Amount.parse(value)


def test_amount_is_passed_through() -> None:
    amount = Amount(3, AmountUnit.STEPS)
    assert Amount.parse(amount) is amount


def test_amount_shows_its_number_and_unit() -> None:
    amount = Amount(1_500_000, AmountUnit.TOKENS)
    assert str(amount) == "1,500,000 tokens"


def test_scaled_amount_is_whole_and_never_nothing() -> None:
    assert Amount(10**9, AmountUnit.TOKENS).scaled(3e-5) == Amount(30_000, AmountUnit.TOKENS)
    assert Amount(300, AmountUnit.BATCHES).scaled(1e-9) == Amount(1, AmountUnit.BATCHES)


# What a rule makes of them.


def recovery(rule: Rule = Rule.LADDER, **changes: Any) -> RecoverySettings:
    settings: dict[str, Any] = {
        "rule": rule,
        "veto": Veto.AUTO,
        "skip": Amount(300, AmountUnit.BATCHES),
        "margin": Amount(10, AmountUnit.BATCHES),
        "rewind_steps": 100,
        "token_scale": 0.001,
        "step_scale": 0.5,
        "ladder": (Rung.REPLAY, Rung.SKIP, Rung.SKIP_FURTHER, Rung.SKIP_FURTHER, Rung.COOL),
        "growth": 3.0,
        "cool_factor": 0.5,
        "cool_steps": 1000,
        "cooldown_steps": 200,
        "max_rewinds": 20,
        "max_vetoes": 1000,
        "max_vetoes_in_a_row": 3,
        "announced": (),
        "announced_steps": 30,
        "window_steps": 48,
        "warmup_steps": 16,
        "threshold_sigma": 6.0,
        "persistence_steps": 2,
        "max_flagged_steps": 100,
    }
    return RecoverySettings(**{**settings, **changes})


@pytest.mark.parametrize(
    ("amount", "scaled"),
    [
        ("300 batches", "150 batches"),
        ("7 steps", "4 steps"),
        ("1M tokens", "1000 tokens"),
        ("10 tokens", "1 tokens"),
        ("1 steps", "1 steps"),
        ("0 tokens", "0 tokens"),
        ("0 steps", "0 steps"),
        ("0 batches", "0 batches"),
    ],
)
def test_amount_is_scaled_by_the_scale_of_its_unit(amount: str, scaled: str) -> None:
    assert recovery().scaled(Amount.parse(amount)) == Amount.parse(scaled)


@pytest.mark.parametrize(
    ("scale", "steps", "scaled"),
    [(0.5, 100, 50), (0.5, 1, 1), (1e-6, 100, 1), (0.5, 0, 0), (2.0, 3, 6), (1.0, 7, 7)],
)
def test_steps_are_scaled_whole_and_never_to_nothing(scale: float, steps: int, scaled: int) -> None:
    assert recovery(step_scale=scale).scaled_steps(steps) == scaled


@pytest.mark.parametrize(
    ("rule", "furthest"),
    [
        (Rule.LADDER, 150),
        (Rule.OBSERVE, 150),
        (Rule.PALM, 50),
        (Rule.FALCON, 50),
        (Rule.SKIP_STEP, 50),
    ],
)
def test_furthest_target_is_that_of_the_last_attempt_to_go_further(
    rule: Rule, furthest: int
) -> None:
    assert recovery(rule).furthest_rewind_steps() == furthest


@pytest.mark.parametrize(("num_further", "furthest"), [(0, 50), (1, 50), (2, 150), (4, 1350)])
def test_each_attempt_to_go_further_needs_older_targets(num_further: int, furthest: int) -> None:
    ladder = (Rung.SKIP, *[Rung.SKIP_FURTHER] * num_further)
    assert recovery(ladder=ladder).furthest_rewind_steps() == furthest


def test_rule_that_takes_the_latest_needs_no_older_target() -> None:
    assert recovery(Rule.FALCON, rewind_steps=0).furthest_rewind_steps() == 0


@pytest.mark.parametrize("veto", [Veto.OFF, Veto.NONFINITE, Veto.OUTLIER])
@pytest.mark.parametrize("rule", sorted(set(Rule) - {Rule.OBSERVE}))
def test_veto_that_is_set_holds_for_any_rule_that_acts(rule: Rule, veto: Veto) -> None:
    assert recovery(rule, veto=veto).resolved_veto is veto


@pytest.mark.parametrize("veto", list(Veto))
def test_observe_refuses_nothing_whatever_is_set(veto: Veto) -> None:
    assert recovery(Rule.OBSERVE, veto=veto).resolved_veto is Veto.OFF


@pytest.mark.parametrize(("interval", "longest"), [(10, 10), ("auto", 700)])
def test_longest_interval_is_the_one_that_is_set_or_the_bound_of_an_automatic_one(
    interval: int | Literal["auto"], longest: int
) -> None:
    checkpoint = CheckpointSettings(
        interval_steps=interval,
        max_interval_steps=700,
        max_minutes_at_risk=30.0,
        failures_per_day=None,
        good_after_steps=8,
        keep_good=3,
        keep_every_steps=None,
        disk_budget=None,
        keep_incidents=2,
        keep_snapshots=2,
        snapshot_interval_steps=None,
        is_async=True,
        retry_seconds=(2.0, 8.0, 30.0),
        max_failures=5,
        remote=None,
        save_at_start=True,
        save_at_end=True,
    )
    assert checkpoint.longest_interval_steps == longest
