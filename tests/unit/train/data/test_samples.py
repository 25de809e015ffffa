"""How a store of tokens is cut into samples."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from token_files import corpus_of, random_shards, shard_of

from train.data.samples import CutSamples, Samples
from train.data.shards import Shard
from train.data.store import TokenStore
from train.errors import DataError

LENGTH = 4


def store(folder: Path, num_tokens: int = 43, *, num_shards: int = 1) -> TokenStore:
    cuts = np.linspace(0, num_tokens, num_shards + 1).astype(int).tolist()
    shards = [
        shard_of(folder, str(start), [range(start, stop)])
        for start, stop in itertools.pairwise(cuts)
    ]
    corpus = corpus_of(shards)
    return TokenStore(corpus, corpus.train)


def without_documents(folder: Path) -> TokenStore:
    path = folder / "raw.bin"
    np.arange(43, dtype=np.uint16).tofile(path)
    corpus = corpus_of([Shard(address=str(path), num_tokens=43, num_bytes=86)])
    return TokenStore(corpus, corpus.train)


def numbers(*samples: int) -> np.ndarray:
    return np.array(samples, dtype=np.int64)


def rows(samples: Samples, which: np.ndarray) -> list[list[int]]:
    out = np.zeros((len(which), samples.sample_tokens), dtype=samples.dtype)
    samples.read(which, out)
    found: list[list[int]] = out.tolist()
    return found


@pytest.mark.parametrize("num_shards", [1, 3])
def test_neighbouring_samples_share_one_token(tmp_path: Path, num_shards: int) -> None:
    cut = CutSamples(store(tmp_path, num_shards=num_shards), sequence_length=LENGTH)
    assert rows(cut, numbers(0, 1, 3)) == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [12, 13, 14, 15, 16]]
    assert cut.sample_tokens == LENGTH + 1
    assert cut.dtype == np.uint16


@pytest.mark.parametrize(
    ("num_tokens", "num_samples"), [(1, 0), (4, 0), (5, 1), (8, 1), (9, 2), (43, 10)]
)
def test_each_token_but_the_first_is_predicted_once(
    tmp_path: Path, num_tokens: int, num_samples: int
) -> None:
    cut = CutSamples(store(tmp_path, num_tokens), sequence_length=LENGTH)
    assert cut.num_samples == num_samples
    predicted = [token for row in rows(cut, np.arange(num_samples)) for token in row[1:]]
    assert predicted == list(range(1, num_samples * LENGTH + 1))
    assert cut.num_predictions(np.arange(num_samples)) == num_samples * LENGTH


def test_empty_store_has_no_samples() -> None:
    corpus = corpus_of([])
    assert CutSamples(TokenStore(corpus, corpus.train), sequence_length=LENGTH).num_samples == 0


def test_stretch_of_the_samples_counts_from_its_own_start(tmp_path: Path) -> None:
    made = store(tmp_path)
    whole = CutSamples(made, sequence_length=LENGTH)
    part = CutSamples(made, sequence_length=LENGTH, first=3, num_samples=2)
    assert part.num_samples == 2
    assert rows(part, numbers(0, 1)) == rows(whole, numbers(3, 4))
    assert part.origins(1) == whole.origins(4)
    assert CutSamples(made, sequence_length=LENGTH, first=8).num_samples == 2
    assert CutSamples(made, sequence_length=LENGTH, first=99).num_samples == 0


def test_more_samples_than_there_are_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError) as why:
        CutSamples(store(tmp_path), sequence_length=LENGTH, first=8, num_samples=3)
    assert str(why.value) == (
        "samples 8 to 11 were asked for, and 43 tokens make 10 of data.sequence_length=4; give "
        "more text, or lower data.sequence_length"
    )


def test_samples_go_to_their_places(tmp_path: Path) -> None:
    out = np.zeros((3, LENGTH + 1), dtype=np.int64)
    CutSamples(store(tmp_path), sequence_length=LENGTH).read(numbers(1, 2), out, [2, 0])
    assert out[:, 0].tolist() == [8, 0, 4]


def test_announced_samples_are_read_as_others(tmp_path: Path) -> None:
    cut = CutSamples(store(tmp_path, num_shards=3), sequence_length=LENGTH)
    cut.announce(np.arange(cut.num_samples))
    assert rows(cut, numbers(9)) == [[36, 37, 38, 39, 40]]


# Documents.


def test_documents_are_told_apart_only_when_asked(tmp_path: Path) -> None:
    shard = shard_of(tmp_path, "a", [[1] * 6, [2] * 3, [3] * 20])
    corpus = corpus_of([shard])
    made = TokenStore(corpus, corpus.train)
    assert CutSamples(made, sequence_length=LENGTH).layout(numbers(0, 1)) is None
    cut = CutSamples(made, sequence_length=LENGTH, first=1, isolates_documents=True)
    layout = cut.layout(numbers(0, 1, 2))
    assert layout is not None
    assert layout.lengths is None
    assert layout.starts is not None
    # Samples begin at tokens 4, 8 and 12; documents at 6 and 9.
    assert layout.starts.tolist() == [[0, 2], [0, 1], [0, 5]]


@pytest.mark.parametrize("seed", range(5))
def test_layout_agrees_with_origins(tmp_path: Path, seed: int) -> None:
    shards = [shard_of(tmp_path, str(n), each) for n, each in enumerate(random_shards(seed))]
    corpus = corpus_of(shards)
    made = TokenStore(corpus, corpus.train)
    cut = CutSamples(made, sequence_length=LENGTH, isolates_documents=True)
    layout = cut.layout(np.arange(cut.num_samples))
    assert layout is not None and layout.starts is not None
    for sample, columns in enumerate(layout.starts.tolist()):
        lengths = [origin.num_tokens for origin in cut.origins(sample)]
        begins = np.cumsum([0, *lengths[:-1]]).tolist()
        assert [column for column in columns if column <= LENGTH] == begins
        assert sum(lengths) == cut.sample_tokens


def test_documents_that_no_file_tells_cannot_be_told_apart(tmp_path: Path) -> None:
    made = without_documents(tmp_path)
    assert CutSamples(made, sequence_length=LENGTH).layout(numbers(0)) is None
    with pytest.raises(DataError) as why:
        CutSamples(made, sequence_length=LENGTH, isolates_documents=True)
    assert str(why.value) == (
        "data.isolates_documents=true, but the files of the corpus do not say where documents "
        "begin; set it to false, or prepare the corpus from its text"
    )


def test_samples_that_touch_a_bad_shard_are_told(tmp_path: Path) -> None:
    shards = [shard_of(tmp_path, str(number), [range(10)]) for number in range(3)]
    corpus = corpus_of(shards)
    made = TokenStore(corpus, corpus.train, bad_shards=frozenset({shards[1].address}))
    cut = CutSamples(made, sequence_length=LENGTH, first=1)
    assert cut.num_samples == 6
    # Tokens 10 to 19 are bad; these samples begin at 4, 8, 12, 16, 20 and 24.
    assert cut.bad(np.arange(6)).tolist() == [False, True, True, True, False, False]
