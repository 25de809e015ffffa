"""Amounts, as people write them in YAML."""

from __future__ import annotations

import pytest

from train.settings import Amount, AmountUnit


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
