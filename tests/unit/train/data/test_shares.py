"""Shares as fractions, and the stages that they follow."""

from __future__ import annotations

from fractions import Fraction

import pytest

from train.data.shares import MAX_DENOMINATOR, MixtureStage, rational_shares, steps_of
from train.errors import DataError


def stage(start: int, ramp: int = 0, known: int = 0) -> MixtureStage:
    return MixtureStage(start_index=start, weights=(1, 2), ramp_indices=ramp, known_from=known)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ((0.7, 0.2, 0.1), (Fraction(7, 10), Fraction(1, 5), Fraction(1, 10))),
        ((3, 1), (Fraction(3, 4), Fraction(1, 4))),
        ((0.1, 0.2), (Fraction(1, 3), Fraction(2, 3))),
        ((Fraction(1, 7), Fraction(6, 7)), (Fraction(1, 7), Fraction(6, 7))),
        ((0, 5), (Fraction(0), Fraction(1))),
        ((1e-4, 0.9999), (Fraction(1, 10_000), Fraction(9_999, 10_000))),
        ((0.3333333333, 0.6666666667), (Fraction(1, 3), Fraction(2, 3))),
    ],
)
def test_weights_of_a_small_denominator_are_exact(
    weights: tuple[float | Fraction, ...], expected: tuple[Fraction, ...]
) -> None:
    assert rational_shares(weights) == expected


@pytest.mark.parametrize(
    "weights",
    [
        (0.31415926535, 0.27182818284, 0.41421356237),
        (1e-4, 0.123456789, 0.7654321, 0.0111111117),
        tuple(1 / (number + 0.123456) for number in range(1, 13)),
    ],
)
def test_other_weights_are_met_closely(weights: tuple[float, ...]) -> None:
    shares = rational_shares(weights)
    assert sum(shares) == 1
    assert all(share > 0 for share in shares)
    assert all(share.denominator <= MAX_DENOMINATOR for share in shares)
    for share, weight in zip(shares, weights, strict=True):
        assert abs(float(share) - weight / sum(weights)) < 1 / MAX_DENOMINATOR


@pytest.mark.parametrize("weights", [(0, 0), (-1, 2), (float("nan"), 1), (float("inf"), 1), ()])
def test_weights_without_a_sum_are_refused(weights: tuple[float, ...]) -> None:
    with pytest.raises(
        DataError, match=r"at least 0, one of them more, found.*correct data.sources"
    ):
        rational_shares(weights)


def test_weight_too_small_to_be_told_from_none_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"smallest is 1e-09 of the whole.*at most 65536.*set it to 0"
    ):
        rational_shares((1e-9, 1.0))


@pytest.mark.parametrize(
    ("stages", "found"),
    [
        ([stage(5)], "stage 0 at index 5 with a ramp of 0, expected at least 0"),
        ([stage(0, ramp=4)], "stage 0 at index 0 with a ramp of 4"),
        ([stage(0), stage(0)], "stage 1 at index 0 with a ramp of 0, expected at least 1"),
        ([stage(0), stage(9), stage(8)], "stage 2 at index 8 .*, expected at least 10"),
        ([stage(0), stage(9, ramp=20), stage(15)], "stage 2 at index 15 .*, expected at least 29"),
        ([stage(0), stage(9, ramp=-1)], "stage 1 at index 9 with a ramp of -1"),
    ],
)
def test_stages_out_of_order_are_refused(stages: list[MixtureStage], found: str) -> None:
    with pytest.raises(DataError, match=f"{found}.*correct data.stages"):
        steps_of(stages)


@pytest.mark.parametrize("known", [-1, 10])
def test_stage_known_after_it_starts_is_refused(known: int) -> None:
    with pytest.raises(DataError, match=f"stage 1 starts at 9 and is known from {known} on"):
        steps_of([stage(0), stage(9, known=known)])


def test_ramp_has_32_steps_or_one_an_index() -> None:
    assert len(steps_of([stage(0), stage(9, ramp=1000)])) == 1 + 32 + 1
    assert [start for start, _ in steps_of([stage(0), stage(9, ramp=3)])] == [0, 9, 10, 11, 12]


def test_stage_may_follow_a_ramp_at_once() -> None:
    starts = [start for start, _ in steps_of([stage(0), stage(5, ramp=2), stage(7)])]
    assert starts == [0, 5, 6, 7, 7]
