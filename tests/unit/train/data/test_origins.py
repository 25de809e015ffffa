"""Where tokens come from: file, line and place, against the documents themselves."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest
from token_files import all_tokens, corpus_of, random_shards, shard_of

from train.data.origins import DocumentIndex, SampleOrigin
from train.data.shards import Corpus, DocumentsFile
from train.data.store import TokenStore
from train.errors import DataError

FILES = ("a.jsonl", "b.jsonl")


def store_of(corpus: Corpus) -> TokenStore:
    return TokenStore(corpus, corpus.train)


def corpus_in(folder: Path, seed: int, num_shards: int = 4) -> tuple[Corpus, list[list[int]]]:
    """Return a corpus, and its documents in order."""
    shards = random_shards(seed, num_shards=num_shards)
    made = [shard_of(folder, str(number), each) for number, each in enumerate(shards)]
    return corpus_of(made), [document for documents in shards for document in documents]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("num_shards", [1, 4])
def test_origins_lead_to_the_tokens_that_the_stretch_holds(
    tmp_path: Path, seed: int, num_shards: int
) -> None:
    corpus, documents = corpus_in(tmp_path, seed, num_shards)
    tokens = all_tokens([documents])
    source = random.Random(seed)
    store = store_of(corpus)
    for _ in range(20):
        start = source.randrange(len(tokens))
        stop = source.randrange(start + 1, len(tokens) + 1)
        origins = store.documents_within(start, stop)
        found: list[int] = []
        for origin in origins:
            first = origin.token_offset_in_document
            assert origin.num_tokens > 0
            found += documents[origin.document][first : first + origin.num_tokens]
        assert found == tokens[start:stop]


@pytest.mark.parametrize("seed", range(5))
def test_all_documents_are_there_in_order_with_file_and_line(tmp_path: Path, seed: int) -> None:
    shards = random_shards(seed)
    made = [shard_of(tmp_path, str(number), each) for number, each in enumerate(shards)]
    store = store_of(corpus_of(made))
    origins = store.documents_within(0, store.num_tokens)
    places = [(n % 2, n // 2 or None) for documents in shards for n in range(len(documents))]
    assert [(FILES.index(each.file), each.line) for each in origins] == places
    assert [each.document for each in origins] == list(range(len(places)))


def test_stretch_inside_one_document_has_one_origin_with_its_place(tmp_path: Path) -> None:
    store = store_of(corpus_of([shard_of(tmp_path, "a", [[1], [2], [3], [4], [5] * 100])]))
    assert store.documents_within(34, 43) == (
        SampleOrigin(file="a.jsonl", line=2, document=4, token_offset_in_document=30, num_tokens=9),
    )


def test_file_that_is_one_document_has_no_line(tmp_path: Path) -> None:
    store = store_of(corpus_of([shard_of(tmp_path, "a", [[1, 2, 3]])]))
    (origin,) = store.documents_within(0, 2)
    assert origin.line is None


def test_files_without_an_index_are_their_own_origins(tmp_path: Path) -> None:
    known = shard_of(tmp_path, "a", [[1, 2], [3, 4]])
    raw = [
        dataclasses.replace(shard_of(tmp_path, name, [range(5)]), documents=None) for name in "bc"
    ]
    store = store_of(corpus_of([known, *raw]))
    assert store.documents_within(3, 11) == (
        SampleOrigin(
            file="b.jsonl", line=None, document=1, token_offset_in_document=1, num_tokens=1
        ),
        SampleOrigin(
            file=raw[0].address, line=None, document=2, token_offset_in_document=0, num_tokens=5
        ),
        SampleOrigin(
            file=raw[1].address, line=None, document=3, token_offset_in_document=0, num_tokens=2
        ),
    )


# What it costs.


def test_index_is_opened_by_the_first_question_and_not_before(tmp_path: Path) -> None:
    shard = shard_of(tmp_path, "a", [[1, 2], [3, 4]])
    path = tmp_path / "a.documents.npy"
    path.rename(tmp_path / "hidden")
    store = store_of(corpus_of([shard]))
    store.read(np.array([0]), np.zeros((1, 3), dtype=np.uint16))
    (tmp_path / "hidden").rename(path)
    assert store.documents_within(0, 2)


def test_index_of_a_million_documents_is_searched_where_it_lies(tmp_path: Path) -> None:
    count = 1_000_000
    numbers = np.arange(count, dtype=np.int64)
    path = tmp_path / "documents.npy"
    np.save(path, np.stack([3 * numbers, numbers // 1000, numbers % 1000 + 1]))
    index = DocumentIndex.open(
        path,
        DocumentsFile(address=str(path), num_documents=count),
        shard="a.bin",
        num_tokens=3 * count,
        files=[f"{number}.jsonl" for number in range(1000)],
        repair="do something",
    )
    assert isinstance(index.first_tokens.base, np.ndarray)
    assert not index.first_tokens.flags.owndata
    assert index.within(2_000_000, 2_000_003, first_document=7) == [
        SampleOrigin(
            file="666.jsonl",
            line=667,
            document=666_673,
            token_offset_in_document=2,
            num_tokens=1,
        ),
        SampleOrigin(
            file="666.jsonl",
            line=668,
            document=666_674,
            token_offset_in_document=0,
            num_tokens=2,
        ),
    ]


# What is refused.


def damaged(folder: Path, content: bytes | np.ndarray | None) -> tuple[TokenStore, Path]:
    shard = shard_of(folder, "a", [[1, 2], [3, 4]])
    path = folder / "a.documents.npy"
    path.unlink()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content)
    return store_of(corpus_of([shard])), path


@pytest.mark.parametrize("content", [None, b"", b"no array"], ids=["missing", "empty", "torn"])
def test_damaged_index_is_refused_when_it_is_asked(tmp_path: Path, content: bytes | None) -> None:
    store, path = damaged(tmp_path, content)
    for ask in (
        lambda: store.documents_within(0, 2),
        lambda: store.document_starts(np.array([0]), 3),
    ):
        with pytest.raises(DataError, match=rf"{path} cannot be read \(.*\); bring the file back"):
            ask()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (np.zeros((3, 3), np.int64), r"holds int64 \[3, 3\], int64 \[3, 2\] was expected; bring"),
        (np.zeros(2, np.int64), r"holds int64 \[2\], int64 \[3, 2\] was expected"),
        (np.zeros((3, 2), np.int32), r"holds int32 \[3, 2\], int64 \[3, 2\] was expected"),
        (np.array([[0, 4]] * 3), "has documents from token 0 to 4 of a shard of 4; bring"),
        (np.array([[1, 2]] * 3), "has documents from token 1 to 2 of a shard of 4"),
        (np.array([[0, -1]] * 3), "has documents from token 0 to -1 of a shard of 4"),
    ],
)
def test_index_of_another_shard_is_refused(
    tmp_path: Path, columns: np.ndarray, message: str
) -> None:
    store, path = damaged(tmp_path, columns)
    with pytest.raises(DataError, match=f"{path} {message}"):
        store.documents_within(0, 2)


@pytest.mark.parametrize("number", [2, -1])
def test_file_that_the_corpus_does_not_have_is_refused(tmp_path: Path, number: int) -> None:
    store, path = damaged(tmp_path, np.array([[0, 2], [0, number], [1, 1]]))
    assert store.documents_within(0, 2)[0].file == "a.jsonl"
    with pytest.raises(DataError, match=f"{path} names input file {number} of a corpus of 2 files"):
        store.documents_within(0, 3)


def test_input_files_may_be_unknown_as_long_as_nobody_asks(tmp_path: Path) -> None:
    corpus = dataclasses.replace(corpus_of([shard_of(tmp_path, "a", [[1, 2]])]), files=())
    assert corpus == corpus_of(corpus.train.shards)
    store = store_of(corpus)
    assert store.document_starts(np.array([0]), 2).tolist() == [[0]]
    with pytest.raises(DataError, match="input file 0 of a corpus of 0 files"):
        store.documents_within(0, 1)
