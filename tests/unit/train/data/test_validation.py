"""Held-out samples: the same ones in every run, and when they are evaluated."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from test_source import NumberedSamples

from train.data.layout import DocumentLayout
from train.data.validation import HeldOut, Validation


class MeanEngine:
    """Its loss is the mean of what it is given."""

    def evaluate(
        self, rows: npt.NDArray[np.integer], layout: DocumentLayout | None = None
    ) -> float:
        del layout
        return float(rows.mean())


def test_the_first_samples_of_an_order_that_never_changes_are_held_out() -> None:
    few = HeldOut(NumberedSamples(0, 100), start=0, stop=100, count=10)
    many = HeldOut(NumberedSamples(0, 100), start=0, stop=100, count=40)
    rows, _ = few.read()
    more, _ = many.read()
    assert len(few) == 10 and len(set(rows[:, 0].tolist())) == 10
    assert more[:10].tolist() == rows.tolist()


def test_only_the_end_of_the_tokens_is_held_out_where_there_is_no_split() -> None:
    held_out = HeldOut(NumberedSamples(0, 100), start=90, stop=100, count=10)
    rows, _ = held_out.read()
    assert sorted(rows[:, 0].tolist()) == list(range(90, 100))


def test_losses_are_taken_by_source_and_of_all_tokens_together() -> None:
    validation = Validation(
        {
            "a": HeldOut(NumberedSamples(0, 3), start=0, stop=3, count=3),
            "b": HeldOut(NumberedSamples(100, 1), start=0, stop=1, count=9),
            "empty": HeldOut(NumberedSamples(100, 0), start=0, stop=0, count=9),
        },
        interval_steps=None,
    )
    evaluation = validation.evaluate(MeanEngine())
    assert evaluation.by_source == {"a": 1.0, "b": 100.0}
    assert evaluation.loss_nats == pytest.approx((3 * 1.0 + 100.0) / 4)


@pytest.mark.parametrize(("interval", "due"), [(None, []), (5, [5, 10, 15])])
def test_it_is_due_at_every_interval(interval: int | None, due: list[int]) -> None:
    held_out = HeldOut(NumberedSamples(0, 3), start=0, stop=3, count=3)
    validation = Validation({"a": held_out}, interval_steps=interval)
    assert [step for step in range(1, 17) if validation.is_due(step)] == due


def test_nothing_is_due_where_nothing_is_held_out() -> None:
    validation = Validation({}, interval_steps=1)
    assert not validation.has_samples and not validation.is_due(1)
