"""What a checkpoint knows of the samples behind it, and when that is found to be wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sources import RowSource

from train.data.ledger import SkipLedger
from train.data.sequence import Returns
from train.data.stream import SampleStream
from train.errors import DataError


class Words(RowSource):
    """Tokens that depend on the index; `changed` samples are other ones now."""

    sample_tokens = 9
    dtype = np.dtype(np.uint16)

    def __init__(self, *, changed: int = -1, bad: int = -1) -> None:
        self.changed = changed
        self.bad_index = bad

    def rows(self, indices: np.ndarray) -> np.ndarray:
        rows = (indices[:, None] * 7 + np.arange(9)) % 1000
        rows[indices == self.changed] += 1
        return rows

    def bad(self, indices: np.ndarray) -> np.ndarray:
        return indices == self.bad_index


def stream(
    source: Words | None = None,
    ledger: SkipLedger | None = None,
    *,
    rank: int = 0,
    num_ranks: int = 1,
    skips_damaged: bool = False,
) -> SampleStream:
    return SampleStream(
        source or Words(),
        ledger or SkipLedger(),
        rank=rank,
        num_ranks=num_ranks,
        returns=Returns(),
        skips_damaged=skips_damaged,
    )


@pytest.mark.parametrize(
    ("cursor", "skips", "expected"),
    [
        (0, [], []),
        (3, [], [0, 1, 2]),
        (100, [], list(range(84, 100))),
        (100, [(90, 100)], list(range(74, 90))),
        (100, [(90, 95), (98, 140)], [*range(77, 90), *range(95, 98)]),
        (20, [(0, 19)], [19]),
        (20, [(0, 30)], []),
    ],
)
def test_the_last_samples_that_were_trained_on_are_named(
    cursor: int, skips: list[tuple[int, int]], expected: list[int]
) -> None:
    assert stream(ledger=SkipLedger(skips)).proof(cursor)["indices"] == expected


def test_it_is_short_and_the_same_on_every_rank() -> None:
    proofs = [stream(rank=rank, num_ranks=4).proof(5000) for rank in range(4)]
    assert all(proof == proofs[0] for proof in proofs)
    assert len(json.dumps(proofs[0])) < 300


def test_the_same_samples_pass_whatever_was_skipped_since() -> None:
    proof = stream().proof(100)
    stream().check(proof)
    stream(ledger=SkipLedger([(100, 1000)])).check(proof)


@pytest.mark.parametrize("changed", [84, 99])
def test_another_token_is_found(changed: int) -> None:
    proof = stream().proof(100)
    with pytest.raises(DataError, match="trained on last are others now"):
        stream(Words(changed=changed)).check(proof)


def test_what_lies_in_damaged_files_cannot_be_compared(caplog: pytest.LogCaptureFixture) -> None:
    proof = stream().proof(100)
    stream(Words(changed=99, bad=99), skips_damaged=True).check(proof)
    assert "it is not compared" in caplog.text
