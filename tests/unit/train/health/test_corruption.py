"""Who is named when bits are wrong."""

from __future__ import annotations

import pytest

from train.health.corruption import (
    Check,
    Corruption,
    Difference,
    Vote,
    blame,
    describe,
    differing,
    tensors_of_minority,
    vote,
)


@pytest.mark.parametrize("digests", ["a", "aa", "aaa"])
def test_ranks_that_agree_are_not_named(digests: str) -> None:
    assert vote(digests) is None


@pytest.mark.parametrize(
    ("digests", "wrong"),
    [("aab", (2,)), ("baa", (0,)), ("abaca", (1, 3)), ("aabc", (2, 3)), ("aaabbcd", (3, 4, 5, 6))],
)
def test_whoever_differs_from_the_largest_set_of_equals_is_wrong(
    digests: str, wrong: tuple[int, ...]
) -> None:
    assert vote(digests) == Vote(ranks=wrong, is_certain=True)


@pytest.mark.parametrize("digests", ["ab", "abc", "aabb", "aabbc"])
def test_without_a_largest_set_all_ranks_are_named_and_nothing_is_certain(digests: str) -> None:
    everyone = tuple(range(len(digests)))
    assert vote(digests) == Vote(ranks=everyone, is_certain=False)


SAME = Difference()
FORWARD = Difference(has_other_losses=True, gradients=("w",), state=("w/parameter",))
BACKWARD = Difference(gradients=("w",), state=("w/parameter",))
UPDATE = Difference(state=("w/parameter",))
STUCK = Difference(problem="w changed in host memory")


@pytest.mark.parametrize("own", [FORWARD, BACKWARD, STUCK])
def test_rank_whose_own_samples_come_out_otherwise_is_to_blame_for_what_all_have(
    own: Difference,
) -> None:
    assert blame([UPDATE, own, UPDATE]) == Vote(ranks=(1,), is_certain=True)


def test_rank_that_alone_ends_in_another_state_is_to_blame() -> None:
    assert blame([SAME, UPDATE, SAME]) == Vote(ranks=(1,), is_certain=True)
    assert blame([UPDATE]) == Vote(ranks=(0,), is_certain=True)


def test_no_rank_is_to_blame_for_what_only_follows_on_all_of_them() -> None:
    assert blame([UPDATE, UPDATE]) == Vote(ranks=(0, 1), is_certain=False)


def test_steps_that_repeat_blame_no_one() -> None:
    assert blame([SAME]) is blame([SAME, SAME]) is None


def test_difference_is_told_in_the_order_of_a_step() -> None:
    assert describe(FORWARD) == "other losses of its samples and other gradients (w)"
    assert describe(BACKWARD) == "other gradients (w)"
    assert describe(UPDATE) == "another state after the update (w/parameter)"
    assert describe(STUCK) == "w changed in host memory"
    many = Difference(gradients=("a", "b", "c", "d", "e"))
    assert describe(many) == "other gradients (a, b, c and 2 more)"


def test_names_that_one_side_lacks_differ() -> None:
    assert differing({"a": 1, "b": 2}, {"b": 2, "c": 3}) == ("a", "c")


def test_tensors_are_compared_with_a_rank_that_is_right() -> None:
    sums = [{"a": 9, "b": 2}, {"a": 1, "b": 2}, {"a": 1, "b": 2}, {"a": 1, "b": 8}]
    found = vote([str(each) for each in sums])
    assert found is not None and found.ranks == (0, 3)
    assert tensors_of_minority(sums, found) == ("a", "b")
    tie = vote([str(each) for each in sums[:2]])
    assert tie is not None
    assert tensors_of_minority(sums[:2], tie) == ("a",)


def corruption(found: Vote, **fields: str) -> Corruption:
    return Corruption(
        check=Check.REPLICAS,
        vote=found,
        places=tuple(f"node{rank}, cpu" for rank in found.ranks),
        tensors=("w",),
        detail="another state",
        **fields,
    )


def test_words_say_what_is_known_of_the_rank() -> None:
    certain = corruption(Vote(ranks=(1,), is_certain=True))
    assert certain.in_words() == "rank 1 (node1, cpu): another state"
    tie = corruption(Vote(ranks=(0, 1), is_certain=False))
    assert tie.in_words() == (
        "ranks 0 (node0, cpu), 1 (node1, cpu): another state; which of them is not known"
    )
    likely = corruption(Vote(ranks=(1,), is_certain=False), clue="it is the likelier one")
    assert likely.in_words() == "rank 1 (node1, cpu): another state; it is the likelier one"
