"""The mixture against its promise: no source is ever a whole sample off its shares.

What is due is summed here in exact fractions, index by index, from `shares_at` alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from train.data.blocks import BLOCK_INDICES
from train.data.mixture import MAX_SOURCES, Mixture, MixtureStage
from train.errors import DataError

PROPERTY = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow],
)

# Few denominators, so that patterns repeat inside short stages and are made quickly.
plain = st.one_of(st.integers(0, 7), st.sampled_from([0, 1, Fraction(1, 3), 0.5, 0.1]))
odd = st.floats(1e-4, 1).map(lambda weight: float(f"{weight:.6g}"))


def stage(start: int, *shares: float | Fraction, ramp: int = 0, known: int = 0) -> MixtureStage:
    return MixtureStage(start_index=start, weights=shares, ramp_indices=ramp, known_from=known)


def mixture(*stages: MixtureStage, sizes: object = None, epochs: object = None) -> Mixture:
    count = len(stages[0].weights)
    return Mixture(stages, num_samples=sizes or [1000] * count, max_epochs=epochs or [None] * count)


@st.composite
def mixtures(
    draw: st.DrawFn,
    *,
    weights: st.SearchStrategy[Any] = plain,
    ramps: Sequence[int] = (0, 0, 1, 5, 50),
    is_late: bool = False,
) -> tuple[Mixture, int]:
    """Return a mixture and behind how many indices it has no more stages."""
    count = draw(st.integers(1, 12))
    some = st.lists(weights, min_size=count, max_size=count).filter(any)
    stages: list[MixtureStage] = []
    start = 0
    for number in range(draw(st.integers(1, 4))):
        ramp = draw(st.sampled_from(ramps)) if number else 0
        known = draw(st.integers(0, start)) if is_late else 0
        stages.append(stage(start, *draw(some), ramp=ramp, known=known))
        start += ramp + draw(st.sampled_from([1, 2, 17, 100, 150]))
    sizes = draw(st.lists(st.integers(1, 200), min_size=count, max_size=count))
    limit = st.sampled_from([None, None, None, 0.1, 1, 1.5, 3])
    epochs = draw(st.lists(limit, min_size=count, max_size=count))
    made = Mixture(stages, num_samples=sizes, max_epochs=epochs)
    return made, min(start + 100, start + 100 if made.num_indices is None else made.num_indices)


def located(made: Mixture, stop: int, start: int = 0) -> tuple[np.ndarray, np.ndarray]:
    return made.locate(np.arange(start, stop, dtype=np.int64))


def deviations(made: Mixture, stop: int) -> tuple[Fraction, Fraction]:
    """Return by how much a source is ahead and behind at most, over all prefixes up to `stop`."""
    sources, _ = located(made, stop)
    off = [Fraction(0)] * len(made.shares_at(0)) if stop else []
    ahead = behind = Fraction(0)
    for index, source in enumerate(sources.tolist()):
        shares = made.shares_at(index)
        assert sum(shares) == 1
        off = [before - share for before, share in zip(off, shares, strict=True)]
        off[source] += 1
        ahead, behind = max(ahead, *off, 0), max(behind, -min(off))
    return ahead, behind


@PROPERTY
@given(mixtures())
def test_no_source_is_ever_a_whole_sample_off_its_shares(made: tuple[Mixture, int]) -> None:
    ahead, behind = deviations(*made)
    assert ahead < 1
    assert behind < 1


@settings(PROPERTY, max_examples=12)
@given(mixtures(weights=odd))
def test_promise_holds_for_weights_of_four_orders_of_magnitude(made: tuple[Mixture, int]) -> None:
    ahead, behind = deviations(*made)
    assert ahead < 1
    assert behind < 1


@PROPERTY
@given(mixtures(is_late=True))
def test_stage_known_late_puts_no_source_ahead_and_none_far_behind(
    made: tuple[Mixture, int],
) -> None:
    ahead, behind = deviations(*made)
    assert ahead < 1
    assert behind < len(made[0].given_before(0))


@PROPERTY
@given(mixtures(is_late=True))
def test_each_source_goes_through_its_own_samples_in_order(made: tuple[Mixture, int]) -> None:
    mixed, stop = made
    sources, own = located(mixed, stop)
    for source, given_in_all in enumerate(mixed.given_before(stop)):
        assert own[sources == source].tolist() == list(range(given_in_all))


@PROPERTY
@given(mixtures(), st.integers(0, 400), st.integers(1, 60))
def test_place_depends_on_the_index_alone(
    made: tuple[Mixture, int], start: int, count: int
) -> None:
    mixed, stop = made
    sources, own = located(mixed, stop)
    start = min(start, stop)
    piece = located(mixed, min(start + count, stop), start)
    assert np.array_equal(piece[0], sources[start : start + count])
    assert np.array_equal(piece[1], own[start : start + count])
    backwards = mixed.locate(np.arange(stop, dtype=np.int64)[::-1])
    assert np.array_equal(backwards[0][::-1], sources)
    assert np.array_equal(backwards[1][::-1], own)


@PROPERTY
@given(mixtures(ramps=(0,)))
def test_without_ramps_shares_change_where_changes_says_alone(made: tuple[Mixture, int]) -> None:
    """But for the one index in which a source runs out: it has the rest, and the others more."""
    mixed, stop = made
    for before, after in pairwise([0, *(at for at in mixed.changes if at < stop), stop]):
        assert len({mixed.shares_at(index) for index in range(before, after - 1)}) <= 1


@pytest.mark.parametrize("seed", range(6))
def test_promise_holds_where_a_pattern_repeats(seed: int) -> None:
    """Long stages between short ones, so that periods are left and entered with sources behind."""
    source = np.random.default_rng(seed)
    count = int(source.integers(2, 9))
    rows = source.integers(1, 9, size=(4, count)).tolist()
    starts = [0, 701, 707, 1500]
    mixed = mixture(*(stage(at, *row) for at, row in zip(starts, rows, strict=True)))
    ahead, behind = deviations(mixed, 2000)
    assert ahead < 1
    assert behind < 1


def test_adversarial_stage_is_prepared_for() -> None:
    """Six sources half a sample behind when each is given a third: known late, one is too late."""
    first, second = [Fraction(1, 6)] * 6, [0, 0, 0, 1, 1, 1]
    known = mixture(stage(0, *first), stage(3, *second))
    late = mixture(stage(0, *first), stage(3, *second, known=3))
    assert max(deviations(known, 50)) < 1
    assert deviations(late, 50)[1] > 1
    assert deviations(late, 50)[0] < 1


@settings(PROPERTY, max_examples=20)
@given(mixtures(), st.integers(0, 300), st.integers(0, 50), st.data())
def test_stage_added_to_a_run_changes_nothing_before_its_cursor(
    made: tuple[Mixture, int], cursor: int, distance: int, data: st.DataObject
) -> None:
    count = len(made[0].given_before(0))
    old = stage(0, *data.draw(st.lists(plain, min_size=count, max_size=count).filter(any)))
    new = data.draw(st.lists(plain, min_size=count, max_size=count).filter(any))
    before = mixture(old)
    after = mixture(old, stage(cursor + distance + 1, *new, ramp=20, known=cursor))
    assert after.given_before(cursor) == before.given_before(cursor)
    for found, expected in zip(located(after, cursor), located(before, cursor), strict=True):
        assert np.array_equal(found, expected)


def test_decimal_weights_are_exact() -> None:
    mixed = mixture(stage(0, 0.7, 0.2, 0.1))
    assert mixed.shares_at(10**15) == (Fraction(7, 10), Fraction(2, 10), Fraction(1, 10))
    assert mixed.given_before(10**15) == (7 * 10**14, 2 * 10**14, 10**14)


def test_far_indices_go_on_with_the_same_pattern() -> None:
    mixed = mixture(
        stage(0, 0.5, 0.3, 0.2), stage(10**12 + 3, 0.1, 0.2, 0.7), stage(10**17, 1, 1, 1)
    )
    for start in (10**12 - 40, 10**12 - 5, 10**15, 10**17 - 20, 2**62 - 100):
        given_before = np.array(mixed.given_before(start))
        sources, own = located(mixed, start + 64, start)
        for source in range(3):
            expected = given_before[source] + np.arange((sources == source).sum())
            assert own[sources == source].tolist() == expected.tolist()
        assert sum(mixed.given_before(start)) == start


def test_stretches_and_blocks_leave_no_seam() -> None:
    mixed = mixture(stage(0, 0.5, 0.3, 0.2), stage(BLOCK_INDICES + 5, 1, 2, 3, ramp=1000))
    indices = np.arange(3 * BLOCK_INDICES, dtype=np.int64)
    whole, scattered = mixed.locate(indices), mixed.locate(indices[::-1])
    assert np.array_equal(whole, np.array(scattered)[:, ::-1])


def test_ramp_goes_in_a_straight_line() -> None:
    mixed = mixture(stage(0, 0.9, 0.1), stage(10_000, 0.1, 0.9, ramp=6400))
    assert mixed.changes == (10_000, 16_400)
    shares = [float(mixed.shares_at(index)[0]) for index in range(10_000, 16_400)]
    line = 0.9 - 0.8 * (np.arange(6400) + 0.5) / 6400
    assert np.abs(np.array(shares) - line).max() < 0.8 / 64 + 1 / 1024
    assert abs(sum(shares) - 0.5 * 6400) < 1
    assert mixed.shares_at(16_400) == (Fraction(1, 10), Fraction(9, 10))
    assert len(set(shares)) == 32


def test_small_source_keeps_its_share_through_a_ramp() -> None:
    """A share below what a step of the ramp can tell is given in some of the steps."""
    mixed = mixture(stage(0, 0.0001, 0.9, 0.0999), stage(1000, 0.0001, 0.5, 0.4999, ramp=10**6))
    given_then = mixed.given_before(1000 + 10**6)[0] - mixed.given_before(1000)[0]
    assert abs(given_then - 100) <= 32


def test_source_pauses_and_goes_on_where_it_was() -> None:
    mixed = mixture(stage(0, 1, 1), stage(100, 1, 0), stage(200, 1, 1))
    sources, own = located(mixed, 300)
    assert (sources[100:200] == 0).all()
    assert own[sources == 1].tolist() == list(range(100))


def test_source_that_has_given_its_epochs_leaves_its_share_to_the_others() -> None:
    mixed = mixture(stage(0, 0.5, 0.25, 0.25), sizes=[100, 40, 1000], epochs=[None, 2.5, None])
    assert mixed.given_before(400) == (200, 100, 100)
    assert mixed.changes == (400,)
    assert mixed.num_indices is None
    assert mixed.shares_at(399)[1] == Fraction(1, 4)
    assert mixed.shares_at(400) == (Fraction(2, 3), 0, Fraction(1, 3))
    assert mixed.given_before(10**9)[1] == 100


def test_epochs_are_rounded_down_to_whole_samples() -> None:
    mixed = mixture(stage(0, 1, 1), sizes=[7, 7], epochs=[1.5, 0.99])
    assert mixed.num_indices == 16
    assert mixed.given_before(16) == (10, 6)


def test_mixture_ends_where_all_sources_have_run_out() -> None:
    mixed = mixture(stage(0, 0.7, 0.2, 0.1), sizes=[101, 1000, 300], epochs=[1.5, 1, 2])
    assert mixed.num_indices == 151 + 1000 + 600
    assert mixed.given_before(1751) == (151, 1000, 600)
    last = np.array([1750, 1751], dtype=np.int64)
    assert mixed.locate(last[:1])[0].size == 1
    expected = r"ends after 1,751 samples, and sample 1,751 was asked for.*max_epochs; raise one"
    for ask in (mixed.locate, lambda _: mixed.shares_at(1751), lambda _: mixed.given_before(1752)):
        with pytest.raises(DataError, match=expected):
            ask(last)


def test_mixture_ends_though_a_paused_source_has_samples_left() -> None:
    mixed = mixture(
        stage(0, 1, 1), stage(10, 1, 0), stage(90, 1, 1), sizes=[20, 9], epochs=[1, None]
    )
    assert mixed.num_indices == 25
    assert mixed.given_before(25) == (20, 5)


def test_mixture_of_sources_without_epochs_is_empty() -> None:
    mixed = mixture(stage(0, 1, 1), sizes=[3, 3], epochs=[0.1, 0.3])
    assert mixed.num_indices == 0
    with pytest.raises(DataError, match="ends after 0 samples"):
        located(mixed, 1)


def test_single_source_is_its_own_order() -> None:
    mixed = mixture(stage(0, 0.3))
    indices = np.array([5, 0, 2**62], dtype=np.int64)
    sources, own = mixed.locate(indices)
    assert sources.tolist() == [0, 0, 0]
    assert own.tolist() == indices.tolist()
    own[:] = 0
    assert indices.tolist() == [5, 0, 2**62]


def test_no_indices_have_no_places() -> None:
    sources, own = mixture(stage(0, 1, 1)).locate(np.array([], dtype=np.int64))
    assert sources.size == own.size == 0


@pytest.mark.parametrize("count", [0, MAX_SOURCES + 1])
def test_number_of_sources_out_of_range_is_refused(count: int) -> None:
    with pytest.raises(DataError, match=f"data.sources holds {count} sources, .* 1 to 64"):
        Mixture([stage(0, *[1] * count)], num_samples=[1] * count, max_epochs=[None] * count)


def test_sixty_four_sources_keep_the_promise() -> None:
    ahead, behind = deviations(mixture(stage(0, *range(1, 65))), 300)
    assert ahead < 1
    assert behind < 1


def test_our_own_mistakes_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one stage"):
        Mixture([], num_samples=[1], max_epochs=[None])
    with pytest.raises(ValueError, match=r"2 sources need a weight and max_epochs each"):
        Mixture([stage(0, 1)], num_samples=[1, 1], max_epochs=[None, None])
    with pytest.raises(ValueError, match=r"at least one sample, found none in \[1\]"):
        Mixture([stage(0, 1, 1)], num_samples=[1, 0], max_epochs=[None, None])
