"""The stream of batches: ledger, returns, ranks, and sources with something wrong in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sources import RowSource, ordered, rows_of
from token_files import corpus_of

from train.data.ledger import SkipLedger
from train.data.origins import SampleOrigin
from train.data.samples import CutSamples
from train.data.sequence import Returns
from train.data.shards import Shard
from train.data.source import MixedSource
from train.data.spoiled import PoisonedSource, ShiftedSource
from train.data.store import TokenStore
from train.data.stream import SampleStream

LENGTH = 4


def store(folder: Path, num_tokens: int = 43, *, length: int = LENGTH) -> CutSamples:
    path = folder / "tokens.bin"
    np.arange(num_tokens, dtype=np.uint16).tofile(path)
    corpus = corpus_of([Shard(address=str(path), num_tokens=num_tokens, num_bytes=2 * num_tokens)])
    return CutSamples(TokenStore(corpus, corpus.train), sequence_length=length)


# Stream.


def stream(
    made: CutSamples, ledger: SkipLedger | None = None, *, rank: int = 0, num_ranks: int = 1
) -> SampleStream:
    source = ordered(made, seed=7)
    return SampleStream(source, ledger or SkipLedger(), rank=rank, num_ranks=num_ranks)


def test_batch_tells_where_the_next_one_begins_and_how_much_it_predicts(tmp_path: Path) -> None:
    batch = stream(store(tmp_path)).at(6, 4)
    assert batch.indices.tolist() == [6, 7, 8, 9]
    assert batch.next_cursor == 10
    assert batch.num_tokens == 4 * LENGTH
    assert batch.rows.shape == (4, LENGTH + 1)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_ranks_together_hold_the_rows_of_one(tmp_path: Path, num_ranks: int) -> None:
    made = store(tmp_path)
    whole = stream(made).at(3, 4)
    parts = [stream(made, rank=rank, num_ranks=num_ranks).at(3, 4) for rank in range(num_ranks)]
    assert np.array_equal(np.concatenate([part.rows for part in parts]), whole.rows)
    assert {part.next_cursor for part in parts} == {whole.next_cursor}
    assert {part.num_tokens for part in parts} == {whole.num_tokens}


def test_skipped_samples_never_come(tmp_path: Path) -> None:
    skipping = stream(store(tmp_path), SkipLedger([(5, 9)]))
    batch = skipping.at(4, 3)
    assert batch.indices.tolist() == [4, 9, 10]
    plain = stream(store(tmp_path))
    assert batch.rows[1:].tolist() == plain.at(9, 2).rows.tolist()


def test_poison_stays_in_its_stretch_and_comes_again(tmp_path: Path) -> None:
    made = store(tmp_path)
    order = ordered(made, seed=7)
    poisoned = PoisonedSource(order, start=5, stop=8, vocab_size=1000, seed=1)
    indices = np.arange(10, dtype=np.int64)
    bad, good = rows_of(poisoned, indices), rows_of(order, indices)
    differs = (bad != good).any(axis=1)
    assert np.flatnonzero(differs).tolist() == [5, 6, 7]
    assert np.array_equal(rows_of(poisoned, indices[6:7]), bad[6:7])
    assert np.array_equal(rows_of(order, indices), good)


def test_poison_takes_any_seed(tmp_path: Path) -> None:
    made = store(tmp_path)
    order = ordered(made, seed=-1)
    poisoned = PoisonedSource(order, start=0, stop=1, vocab_size=1000, seed=-1)
    assert rows_of(poisoned, np.array([0], dtype=np.int64)).shape == (1, LENGTH + 1)


# Samples that are put back.


def test_put_back_samples_come_at_their_new_place_and_the_rest_moves_back(tmp_path: Path) -> None:
    made = store(tmp_path)
    source = ordered(made, seed=7)
    returning = SampleStream(
        source, SkipLedger([(2, 5)]), rank=0, num_ranks=1, returns=Returns([(6, 2, 5)])
    )
    batch = returning.at(0, 8)
    assert batch.indices.tolist() == [0, 1, 5, 2, 3, 4, 6, 7]
    assert batch.next_cursor == 11
    assert np.array_equal(batch.rows, rows_of(source, batch.indices))
    assert returning.at(batch.next_cursor, 2).indices.tolist() == [8, 9]


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_ranks_share_a_batch_with_put_back_samples(tmp_path: Path, num_ranks: int) -> None:
    made = store(tmp_path)
    source = ordered(made, seed=7)
    parts = [
        SampleStream(
            source, SkipLedger(), rank=rank, num_ranks=num_ranks, returns=Returns([(3, 0, 2)])
        ).at(1, 4)
        for rank in range(num_ranks)
    ]
    rows = rows_of(source, np.array([1, 2, 0, 1], dtype=np.int64))
    assert np.array_equal(np.concatenate([part.rows for part in parts]), rows)


def test_return_that_is_added_holds_for_the_next_batch(tmp_path: Path) -> None:
    growing = stream(store(tmp_path), SkipLedger([(1, 3)]))
    cursor = growing.at(0, 2).next_cursor
    growing.returns.insert(cursor, 1, 3)
    assert growing.at(cursor, 3).indices.tolist() == [1, 2, 4]


def test_indices_are_those_of_the_batch_and_read_no_tokens(tmp_path: Path) -> None:
    returning = stream(store(tmp_path), SkipLedger([(5, 9)]))
    returning.returns.insert(11, 5, 9)
    batch = returning.at(4, 6)
    assert returning.at(4, 6).indices.tolist() == [4, 9, 10, 5, 6, 7]
    indices, next_cursor = returning.indices(4, 6)
    assert indices.tolist() == batch.indices.tolist()
    assert next_cursor == batch.next_cursor
    assert np.array_equal(returning.rows_of(indices[2:4]), batch.rows[2:4])
    silent = SampleStream(Unreadable(), SkipLedger(), rank=0, num_ranks=1)
    assert silent.indices(3, 2)[0].tolist() == [3, 4]


class Unreadable(RowSource):
    def rows(self, indices: np.ndarray) -> np.ndarray:
        raise AssertionError(f"the tokens of {indices} were read")

    def origins(self, index: int) -> tuple[SampleOrigin, ...]:
        raise AssertionError(f"the origins of {index} were read")


# A lasting shift.

WIDE = 64


def wide(folder: Path, *, seed: int = 7) -> MixedSource:
    made = store(folder, 60_001, length=WIDE)
    return ordered(made, seed=seed)


def test_shift_begins_at_its_start_and_never_ends(tmp_path: Path) -> None:
    plain = wide(tmp_path)
    shifted = ShiftedSource(plain, start=300, seed=1)
    indices = np.array([0, 299, 300, 301, 5000, 10**12], dtype=np.int64)
    differs = (rows_of(shifted, indices) != rows_of(plain, indices)).any(axis=1)
    assert differs.tolist() == [False, False, True, True, True, True]


def test_shift_replaces_a_seventh_of_the_tokens_by_others_of_the_sample(tmp_path: Path) -> None:
    plain = wide(tmp_path)
    indices = np.arange(500, dtype=np.int64)
    before = rows_of(plain, indices)
    after = rows_of(ShiftedSource(plain, start=0, seed=1), indices)
    assert after.dtype == before.dtype
    changed = before != after
    assert 0.14 < changed.mean() < 0.16
    assert np.ptp(changed.mean(axis=0)) < 0.12  # no place of the sample is spared or preferred
    assert all(set(new) <= set(old) for new, old in zip(after, before, strict=True))


def test_level_of_the_shift_neither_grows_nor_fades(tmp_path: Path) -> None:
    plain = wide(tmp_path)
    shifted = ShiftedSource(plain, start=0, seed=1)
    for first in (0, 10**4, 10**9):
        indices = np.arange(first, first + 500, dtype=np.int64)
        share = (rows_of(plain, indices) != rows_of(shifted, indices)).mean()
        assert 0.14 < share < 0.16


def test_shift_is_the_same_for_any_batches_and_comes_again(tmp_path: Path) -> None:
    shifted = ShiftedSource(wide(tmp_path), start=3, seed=-1)
    indices = np.arange(20, dtype=np.int64)
    whole = rows_of(shifted, indices)
    scrambled = np.random.default_rng(0).permutation(indices)
    assert np.array_equal(rows_of(shifted, scrambled), whole[scrambled])
    assert np.array_equal(rows_of(shifted, indices[7:8]), whole[7:8])


def test_shifts_of_two_seeds_differ_and_a_sample_differs_in_each_epoch(tmp_path: Path) -> None:
    plain = wide(tmp_path)
    indices = np.arange(50, dtype=np.int64)
    one, other = (rows_of(ShiftedSource(plain, start=0, seed=seed), indices) for seed in (1, 2))
    assert (one != other).mean() > 0.2
    changed = one != rows_of(plain, indices)
    assert not np.array_equal(changed[0], changed[1])


# Where samples come from, through the sources.


def test_faulty_sources_tell_the_origins_of_the_sound_one() -> None:
    sound = Unreadable()
    origin = SampleOrigin(
        file="a.txt", line=None, document=3, token_offset_in_document=5, num_tokens=7
    )
    sound.origins = lambda index: (origin,) if index == 4 else ()  # type: ignore[method-assign]
    poisoned = PoisonedSource(sound, start=0, stop=9, vocab_size=10, seed=1)
    shifted = ShiftedSource(poisoned, start=0, seed=1)
    assert poisoned.origins(4) == shifted.origins(4) == (origin,)
    through = SampleStream(shifted, SkipLedger(), rank=0, num_ranks=1)
    assert through.origins_of(4) == (origin,)
    assert through.origins_of(5) == ()
