"""Amounts and limits of settings: `1B tokens`, `300 batches`, counts, shares. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

from pydantic import BeforeValidator, ConfigDict, Field

REFUSE_UNKNOWN = ConfigDict(extra="forbid")

Count = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Scale = Annotated[float, Field(gt=0, le=1e6)]
Share = Annotated[float, Field(ge=0, lt=1)]


class AmountUnit(StrEnum):
    """What an amount of training counts."""

    TOKENS = "tokens"
    BATCHES = "batches"
    STEPS = "steps"


_MULTIPLES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_MAX_AMOUNT = 10**15
_AMOUNT = re.compile(r"^\s*([\d_]*\.?\d+)\s*([kmbt]?)\s*(tokens|batches|steps)\s*$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Amount:
    """An amount of data: `1B tokens`, `300 batches`, `100 steps` (a step reads one batch)."""

    value: int
    unit: AmountUnit

    @classmethod
    def parse(cls, text: object) -> Amount:
        """Read an amount from the config. Raises: ValueError with the accepted forms."""
        if isinstance(text, Amount):
            return text
        match = _AMOUNT.match(text) if isinstance(text, str) else None
        if match is None:
            raise ValueError('expected an amount such as "1B tokens", "300 batches" or "100 steps"')
        number, multiple, unit = match.groups()
        value = round(float(number.replace("_", "")) * _MULTIPLES[multiple.lower()])
        if value > _MAX_AMOUNT:
            raise ValueError(f"expected at most {_MAX_AMOUNT:,} of anything")
        return cls(value, AmountUnit(unit.lower()))

    def scaled(self, factor: float) -> Amount:
        """Return this amount times `factor`, at least 1."""
        return Amount(max(1, round(self.value * factor)), self.unit)

    def __str__(self) -> str:
        return f"{self.value:,} {self.unit}"


AmountField = Annotated[Amount, BeforeValidator(Amount.parse)]
