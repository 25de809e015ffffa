"""Corpus preparation on real files: what is read, what is refused, what is made only once."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from train.data.corpus import documents, list_files, prepare
from train.data.store import CorpusInfo
from train.errors import DataError
from train.settings import DataSettings, TokenizerKind, TokenizerSettings

BYTES = TokenizerSettings(kind=TokenizerKind.BYTES, path=None, vocab_size=257)
BPE = TokenizerSettings(kind=TokenizerKind.BPE, path=None, vocab_size=300)
END = 256


def data(folder: Path, *paths: str | Path, text_key: str = "text") -> DataSettings:
    return DataSettings(
        paths=tuple(str(path) for path in paths),
        text_key=text_key,
        sequence_length=8,
        validation_samples=0,
        cache_dir=str(folder / "cache"),
    )


def tokens_of(info: CorpusInfo) -> list[int]:
    return np.fromfile(info.tokens_path, dtype=info.dtype).tolist()


def encoded(*texts: str) -> list[int]:
    return [token for text in texts for token in [*text.encode(), END]]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


# What is read.


def test_text_files_are_documents_in_the_order_of_their_paths(tmp_path: Path) -> None:
    write(tmp_path / "text" / "b.txt", "second")
    write(tmp_path / "text" / "a.md", "first, with ü")
    info = prepare(data(tmp_path, tmp_path / "text"), BYTES)
    assert tokens_of(info) == encoded("first, with ü", "second")
    assert info.num_documents == 2
    assert info.num_tokens == len(tokens_of(info))
    assert (info.vocab_size, info.dtype, info.tokenizer_path) == (257, "uint16", None)


def test_each_line_of_a_jsonl_file_is_a_document(tmp_path: Path) -> None:
    lines = [json.dumps({"body": "one"}), "", json.dumps({"body": "two\nlines", "id": 3})]
    path = write(tmp_path / "a.jsonl", "\n".join(lines))
    info = prepare(data(tmp_path, path, text_key="body"), BYTES)
    assert tokens_of(info) == encoded("one", "two\nlines")


def test_globs_folders_and_files_are_joined_and_counted_once(tmp_path: Path) -> None:
    a = write(tmp_path / "text" / "a.txt", "a")
    b = write(tmp_path / "text" / "deep" / "b.txt", "b")
    write(tmp_path / "text" / "picture.png", "no text")
    paths = [tmp_path / "text" / "**" / "*.txt", tmp_path / "text", a]
    assert list_files(data(tmp_path, *paths)) == [a, b]


def test_named_file_needs_no_known_suffix(tmp_path: Path) -> None:
    path = write(tmp_path / "book.dat", "text")
    assert list_files(data(tmp_path, path)) == [path]


def test_name_with_brackets_is_found_as_it_stands(tmp_path: Path) -> None:
    path = write(tmp_path / "part[1].txt", "text")
    assert list_files(data(tmp_path, path)) == [path]


def test_byte_that_is_no_utf8_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"ab\xffcd")
    assert list(documents(path, "text")) == ["ab\N{REPLACEMENT CHARACTER}cd"]


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
def test_lone_surrogate_of_a_crawl_does_not_stop_preparation(
    tmp_path: Path, tokenizer: TokenizerSettings
) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "good \\ud800 enough"}\n')
    assert prepare(data(tmp_path, path), tokenizer).num_documents == 1


def test_standard_library_is_a_corpus_without_any_file_of_ours(tmp_path: Path) -> None:
    settings = DataSettings(
        paths=(),
        text_key="text",
        sequence_length=8,
        validation_samples=0,
        cache_dir=str(tmp_path),
    )
    files = list_files(settings)
    assert len(files) > 300
    assert files == sorted(files)
    assert not any("site-packages" in path.parts or "test" in path.parts for path in files)


def test_bytes_come_back_as_the_text_they_were(tmp_path: Path) -> None:
    text = "naïve – 文字 \x01\x7f"
    info = prepare(data(tmp_path, write(tmp_path / "a.txt", text)), BYTES)
    assert bytes(token for token in tokens_of(info) if token != END).decode() == text


def test_trained_tokenizer_is_kept_and_reads_its_tokens_back(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    text = "the cat sat on the mat, the cat sat. ü" * 20
    info = prepare(data(tmp_path, write(tmp_path / "a.txt", text)), BPE)
    assert info.tokenizer_path is not None
    tokenizer = Tokenizer.from_file(str(info.tokenizer_path))
    tokens = tokens_of(info)
    assert tokens[-1] == tokenizer.token_to_id("<|endoftext|>")
    assert tokenizer.decode(tokens[:-1]) == text
    assert len(tokens) < len(text) / 2
    assert info.vocab_size == tokenizer.get_vocab_size() <= 300


def test_tokenizer_file_is_used_as_it_is(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "the cat sat on the mat " * 20)
    trained = prepare(data(tmp_path, path), BPE)
    settings = TokenizerSettings(
        kind=TokenizerKind.FILE, path=str(trained.tokenizer_path), vocab_size=300
    )
    again = prepare(data(tmp_path, path), settings)
    assert tokens_of(again) == tokens_of(trained)
    assert again.digest != trained.digest


# What is refused.


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing-here\.txt cannot be found; check the globs"):
        prepare(data(tmp_path, tmp_path / "nothing-here.txt"), BYTES)


def test_dangling_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.raises(DataError, match=r"a\.txt cannot be found"):
        prepare(data(tmp_path, tmp_path / "a.txt"), BYTES)


def test_file_that_cannot_be_opened_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be read \(Is a directory\); fix its permissions"):
        list(documents(tmp_path, "text"))


def test_folder_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.txt").mkdir()
    with pytest.raises(DataError, match="holds no text files; text is expected in"):
        prepare(data(tmp_path, tmp_path / "x.txt"), BYTES)


def test_files_without_any_text_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "")
    with pytest.raises(DataError, match="the corpus is empty: 1 files hold no text"):
        prepare(data(tmp_path, path), BYTES)
    assert list((tmp_path / "cache").glob("*corpus-*/")) == []


def test_line_that_is_no_json_is_named_with_its_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n\n{"text": \n')
    with pytest.raises(DataError, match=r"a\.jsonl: line 3 is not JSON \("):
        prepare(data(tmp_path, path), BYTES)


@pytest.mark.parametrize("line", ['{"body": "a"}', '{"text": 5}', '["text"]', "null"])
def test_line_without_the_text_key_is_named_with_its_file(tmp_path: Path, line: str) -> None:
    path = write(tmp_path / "a.jsonl", f"{line}\n")
    with pytest.raises(DataError, match=r"a\.jsonl: line 1 has no text under 'text'; set data"):
        prepare(data(tmp_path, path), BYTES)


def test_file_that_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    settings = TokenizerSettings(
        kind=TokenizerKind.FILE, path=str(write(tmp_path / "t.json", "{}")), vocab_size=300
    )
    with pytest.raises(DataError, match=r"t\.json is not a tokenizer\.json \("):
        prepare(data(tmp_path, write(tmp_path / "a.txt", "text")), settings)


def test_cache_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "cache", "a file in its place")
    with pytest.raises(DataError, match=r"data\.cache_dir: .*cache cannot be made"):
        prepare(data(tmp_path, write(tmp_path / "a.txt", "text")), BYTES)


# What is made only once.


def test_second_preparation_builds_nothing(tmp_path: Path) -> None:
    settings = data(tmp_path, write(tmp_path / "a.txt", "text"))
    first = prepare(settings, BYTES)
    before = first.tokens_path.stat()
    assert prepare(settings, BYTES) == first
    after = first.tokens_path.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_changed_text_is_prepared_anew(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "text")
    first = prepare(data(tmp_path, path), BYTES)
    write(path, "other text")
    second = prepare(data(tmp_path, path), BYTES)
    assert second.digest != first.digest
    assert tokens_of(second) == encoded("other text")
    assert tokens_of(first) == encoded("text")


def test_touched_file_of_the_same_text_is_not_prepared_anew(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "text")
    first = prepare(data(tmp_path, path), BYTES)
    os.utime(path, ns=(1, 1))
    assert prepare(data(tmp_path, path), BYTES) == first


def test_moved_text_is_the_same_corpus(tmp_path: Path) -> None:
    first = prepare(data(tmp_path, write(tmp_path / "a.txt", "text")), BYTES)
    assert prepare(data(tmp_path, write(tmp_path / "b.txt", "text")), BYTES) == first


@pytest.mark.parametrize("vocab_size", [301, 280])
def test_other_tokenizer_is_another_corpus(tmp_path: Path, vocab_size: int) -> None:
    settings = data(tmp_path, write(tmp_path / "a.txt", "the cat sat on the mat" * 20))
    other = TokenizerSettings(kind=TokenizerKind.BPE, path=None, vocab_size=vocab_size)
    digests = {prepare(settings, tokenizer).digest for tokenizer in (BYTES, BPE, other)}
    assert len(digests) == 3


def test_other_text_key_is_another_corpus(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "one", "body": "two"}')
    assert tokens_of(prepare(data(tmp_path, path), BYTES)) == encoded("one")
    assert tokens_of(prepare(data(tmp_path, path, text_key="body"), BYTES)) == encoded("two")


def test_what_a_killed_preparation_left_is_ignored(tmp_path: Path) -> None:
    settings = data(tmp_path, write(tmp_path / "a.txt", "text"))
    whole = prepare(settings, BYTES)
    expected = tokens_of(whole)
    torn = whole.folder.with_name(f".{whole.folder.name}.1234567.tmp")
    whole.folder.rename(torn)
    (torn / "tokens.bin").write_bytes(b"\1\0")
    assert tokens_of(prepare(settings, BYTES)) == expected


def test_folder_without_a_manifest_is_made_anew(tmp_path: Path) -> None:
    settings = data(tmp_path, write(tmp_path / "a.txt", "text"))
    whole = prepare(settings, BYTES)
    expected = tokens_of(whole)
    (whole.folder / "manifest.json").unlink()
    (whole.folder / "tokens.bin").write_bytes(b"")
    assert tokens_of(prepare(settings, BYTES)) == expected


def test_failed_preparation_leaves_nothing_behind(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\nbad\n')
    with pytest.raises(DataError):
        prepare(data(tmp_path, path), BYTES)
    left = {entry.name.partition("-")[0] for entry in (tmp_path / "cache").iterdir()}
    assert left <= {"text", "corpus"}
    assert not [entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()]


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".parquet"])
def test_packed_file_is_refused_rather_than_read_as_text(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(b"\x1f\x8b")
    with pytest.raises(DataError, match="is packed; unpack it to plain text"):
        list_files(data(tmp_path, path))


def test_binary_file_is_refused_rather_than_trained_on(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"text\0more")
    with pytest.raises(DataError, match="is not text"):
        prepare(data(tmp_path, tmp_path / "a.txt"), BYTES)


def test_pipe_is_refused_rather_than_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(DataError, match="is not a regular file"):
        list_files(data(tmp_path, tmp_path / "a.txt"))


def test_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"text": "x"}\n', encoding="utf-8")
    assert tokens_of(prepare(data(tmp_path, path), BYTES)) == encoded("x")


def test_files_of_a_folder_that_are_left_out_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "a.TXT").write_text("x")
    (tmp_path / "t" / "b.png").write_text("x")
    assert [path.name for path in list_files(data(tmp_path, tmp_path / "t"))] == ["a.TXT"]
    assert "1 files without a text suffix left out" in caplog.text
