"""Which tokens a path means, in each format, and what is said of damaged ones."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from token_files import (
    all_tokens,
    random_shards,
    write_llm_c,
    write_megatron,
    write_prepared,
)

from train.data.cache import ShardCache
from train.data.formats import is_tokens, open_corpus
from train.data.shards import Corpus, Split
from train.data.store import TokenStore
from train.errors import DataError

TOKENIZER = '{"model": "a small one"}'


def opened(path: Path | str, dtype: str | None = None) -> Corpus:
    return open_corpus(str(path), dtype=dtype, cache=None)


def tokens_of(
    corpus: Corpus, split: Split | None = None, cache: ShardCache | None = None
) -> list[int]:
    store = TokenStore(corpus, split or corpus.train, cache=cache)
    out = np.zeros((1, store.num_tokens), dtype=store.dtype)
    store.read(np.array([0]), out)
    found: list[int] = out[0].tolist()
    return found


def starts_of(corpus: Corpus) -> list[int]:
    store = TokenStore(corpus, corpus.train)
    found: list[int] = store.document_starts(np.array([0]), store.num_tokens)[0].tolist()
    return found


# Prepared folders.


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_prepared_folder_is_what_was_written(tmp_path: Path, dtype: str) -> None:
    train, validation = random_shards(1), random_shards(2, num_shards=1)
    manifest = write_prepared(tmp_path / "c", train, validation, dtype=dtype, tokenizer=TOKENIZER)
    assert is_tokens(str(tmp_path / "c"))
    corpus = opened(tmp_path / "c", dtype)
    assert corpus.is_prepared
    assert corpus.address == str(tmp_path / "c")
    assert corpus.digest == manifest["digest"]
    assert corpus.dtype == dtype
    assert (corpus.vocab_size, corpus.separator_id) == (1000, 999)
    assert corpus.tokenizer_path == tmp_path / "c" / "tokenizer.json"
    assert corpus.tokenizer_fingerprint == hashlib.sha256(TOKENIZER.encode()).hexdigest()
    assert corpus.files == ("a.jsonl", "b.jsonl")
    assert tokens_of(corpus) == all_tokens(train)
    assert corpus.validation is not None
    assert tokens_of(corpus, corpus.validation) == all_tokens(validation)
    assert corpus.train.num_documents == sum(len(documents) for documents in train)
    assert TokenStore(corpus, corpus.train).check() == []


def test_prepared_folder_of_bytes_without_validation(tmp_path: Path) -> None:
    write_prepared(tmp_path / "c", random_shards(1))
    corpus = opened(tmp_path / "c")
    assert corpus.tokenizer_path is None
    assert corpus.validation is None


def test_moved_folder_is_the_same_corpus(tmp_path: Path) -> None:
    write_prepared(tmp_path / "c", random_shards(1))
    first = opened(tmp_path / "c")
    (tmp_path / "c").rename(tmp_path / "d")
    assert opened(tmp_path / "d").digest == first.digest
    assert tokens_of(opened(f"{tmp_path}/d/")) == all_tokens(random_shards(1))


def test_home_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_prepared(tmp_path / "c", random_shards(1))
    np.arange(9, dtype=np.uint16).tofile(tmp_path / "a.bin")
    assert is_tokens("~/c")
    assert opened("~/c").address == str(tmp_path / "c")
    assert tokens_of(opened("~/a.bin")) == list(range(9))


def test_text_is_no_tokens(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "manifest.json").write_text('{"name": "an extension of a browser"}')
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "manifest.json").write_text("{// of something else")
    for path in (tmp_path, tmp_path / "a.txt", tmp_path / "none", tmp_path / "list"):
        assert not is_tokens(str(path))
    assert not is_tokens("memory://nowhere/text.jsonl")
    assert not is_tokens("memory://nowhere/folder")
    assert not is_tokens("memory://nowhere/*")


def test_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"manifest\.json is missing: .* is no prepared corpus, or"):
        opened(tmp_path)


def change(*keys: str | int, to: object) -> Callable[[dict[str, Any]], None]:
    def apply(manifest: dict[str, Any]) -> None:
        place: Any = manifest
        for key in keys[:-1]:
            place = place[key]
        if to is None:
            del place[keys[-1]]
        else:
            place[keys[-1]] = to

    return apply


SHARD = ("splits", "train", "shards", 1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change("format", to="other"), "format is 'other', 'trimtab-corpus' was expected"),
        (change("version", to=2), "version is 2, this Trimtab reads 1"),
        (change("version", to="1"), "version is '1', a whole number was expected"),
        (change("dtype", to="int64"), "dtype is 'int64', one of uint16, uint32 was expected"),
        (change("vocab_size", to=65537), "vocab_size is 65537, which uint16 tokens do not hold"),
        (change("vocab_size", to=-1), "vocab_size is -1, a count was expected"),
        (change("digest", to=None), "digest is missing"),
        (change("digest", to="abc"), "digest is 'abc', 64 hex digits were expected"),
        (change("files", to={}), r"files is {}, a list was expected"),
        (change("splits", to=[]), r"splits is \[\], an object was expected"),
        (change("splits", "train", to=None), r"splits\.train is missing"),
        (change("splits", "train", "shards", 0, to=7), r"train\.shards\[0\] is int, an object was"),
        (change(*SHARD, "file", to="../a"), r"splits\.train\.file is '\.\./a', a plain file name"),
        (change(*SHARD, "num_tokens", to=True), r"train-00001\.bin\.num_tokens is True, a whole"),
        (change(*SHARD, "num_bytes", to=3), r"train-00001\.bin\.num_bytes is 3, \d+ tokens are"),
        (change(*SHARD, "sha256", to=None), r"train-00001\.bin\.sha256 is missing"),
        (
            change("splits", "train", "num_tokens", to=3),
            r"num_tokens is 3, its shards have \d+ tog",
        ),
        (change("splits", "train", "num_documents", to=0), "num_documents is 0, its shards have"),
        (change("tokenizer", "separator_id", to=1000), "separator_id is 1000, vocab_size 1000"),
        (change("tokenizer", "kind", to=None), r"kind is missing"),
    ],
)
def test_manifest_that_contradicts_itself_is_refused(
    tmp_path: Path, damage: Callable[[dict[str, Any]], None], message: str
) -> None:
    manifest = write_prepared(tmp_path, random_shards(1))
    damage(manifest)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=rf"manifest\.json is damaged \(.*{message}") as why:
        opened(tmp_path)
    assert str(why.value).endswith(f"delete {tmp_path} and prepare the corpus again")


@pytest.mark.parametrize("content", [b"", b'{"format": "trimtab-corpus"', b"\xff\xfe", b"[1]"])
def test_torn_manifest_is_refused(tmp_path: Path, content: bytes) -> None:
    write_prepared(tmp_path, random_shards(1))
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(DataError, match=r"manifest\.json is damaged \(.* delete .* prepare"):
        opened(tmp_path)
    assert is_tokens(str(tmp_path)) is (b"trimtab" in content)


def test_manifest_that_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(DataError, match=r"manifest\.json cannot be read \(Is a directory\)"):
        opened(tmp_path)


def test_prepared_folder_keeps_its_dtype(tmp_path: Path) -> None:
    write_prepared(tmp_path, random_shards(1))
    with pytest.raises(DataError, match=r"are uint16, data\.token_dtype=uint32; leave data\.token"):
        opened(tmp_path, "uint32")


def test_missing_tokenizer_is_refused(tmp_path: Path) -> None:
    write_prepared(tmp_path, random_shards(1), tokenizer=TOKENIZER)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer\.json is missing; bring it back, or delete"):
        opened(tmp_path)


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    write_prepared(tmp_path, random_shards(1), tokenizer=TOKENIZER)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(
        DataError, match=r"tokenizer\.json has the digest \w+, the tokens were made"
    ):
        opened(tmp_path)


# Prepared folders that are far away.


def test_remote_folder_is_the_same_as_the_local_one(tmp_path: Path) -> None:
    shards = random_shards(1)
    write_prepared(tmp_path / "c", shards, random_shards(2), tokenizer=TOKENIZER)
    fsspec.filesystem("memory").put(str(tmp_path / "c"), "/far", recursive=True)
    address = "memory://far"
    cache = ShardCache(tmp_path / "cache", max_bytes=10**6)
    assert is_tokens(address)
    assert is_tokens(f"{address}/")
    local, remote = opened(tmp_path / "c"), open_corpus(address, dtype=None, cache=cache)
    assert remote.digest == local.digest
    assert remote.tokenizer_path is not None
    assert remote.tokenizer_path.read_text() == TOKENIZER
    copies = [path.name for path in cache.folder.iterdir() if path.is_file()]
    assert [name.partition("-")[2] for name in copies] == ["tokenizer.json"]
    shutil.rmtree(tmp_path / "c")
    assert tokens_of(remote, cache=cache) == all_tokens(shards)
    store = TokenStore(remote, remote.train, cache=cache)
    lengths = [len(document) for documents in shards for document in documents]
    starts = store.document_starts(np.array([0]), store.num_tokens)
    assert starts[0].tolist() == np.cumsum([0, *lengths[:-1]]).tolist()
    fsspec.filesystem("memory").rm("/far", recursive=True)


def test_remote_corpus_needs_a_place_for_its_files() -> None:
    with pytest.raises(DataError, match=r"memory://far is remote; set data\.cache_dir"):
        open_corpus("memory://far", dtype=None, cache=None)


def test_unknown_protocol_is_refused_with_what_to_install() -> None:
    with pytest.raises(DataError, match=r"nowhere://a/b\.bin cannot be opened .*; install fsspec"):
        open_corpus("nowhere://a/b.bin", dtype=None, cache=ShardCache(Path("x"), max_bytes=1))


def test_remote_token_files_are_read(tmp_path: Path) -> None:
    write_megatron(tmp_path / "m", [[[1, 2]], [[3], [4, 5]]])
    np.arange(9, dtype=np.uint16).tofile(tmp_path / "a.bin")
    np.arange(9, 12, dtype=np.uint16).tofile(tmp_path / "b.bin")
    for name in ("m.bin", "m.idx"):
        fsspec.filesystem("memory").put(str(tmp_path / name), f"/mega/{name}")
    for name in ("a.bin", "b.bin"):
        fsspec.filesystem("memory").put(str(tmp_path / name), f"/raw/{name}")
    cache = ShardCache(tmp_path / "cache", max_bytes=10**6)
    raw = open_corpus("memory://raw/*.bin", dtype=None, cache=cache)
    assert tokens_of(raw, cache=cache) == list(range(12))
    local = open_corpus([str(tmp_path / "a.bin"), str(tmp_path / "b.bin")], dtype=None, cache=None)
    assert raw.digest == local.digest
    mega = open_corpus("memory://mega/m.idx", dtype=None, cache=cache)
    assert tokens_of(mega, cache=cache) == [1, 2, 3, 4, 5]
    store = TokenStore(mega, mega.train, cache=cache)
    assert store.document_starts(np.array([0]), 5).tolist() == [[0, 2]]


# Raw files.


@pytest.mark.parametrize("dtype", [None, "uint16", "uint32", "uint8", "int64"])
def test_raw_file_holds_tokens_and_nothing_else(tmp_path: Path, dtype: str | None) -> None:
    np.arange(100, dtype=dtype or "uint16").tofile(tmp_path / "train.bin")
    assert is_tokens(str(tmp_path / "train.bin"))
    corpus = opened(tmp_path / "train.bin", dtype)
    assert corpus.dtype == (dtype or "uint16")
    assert tokens_of(corpus) == list(range(100))
    assert (corpus.vocab_size, corpus.validation, corpus.train.num_documents) == (None, None, None)
    assert not corpus.is_prepared
    assert not TokenStore(corpus, corpus.train).has_documents


@pytest.mark.parametrize("highest", [1_000, 1_000_000])
def test_raw_file_of_32_bits_is_not_read_as_one_of_16(tmp_path: Path, highest: int) -> None:
    tokens = np.random.default_rng(0).integers(0, highest, 500, dtype=np.uint32)
    tokens.tofile(tmp_path / "a.bin")
    with pytest.raises(DataError, match=r"a\.bin seems to hold 32-bit .*data\.token_dtype=uint32"):
        opened(tmp_path / "a.bin")
    assert tokens_of(opened(tmp_path / "a.bin", "uint32")) == tokens.tolist()
    assert opened(tmp_path / "a.bin", "uint16").train.num_tokens == 1_000


@pytest.mark.parametrize("tokens", [[0] * 1_000, [1, 0] * 500, [300, 17] * 500, [900, 0] * 20])
def test_raw_file_of_few_or_small_numbers_is_read(tmp_path: Path, tokens: list[int]) -> None:
    np.array(tokens, dtype=np.uint16).tofile(tmp_path / "a.bin")
    assert tokens_of(opened(tmp_path / "a.bin")) == tokens


def test_glob_and_list_of_files_are_the_shards_of_one_corpus(tmp_path: Path) -> None:
    for number in range(3):
        np.arange(number * 10, number * 10 + 10, dtype=np.uint16).tofile(tmp_path / f"{number}.bin")
    (tmp_path / "sub").mkdir()
    by_glob = opened(tmp_path / "*.bin")
    names = [str(tmp_path / f"{number}.bin") for number in (2, 0, 1)]
    by_list = open_corpus([*names, str(tmp_path / "*.bin")], dtype=None, cache=None)
    assert tokens_of(by_glob) == tokens_of(by_list) == list(range(30))
    assert by_glob.digest == by_list.digest
    assert is_tokens(str(tmp_path / "*.bin"))


def test_prepared_folder_among_others_is_refused(tmp_path: Path) -> None:
    write_prepared(tmp_path / "c", random_shards(1))
    np.arange(9, dtype=np.uint16).tofile(tmp_path / "a.bin")
    paths = [str(tmp_path / "a.bin"), str(tmp_path / "c")]
    with pytest.raises(
        DataError, match=r"/c is a corpus of its own, one of 2 paths; .*data\.sourc"
    ):
        open_corpus(paths, dtype=None, cache=None)


@pytest.mark.parametrize(
    ("num_bytes", "what"), [(0, "is empty"), (199, "has 199 bytes, which is no whole number")]
)
def test_raw_file_of_half_a_token_is_refused(tmp_path: Path, num_bytes: int, what: str) -> None:
    (tmp_path / "a.bin").write_bytes(b"x" * num_bytes)
    with pytest.raises(DataError, match=f"a.bin {what}"):
        opened(tmp_path / "a.bin")


@pytest.mark.parametrize("path", ["none.bin", "none.npy", "none.idx"])
def test_missing_file_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(DataError, match=r"data\.paths: .*none\.\w+ cannot be found"):
        opened(tmp_path / path)


def test_glob_that_finds_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.paths: .*\*\.bin cannot be found; check the glob"):
        opened(tmp_path / "*.bin")


def test_unknown_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.token_dtype=float32 is none of uint8, uint16, ui"):
        opened(tmp_path / "a.bin", "float32")


@pytest.mark.parametrize("place", [0, 40_000, 99_999])
def test_digest_changes_with_ends_size_name_and_dtype(tmp_path: Path, place: int) -> None:
    tokens = np.zeros(100_000, dtype=np.uint16)
    tokens.tofile(tmp_path / "a.bin")
    first = opened(tmp_path / "a.bin").digest
    assert opened(tmp_path / "a.bin", "uint32").digest != first
    (tmp_path / "a.bin").rename(tmp_path / "b.bin")
    assert opened(tmp_path / "b.bin").digest != first
    tokens[place] = 1
    tokens.tofile(tmp_path / "a.bin")
    is_at_an_end = place != 40_000
    assert (opened(tmp_path / "a.bin").digest != first) is is_at_an_end
    tokens[:-1].tofile(tmp_path / "a.bin")
    assert opened(tmp_path / "a.bin").digest != first


# llm.c.


@pytest.mark.parametrize(
    ("magic", "dtype", "large"), [(20240520, "uint16", 60_000), (20240801, "uint32", 120_000)]
)
def test_llm_c_file_says_its_dtype(tmp_path: Path, magic: int, dtype: str, large: int) -> None:
    write_llm_c(tmp_path / "a.bin", [*range(1000), large], magic=magic)
    corpus = opened(tmp_path / "a.bin")
    assert corpus.dtype == dtype
    assert tokens_of(corpus) == [*range(1000), large]
    assert opened(tmp_path / "a.bin", dtype) == corpus


def test_llm_c_file_of_another_dtype_is_refused(tmp_path: Path) -> None:
    write_llm_c(tmp_path / "a.bin", range(1000))
    with pytest.raises(DataError, match=r"its tokens are uint16, data\.token_dtype=uint32; leave"):
        opened(tmp_path / "a.bin", "uint32")


def test_llm_c_file_of_another_version_is_refused(tmp_path: Path) -> None:
    write_llm_c(tmp_path / "a.bin", range(1000))
    content = bytearray((tmp_path / "a.bin").read_bytes())
    content[4] = 3
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(DataError, match=r"has version 3 of llm\.c's format 20240520, 1 was expe"):
        opened(tmp_path / "a.bin")


@pytest.mark.parametrize("num_bytes", [1024, 3022, 3026])
def test_truncated_llm_c_file_is_refused(tmp_path: Path, num_bytes: int) -> None:
    write_llm_c(tmp_path / "a.bin", range(1000))
    content = (tmp_path / "a.bin").read_bytes() + b"xx"
    (tmp_path / "a.bin").write_bytes(content[:num_bytes])
    with pytest.raises(DataError, match=f"has {num_bytes:,} bytes, its header speaks of 1,000 uin"):
        opened(tmp_path / "a.bin")


# numpy.


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int32", "int64"])
def test_npy_file_says_its_dtype(tmp_path: Path, dtype: str) -> None:
    np.save(tmp_path / "a.npy", np.arange(200).astype(dtype))
    corpus = opened(tmp_path / "a.npy")
    assert corpus.dtype == dtype
    assert tokens_of(corpus) == list(range(200))


def test_npy_file_of_the_second_version_is_read(tmp_path: Path) -> None:
    with (tmp_path / "a.npy").open("wb") as file:
        np.lib.format.write_array(file, np.arange(50, dtype=np.uint16), version=(2, 0))
    assert tokens_of(opened(tmp_path / "a.npy")) == list(range(50))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(5, np.float32), "holds float32, tokens of one of uint8, uint16"),
        (np.zeros(5, ">u2"), "holds big-endian uint16, tokens of one of"),
        (np.zeros(5, np.bool_), "holds bool, tokens of one of"),
        (np.zeros((5, 2), np.uint16), r"has the shape \[5, 2\], a row of tokens was expected"),
        (np.zeros(0, np.uint16), r"has the shape \[0\], a row of tokens was expected"),
    ],
)
def test_npy_file_of_anything_else_is_refused(
    tmp_path: Path, array: np.ndarray, message: str
) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(DataError, match=message):
        opened(tmp_path / "a.npy")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no .npy file: it begins with b''"),
        (b"no array at all", "is no .npy file: it begins with b'no arr'"),
        (b"\x93NUMPY\x01\x00\x76\x00{'descr': '<u", "is damaged: its head cannot be read"),
        (b"\x93NUMPY\x01\x00\x02\x00[]", "is damaged: its head cannot be read"),
    ],
)
def test_torn_npy_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(DataError, match=message):
        opened(tmp_path / "a.npy")


def test_truncated_npy_file_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(50, dtype=np.uint16))
    content = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(content[:-1])
    with pytest.raises(DataError, match=r"has 227 bytes, its head speaks of 50 uint16 tokens, whi"):
        opened(tmp_path / "a.npy")


def test_files_of_two_kinds_are_no_corpus(tmp_path: Path) -> None:
    np.arange(50, dtype=np.uint16).tofile(tmp_path / "a.bin")
    write_llm_c(tmp_path / "b.bin", range(50))
    with pytest.raises(
        DataError, match=r"b\.bin holds uint16 tokens in llm\.c format, .*a\.bin uin"
    ):
        opened(tmp_path / "*.bin")


# Megatron.


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
@pytest.mark.parametrize("name", ["text_document", "text_document.bin", "text_document.idx"])
def test_megatron_files_are_read_with_their_documents(
    tmp_path: Path, dtype: str, name: str
) -> None:
    documents = [[[1, 2, 3]], [[4], [5, 6]], [[7]], [[8, 9], [10], [11]]]
    write_megatron(tmp_path / "text_document", documents, dtype)
    assert is_tokens(str(tmp_path / name))
    corpus = opened(tmp_path / name)
    assert corpus.dtype == dtype
    assert tokens_of(corpus) == list(range(1, 12))
    assert corpus.train.num_documents == 4
    assert starts_of(corpus) == [0, 3, 6, 7]
    assert opened(tmp_path / name, dtype) == corpus


def test_several_megatron_files_are_one_corpus(tmp_path: Path) -> None:
    for number in range(3):
        write_megatron(tmp_path / f"{number}", [[[number] * 3], [[9]]])
    corpus = opened(tmp_path / "*.bin")
    assert tokens_of(corpus) == [0, 0, 0, 9, 1, 1, 1, 9, 2, 2, 2, 9]
    assert starts_of(corpus) == [0, 3, 4, 7, 8, 11]
    assert opened(tmp_path / "*.idx").digest == corpus.digest


def test_documents_of_megatron_without_tokens_begin_nothing(tmp_path: Path) -> None:
    write_megatron(tmp_path / "a", [[], [[1, 2]], [], [[]], [[3]], []])
    corpus = opened(tmp_path / "a.bin")
    assert starts_of(corpus) == [0, 2]
    origins = TokenStore(corpus, corpus.train).documents_within(0, 3)
    assert [(origin.document, origin.num_tokens) for origin in origins] == [(1, 2), (4, 1)]


def rewritten(path: Path, start: int, content: bytes) -> None:
    old = path.read_bytes()
    path.write_bytes(old[:start] + content + old[start + len(content) :])


@pytest.mark.parametrize(
    ("start", "content", "message"),
    [
        (0, b"MMIDIDY", "is no index of Megatron: it begins with"),
        (9, b"\x02", "has version 2, 1 was expected"),
        (17, b"\x07", "says that its tokens are float32; one of uint8, int8"),
        (17, b"\x63", "says that its tokens are dtype code 99"),
        (18, b"\x04", "its head speaks of 4 sequences"),
        (26, b"\xff", "its head speaks of 3 sequences and 255 document indices"),
        (34 + 3 * 12 + 3 * 8, b"\x02", "is damaged: its documents end with sequence 2 of 3"),
        (34 + 3 * 4 + 2 * 8, b"\x03", "is damaged: .* at byte 3"),
        (34 + 2 * 4, b"\xff\xff\xff\xff", "is damaged: .* has -1 tokens"),
    ],
)
def test_damaged_index_is_refused(tmp_path: Path, start: int, content: bytes, message: str) -> None:
    write_megatron(tmp_path / "a", [[[1]], [[2, 3]], [[4]]])
    rewritten(tmp_path / "a.idx", start, content)
    with pytest.raises(DataError, match=rf"a\.idx {message}|a\.idx has \d+ bytes, {message}"):
        opened(tmp_path / "a.bin")


@pytest.mark.parametrize("num_bytes", [0, 20, 34, 60, 101])
def test_truncated_index_is_refused(tmp_path: Path, num_bytes: int) -> None:
    write_megatron(tmp_path / "a", [[[1]], [[2, 3]], [[4]]])
    content = (tmp_path / "a.idx").read_bytes()
    assert len(content) == 34 + 3 * 12 + 4 * 8
    (tmp_path / "a.idx").write_bytes(content[:num_bytes])
    with pytest.raises(
        DataError, match=r"a\.idx (is no index of Megatron|has \d+ bytes, its head)"
    ):
        opened(tmp_path / "a.bin")


def test_documents_out_of_order_are_refused_when_they_are_asked_for(tmp_path: Path) -> None:
    write_megatron(tmp_path / "a", [[[1]], [[2, 3]], [[4]]])
    documents = 34 + 3 * 12
    for content, message in ((7, "begins outside its sequences"), (0, "not in the order")):
        rewritten(tmp_path / "a.idx", documents + 16, struct.pack("<q", content))
        with pytest.raises(DataError, match=f"a.idx is damaged: .*{message}"):
            starts_of(opened(tmp_path / "a.bin"))


def test_index_that_went_away_is_said_when_it_is_asked(tmp_path: Path) -> None:
    write_megatron(tmp_path / "a", [[[1]], [[2, 3]], [[4]]])
    corpus = opened(tmp_path / "a.bin")
    (tmp_path / "a.idx").unlink()
    assert tokens_of(corpus) == [1, 2, 3, 4]
    with pytest.raises(DataError, match=r"a\.idx is missing: Megatron's \.bin is read with the"):
        starts_of(corpus)


def test_index_of_multimodal_data_is_read(tmp_path: Path) -> None:
    write_megatron(tmp_path / "a", [[[1]], [[2, 3]], [[4]]])
    with (tmp_path / "a.idx").open("ab") as file:
        file.write(bytes(3))
    assert starts_of(opened(tmp_path / "a.bin")) == [0, 1, 3]


def test_truncated_megatron_tokens_are_refused(tmp_path: Path) -> None:
    write_megatron(tmp_path / "a", [[[1]], [[2, 3]], [[4]]])
    (tmp_path / "a.bin").write_bytes(bytes(6))
    with pytest.raises(DataError, match=r"a\.bin has 6 bytes, .*a\.idx speaks of 4 uint16 tokens"):
        opened(tmp_path / "a.bin")


def test_index_without_its_tokens_is_refused(tmp_path: Path) -> None:
    write_megatron(tmp_path / "a", [[[1]]])
    (tmp_path / "a.bin").unlink()
    with pytest.raises(DataError, match=r"a\.bin cannot be found"):
        opened(tmp_path / "a.idx")


def test_remote_file_with_a_suffix_is_not_asked_and_a_version_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_prepared(tmp_path, random_shards(1))
    fsspec.filesystem("memory").put(str(tmp_path / "manifest.json"), "/web-v1.5/manifest.json")
    assert is_tokens("memory://web-v1.5")
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda _: pytest.fail("it was asked"))
    assert not is_tokens("memory://web/a.jsonl")
    assert not is_tokens("memory://web/a.jsonl.zst")
