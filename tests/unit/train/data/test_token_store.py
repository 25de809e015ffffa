"""The token store: tokens and documents by offset, over any shards, and what a damaged one says."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import resource
import threading
from pathlib import Path

import numpy as np
import pytest
from token_files import all_tokens, corpus_of, random_shards, shard_of

from train.data import mapped
from train.data.cache import ShardCache
from train.data.settings import Verify
from train.data.shards import Shard
from train.data.store import TokenStore, check_vocabulary
from train.errors import DataError


def store_of(*shards: Shard, dtype: str = "uint16", verify: Verify = Verify.SIZES) -> TokenStore:
    corpus = corpus_of(shards, dtype=dtype)
    return TokenStore(corpus, corpus.train, verify=verify)


def offsets_of(*offsets: int) -> np.ndarray:
    return np.array(offsets, dtype=np.int64)


def rows(store: TokenStore, offsets: np.ndarray, length: int) -> np.ndarray:
    out = np.zeros((len(offsets), length), dtype=store.dtype)
    store.read(offsets, out)
    return out


# Reading.


@pytest.mark.parametrize("seed", range(20))
def test_rows_are_stretches_of_the_shards_put_together(tmp_path: Path, seed: int) -> None:
    source = random.Random(seed)
    shards = random_shards(seed, num_shards=source.choice([1, 2, 7]))
    if len(shards) == 7:
        shards[3] = []
    dtype = source.choice(["uint16", "uint32", "int32", "uint8"])
    shards = [[[token % 256 for token in each] for each in documents] for documents in shards]
    tokens = all_tokens(shards)
    made = [shard_of(tmp_path, str(n), each, dtype) for n, each in enumerate(shards)]
    store = store_of(*made, dtype=dtype)
    assert store.num_tokens == len(tokens)
    assert store.dtype == np.dtype(dtype)
    for length in {1, min(2, len(tokens)), min(9, len(tokens)), len(tokens)}:
        offsets = [source.randrange(len(tokens) - length + 1) for _ in range(9)]
        expected = [tokens[offset : offset + length] for offset in offsets]
        assert rows(store, offsets_of(*offsets), length).tolist() == expected
        one_place = [offsets[0], offsets[0]]
        assert rows(store, offsets_of(*one_place), length).tolist() == [expected[0]] * 2


@pytest.mark.parametrize("num_shards", [1, 3])
def test_rows_go_to_their_places_and_leave_others_alone(tmp_path: Path, num_shards: int) -> None:
    made = [shard_of(tmp_path, str(n), [range(n * 10, n * 10 + 10)]) for n in range(num_shards)]
    for out in (np.full((4, 2), 7, np.uint16), np.full((4, 2), 7, np.int64)):
        last = num_shards * 10 - 2
        store_of(*made).read(offsets_of(0, last), out, [3, 1])
        assert out.tolist() == [[7, 7], [last, last + 1], [7, 7], [0, 1]]
        store_of(*made).read(offsets_of(last), out, np.array([0]))
        assert out[0].tolist() == [last, last + 1]


def test_no_rows_are_read_from_nowhere(tmp_path: Path) -> None:
    out = np.full((2, 3), 7, dtype=np.uint16)
    store = store_of(shard_of(tmp_path, "a", [[1, 2, 3]]))
    store.read(offsets_of(), out)
    store.announce(offsets_of(), 3)
    assert (out == 7).all()
    assert store.document_starts(offsets_of(), 3).shape == (0, 1)
    assert store.bad(offsets_of(), 3).shape == (0,)


@pytest.mark.parametrize("offset", [-1, 2, 2**40])
def test_tokens_that_are_not_there_are_never_made_up(tmp_path: Path, offset: int) -> None:
    store = store_of(shard_of(tmp_path, "a", [[1, 2, 3, 4]]))
    for call in (lambda at: rows(store, at, 3), lambda at: store.announce(at, 3)):
        with pytest.raises(IndexError, match=rf"tokens {offset} to {offset + 3} of 4"):
            call(offsets_of(offset))
    with pytest.raises(IndexError):
        store.document_starts(offsets_of(offset), 3)


def test_a_trillion_tokens_are_read_at_any_offset(tmp_path: Path) -> None:
    """Two sparse files of 500 G tokens; what is mapped costs no memory."""
    num_tokens = 500_000_000_000
    places = {0: 11, 2**32 - 1: 12, 2**32: 13, num_tokens - 1: 14}
    paths = [tmp_path / "a.bin", tmp_path / "b.bin"]
    for path in paths:
        with path.open("wb") as file:
            try:
                file.truncate(2 * num_tokens)
            except OSError:
                pytest.skip("this file system has no files of 1 TB")
            for place, token in places.items():
                file.seek(2 * place)
                file.write(token.to_bytes(2, "little"))
    store = store_of(
        *(
            Shard(address=str(path), num_tokens=num_tokens, num_bytes=2 * num_tokens)
            for path in paths
        )
    )
    before = anonymous_bytes()
    found = rows(store, offsets_of(2**32 - 1, num_tokens - 1, num_tokens + 2**32 - 1), 2)
    assert found.tolist() == [[12, 13], [14, 11], [12, 13]]
    assert rows(store, offsets_of(2 * num_tokens - 2), 2).tolist() == [[0, 14]]
    store.announce(offsets_of(2 * num_tokens - 2), 2)
    assert anonymous_bytes() - before < 2**24


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the kernel does not tell")


# Files.


def num_open(folder: Path) -> int:
    links = [Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd")]
    return sum(str(folder) in os.readlink(link) for link in links if link.is_symlink())


def test_shards_are_opened_when_they_are_read_and_closed_with_the_store(tmp_path: Path) -> None:
    store = store_of(*(shard_of(tmp_path, str(number), [range(10)]) for number in range(3)))
    assert num_open(tmp_path) == 0
    rows(store, offsets_of(12), 2)
    one = num_open(tmp_path)
    assert one > 0
    rows(store, offsets_of(9), 2)
    assert num_open(tmp_path) == 2 * one
    store.close()
    assert num_open(tmp_path) == 0
    assert rows(store, offsets_of(12), 2).tolist() == [[2, 3]]


def test_announced_is_exactly_what_will_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = [shard_of(tmp_path, str(number), [range(10)], "uint32") for number in range(4)]
    padded = tmp_path / "3.bin"
    padded.write_bytes(bytes(8) + padded.read_bytes())
    shards[3] = dataclasses.replace(shards[3], num_bytes=48, byte_offset=8)
    store = store_of(*shards, dtype="uint32")
    announced = []

    def note(descriptor: int, start: int, num_bytes: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        announced.append((name, start, num_bytes))

    monkeypatch.setattr(os, "posix_fadvise", note)
    store.announce(offsets_of(17, 0, 8, 35), 3)
    assert announced == [
        ("1.bin", 28, 12),
        ("0.bin", 0, 12),
        ("0.bin", 32, 8),
        ("1.bin", 0, 4),
        ("3.bin", 28, 12),
    ]
    announced.clear()
    store.announce(offsets_of(8), 25)
    assert announced == [
        ("0.bin", 32, 8),
        ("1.bin", 0, 40),
        ("2.bin", 0, 40),
        ("3.bin", 8, 12),
    ]
    assert rows(store, offsets_of(28), 4).tolist() == [[8, 9, 0, 1]]


def test_open_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "_max_open", lambda: 3)
    store = store_of(*(shard_of(tmp_path, str(number), [range(10)]) for number in range(20)))
    expected = [[at % 10, (at + 1) % 10, (at + 2) % 10] for at in range(0, 198, 2)]
    assert rows(store, np.arange(0, 198, 2), 3).tolist() == expected
    assert num_open(tmp_path) <= 6
    rows(store, offsets_of(0), 2)
    rows(store, offsets_of(11), 2)
    rows(store, offsets_of(2), 2)
    (tmp_path / "0.bin").unlink()
    rows(store, offsets_of(25), 2)
    rows(store, offsets_of(35), 2)  # shard 1 gives way: 0 was used after it
    assert rows(store, offsets_of(2), 2).tolist() == [[2, 3]]


def test_shards_give_way_when_there_are_no_descriptors_left(tmp_path: Path) -> None:
    store = store_of(*(shard_of(tmp_path, str(number), [range(10)]) for number in range(20)))
    hog = store_of(*(shard_of(tmp_path, f"h{number}", [range(10)]) for number in range(2)))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    rows(store, offsets_of(0), 2)
    free = max(int(name) for name in os.listdir("/proc/self/fd")) + 4
    spare: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        expected = [[at % 10, (at + 1) % 10, (at + 2) % 10] for at in range(0, 198, 2)]
        assert rows(store, np.arange(0, 198, 2), 3).tolist() == expected
        with contextlib.suppress(OSError):
            while True:
                spare.append(os.open(tmp_path, os.O_RDONLY))
        with pytest.raises(DataError, match=r"h0\.bin cannot be opened .*; raise `ulimit -n`, or"):
            rows(hog, offsets_of(0), 2)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in spare:
            os.close(descriptor)


def test_one_thread_announces_while_another_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped, "_max_open", lambda: 2)
    store = store_of(*(shard_of(tmp_path, str(number), [range(100)]) for number in range(8)))
    stop = threading.Event()

    def announce() -> None:
        source = np.random.default_rng(1)
        while not stop.is_set():
            store.announce(source.integers(0, 790, 16), 10)

    thread = threading.Thread(target=announce)
    thread.start()
    source = np.random.default_rng(2)
    for _ in range(300):
        offsets = source.integers(0, 790, 16)
        expected = (offsets[:, None] + np.arange(10)) % 100
        assert np.array_equal(rows(store, offsets, 10), expected)
    stop.set()
    thread.join()  # what it raises, pytest makes an error


# Documents.


@pytest.mark.parametrize("seed", range(20))
def test_document_starts_are_those_of_the_documents(tmp_path: Path, seed: int) -> None:
    source = random.Random(seed)
    shards = random_shards(seed, num_shards=source.choice([1, 2, 5]))
    store = store_of(*(shard_of(tmp_path, str(n), each) for n, each in enumerate(shards)))
    lengths = [len(document) for documents in shards for document in documents]
    begins = {0, *np.cumsum(lengths).tolist()}
    for length in {1, min(2, store.num_tokens), min(7, store.num_tokens), store.num_tokens}:
        offsets = [source.randrange(store.num_tokens - length + 1) for _ in range(9)]
        starts = store.document_starts(offsets_of(*offsets), length)
        assert starts.dtype == np.int32
        expected = [
            [0, *(at for at in range(1, length) if offset + at in begins)] for offset in offsets
        ]
        width = max(len(columns) for columns in expected)
        padded = [columns + [length] * (width - len(columns)) for columns in expected]
        assert starts.tolist() == padded


def test_documents_are_found_without_reading_a_token(tmp_path: Path) -> None:
    shards = [shard_of(tmp_path, str(number), [[1, 2, 3], [4, 5]]) for number in range(2)]
    for shard in shards:
        Path(shard.address).unlink()
    store = store_of(*shards)
    assert store.has_documents
    assert store.document_starts(offsets_of(1, 4), 5).tolist() == [[0, 2, 4], [0, 1, 4]]


def test_store_knows_whether_every_shard_says_its_documents(tmp_path: Path) -> None:
    known = shard_of(tmp_path, "a", [[1, 2, 3]])
    unknown = dataclasses.replace(shard_of(tmp_path, "b", [[1]]), documents=None)
    assert store_of(known).has_documents
    assert not store_of(known, unknown).has_documents
    assert not store_of().has_documents


# What is wrong with a shard.


def test_missing_shard_is_refused_when_it_is_read_and_not_before(tmp_path: Path) -> None:
    shards = [shard_of(tmp_path, str(number), [range(10)]) for number in range(2)]
    Path(shards[1].address).unlink()
    store = store_of(*shards)
    assert rows(store, offsets_of(3), 2).tolist() == [[3, 4]]
    for call in (lambda: rows(store, offsets_of(9), 2), lambda: store.announce(offsets_of(11), 2)):
        with pytest.raises(DataError) as why:
            call()
        assert str(why.value) == (
            f"{tmp_path}/1.bin is missing; bring the file back whole, or set data.on_bad_shard=skip"
        )


def test_prepared_corpus_can_be_prepared_again(tmp_path: Path) -> None:
    shard = shard_of(tmp_path, "a", [[1, 2, 3]])
    corpus = dataclasses.replace(
        corpus_of([shard]), address=str(tmp_path), tokenizer_fingerprint="f"
    )
    Path(shard.address).unlink()
    with pytest.raises(DataError, match=f"or delete {tmp_path} and prepare the corpus again, or"):
        rows(TokenStore(corpus, corpus.train), offsets_of(0), 2)


def test_shard_that_may_not_be_read_is_refused(tmp_path: Path) -> None:
    shard = shard_of(tmp_path, "a", [[1, 2, 3]])
    folder = dataclasses.replace(shard, address=f"{shard.address}/b")
    with pytest.raises(DataError, match=r"a\.bin/b cannot be opened \(Not a directory\); bring"):
        rows(store_of(folder), offsets_of(0), 2)


@pytest.mark.parametrize("num_bytes", [0, 5, 18, 22])
def test_shard_of_another_size_is_refused(tmp_path: Path, num_bytes: int) -> None:
    shard = shard_of(tmp_path, "a", [range(10)])
    os.truncate(shard.address, num_bytes)
    with pytest.raises(DataError, match=f"a.bin has {num_bytes} bytes, 20 were expected; bring"):
        rows(store_of(shard), offsets_of(0), 2)
    assert num_open(tmp_path) == 0


def test_other_tokens_of_the_same_size_are_refused_with_digests_alone(tmp_path: Path) -> None:
    shard = shard_of(tmp_path, "a", [range(10)])
    np.full(10, 3, dtype=np.uint16).tofile(shard.address)
    assert rows(store_of(shard), offsets_of(0), 2).tolist() == [[3, 3]]
    with pytest.raises(DataError, match=f"has the digest [0-9a-f]{{64}}, {shard.sha256} was exp"):
        rows(store_of(shard, verify=Verify.DIGESTS), offsets_of(0), 2)
    assert num_open(tmp_path) == 0


def test_other_documents_of_the_same_size_are_found_with_digests_alone(tmp_path: Path) -> None:
    shard = shard_of(tmp_path, "a", [range(10)])
    assert shard.documents is not None
    index = Path(shard.documents.address)
    content = index.read_bytes()
    index.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert store_of(shard).problems() == {}
    problems = store_of(shard, verify=Verify.DIGESTS).problems()
    assert problems[0].startswith(f"{index} has the digest ")


def test_check_names_each_shard_with_a_problem_and_says_which(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shards = [shard_of(tmp_path, name, [range(10)]) for name in "abcde"]
    good, gone, short, other, index = (shard.address for shard in shards)
    Path(gone).unlink()
    os.truncate(short, 8)
    np.zeros(10, dtype=np.uint16).tofile(other)
    (tmp_path / "e.documents.npy").write_bytes(b"")
    assert good not in store_of(*shards).check()
    assert store_of(*shards).check() == [gone, short, index]
    caplog.clear()
    problems = store_of(*shards, verify=Verify.DIGESTS).problems()
    assert list(problems) == [1, 2, 3, 4]
    assert problems[1].startswith(f"{gone} is missing; bring the file back whole")
    assert "has 8 bytes, 20 were expected" in problems[2]
    assert "has the digest" in problems[3]
    assert f"{tmp_path}/e.documents.npy has 0 bytes" in problems[4]
    assert len(caplog.records) == 4


def test_digests_are_compared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = shard_of(tmp_path, "a", [range(10)])
    store = store_of(shard, verify=Verify.DIGESTS)
    assert store.check() == []
    monkeypatch.setattr(mapped, "digest_problem", lambda *_: pytest.fail("compared again"))
    assert rows(store, offsets_of(0), 2).tolist() == [[0, 1]]


def test_rows_that_touch_a_bad_shard_are_told(tmp_path: Path) -> None:
    shards = [shard_of(tmp_path, str(number), [range(4)]) for number in range(4)]
    corpus = corpus_of(shards)
    store = TokenStore(corpus, corpus.train, bad_shards=frozenset({shards[1].address, "other"}))
    is_bad = store.bad(np.arange(14, dtype=np.int64), 3)
    assert np.flatnonzero(is_bad).tolist() == [2, 3, 4, 5, 6, 7]
    assert store.bad(offsets_of(0, 8), 5).tolist() == [True, False]
    last = TokenStore(corpus, corpus.train, bad_shards=frozenset({shards[3].address}))
    assert np.flatnonzero(last.bad(np.arange(14, dtype=np.int64), 3)).tolist() == [10, 11, 12, 13]
    assert not store_of(*shards).bad(np.arange(14, dtype=np.int64), 3).any()


# The vocabulary.


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int32, np.int64])
def test_tokens_of_the_vocabulary_pass_and_others_are_named(dtype: type[np.integer]) -> None:
    tokens = np.zeros((3, 5), dtype=dtype)
    tokens[2, 4] = 999
    check_vocabulary(tokens, 1000, "the batch")
    check_vocabulary(tokens[:0], 1, "nothing")
    with pytest.raises(DataError) as why:
        check_vocabulary(tokens, 999, "the batch at cursor 7")
    assert str(why.value) == (
        "token 999 at column 4 of the batch at cursor 7 is not in the vocabulary, which has 999: "
        "the corpus was tokenised with another tokenizer, or is damaged; set model.vocab_size to "
        "that tokenizer's, or run with data.verify=digests"
    )


def test_bad_token_is_named_with_what_its_row_is() -> None:
    tokens = np.zeros((3, 5), dtype=np.uint16)
    tokens[1, 2] = 70
    with pytest.raises(DataError, match="token 70 at column 2 of sample 41 of source a is not in"):
        check_vocabulary(tokens, 50, lambda row: f"sample {row + 40} of source a")


def test_negative_tokens_are_damage() -> None:
    tokens = np.zeros((1, 5), dtype=np.int32)
    tokens[0, 3] = -1
    with pytest.raises(DataError, match="token -1 at column 3 of x is not in the vocabulary"):
        check_vocabulary(tokens, 2**31, "x")


# Shards that are far away.


def remote(shard: Shard, name: str) -> Shard:
    import fsspec

    address = f"memory://corpus/{name}"
    with fsspec.open(address, "wb") as file:
        file.write(Path(shard.address).read_bytes())
    return dataclasses.replace(shard, address=address)


def test_remote_shards_are_fetched_when_they_are_read(tmp_path: Path) -> None:
    shards = [remote(shard_of(tmp_path, str(n), [range(n, n + 10)]), f"{n}") for n in range(3)]
    corpus = corpus_of(shards)
    cache = ShardCache(tmp_path / "cache", max_bytes=10_000)
    store = TokenStore(corpus, corpus.train, cache=cache)
    assert store.check() == []
    assert not (tmp_path / "cache").exists()
    assert rows(store, offsets_of(0, 9), 2).tolist() == [[0, 1], [9, 1]]
    copies = [path for path in (tmp_path / "cache").iterdir() if path.is_file()]
    assert sorted(path.read_bytes()[0] for path in copies) == [0, 1]


def test_announced_remote_shard_is_there_without_the_source(tmp_path: Path) -> None:
    import fsspec

    shards = [remote(shard_of(tmp_path, str(n), [range(n, n + 10)]), f"{n}") for n in range(2)]
    corpus = corpus_of(shards)
    cache = ShardCache(tmp_path / "cache", max_bytes=10_000)
    store = TokenStore(corpus, corpus.train, cache=cache)
    store.announce(offsets_of(12), 3)
    store.announce(offsets_of(12), 3)
    for _ in range(500):
        if any(path.is_file() and path.suffix != ".tmp" for path in cache.folder.glob("*-1")):
            break
        threading.Event().wait(0.01)
    fsspec.filesystem("memory").rm("/corpus/1")
    assert rows(store, offsets_of(12), 3).tolist() == [[3, 4, 5]]


def test_corpus_larger_than_the_cache_is_read_shard_after_shard(tmp_path: Path) -> None:
    shards = [remote(shard_of(tmp_path, str(n), [range(n, n + 10)]), f"{n}") for n in range(8)]
    corpus = corpus_of(shards)
    cache = ShardCache(tmp_path / "cache", max_bytes=65)  # three shards of 20 bytes
    store = TokenStore(corpus, corpus.train, cache=cache)
    source = np.random.default_rng(0)
    tokens = np.concatenate([np.arange(n, n + 10) for n in range(8)])
    for _ in range(10):
        offsets = source.integers(0, 68, 4)
        expected = tokens[offsets[:, None] + np.arange(12)]
        assert np.array_equal(rows(store, offsets, 12), expected)
        files = [path for path in cache.folder.iterdir() if path.is_file()]
        assert sum(path.stat().st_size for path in files) <= 65


def test_copy_that_was_damaged_is_removed(tmp_path: Path) -> None:
    shard = remote(shard_of(tmp_path, "a", [range(10)]), "a")
    corpus = corpus_of([shard])
    cache = ShardCache(tmp_path / "cache", max_bytes=10_000)
    copy = cache.path(shard.address, shard.num_bytes, shard.sha256)
    os.truncate(copy, 8)
    store = TokenStore(corpus, corpus.train, cache=cache, verify=Verify.DIGESTS)
    assert rows(store, offsets_of(0), 2).tolist() == [[0, 1]]
    store.close()
    copy.write_bytes(bytes(20))
    with pytest.raises(DataError, match=f"digest .* its copy {copy} was removed: start again"):
        rows(store, offsets_of(0), 2)
    assert rows(store, offsets_of(0), 2).tolist() == [[0, 1]]


def test_missing_remote_shard_is_a_problem(tmp_path: Path) -> None:
    shard = shard_of(tmp_path, "a", [range(10)])
    corpus = corpus_of([dataclasses.replace(shard, address="memory://corpus/none")])
    cache = ShardCache(tmp_path / "cache", max_bytes=10_000)
    store = TokenStore(corpus, corpus.train, cache=cache)
    assert "memory://corpus/none is missing" in store.problems()[0]
    with pytest.raises(DataError, match="memory://corpus/none is missing; bring it back"):
        rows(store, offsets_of(0), 2)
