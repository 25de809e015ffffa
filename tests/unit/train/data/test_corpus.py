"""The corpora of a run on real files: what is read, what is refused, what is made only once."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from train.data import corpus as corpus_module
from train.data.corpus import open_sources
from train.data.prepare.progress import Silence
from train.data.prepare.recipe import Recipe
from train.data.prepare.sources import list_sources
from train.data.prepare.tokenizer import TokenizerChoice
from train.data.prepare.work_folder import Job
from train.data.settings import (
    DataSettings,
    Normalise,
    OnBadShard,
    Packing,
    SourceSettings,
    TokenizerKind,
    TokenizerSettings,
    Verify,
)
from train.data.shards import Corpus
from train.errors import DataError

pytestmark = pytest.mark.usefixtures("fast_disk")

BYTES = TokenizerSettings(kind=TokenizerKind.BYTES, path=None, vocab_size=257)
BPE = TokenizerSettings(kind=TokenizerKind.BPE, path=None, vocab_size=300)
END = 256


def data(folder: Path, *paths: str | Path, **changes: Any) -> DataSettings:
    values: dict[str, Any] = {
        "paths": tuple(str(path) for path in paths),
        "sources": {},
        "stages": (),
        "text_key": "text",
        "normalise": Normalise.NONE,
        "deduplicate": False,
        "max_bad_records": 0,
        "token_dtype": None,
        "sequence_length": 8,
        "packing": Packing.CONCATENATE,
        "isolates_documents": False,
        "block_samples": None,
        "window_blocks": 64,
        "validation_share": 0.0,
        "validation_samples": 0,
        "validation_interval_steps": None,
        "read_ahead_batches": 0,
        "verify": Verify.SIZES,
        "on_bad_shard": OnBadShard.STOP,
        "cache_dir": str(folder / "cache"),
        "cache_bytes": 10**9,
    }
    return DataSettings(**{**values, **changes})


def prepare(settings: DataSettings, tokenizer: TokenizerSettings) -> Corpus:
    corpora = open_sources(settings, tokenizer)
    assert list(corpora) == ["text"]
    return corpora["text"]


def tokens_of(corpus: Corpus) -> list[int]:
    parts = [np.fromfile(shard.address, dtype=corpus.dtype) for shard in corpus.train.shards]
    return np.concatenate(parts).tolist()


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
    assert info.train.num_documents == 2
    assert info.train.num_tokens == len(tokens_of(info))
    assert info.files == (str(tmp_path / "text" / "a.md"), str(tmp_path / "text" / "b.txt"))
    assert (info.vocab_size, info.dtype, info.tokenizer_path) == (257, "uint16", None)


def test_each_line_of_a_jsonl_file_is_a_document(tmp_path: Path) -> None:
    lines = [json.dumps({"body": "one"}), "", json.dumps({"body": "two\nlines", "id": 3})]
    path = write(tmp_path / "a.jsonl", "\n".join(lines))
    info = prepare(data(tmp_path, path, text_key="body"), BYTES)
    assert tokens_of(info) == encoded("one", "two\nlines")


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
def test_lone_surrogate_of_a_crawl_does_not_stop_preparation(
    tmp_path: Path, tokenizer: TokenizerSettings
) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "good \\ud800 enough"}\n')
    assert prepare(data(tmp_path, path), tokenizer).train.num_documents == 1


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
    with pytest.raises(DataError, match=r"a\.jsonl: line 1 has no text under 'text'.*; set data"):
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
    tokens = Path(first.train.shards[0].address)
    before = tokens.stat()
    assert prepare(settings, BYTES) == first
    after = tokens.stat()
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
    folder = Path(whole.address)
    (folder / "manifest.json").unlink()
    (folder / ".work").mkdir()
    (folder / ".work" / "task-000000-train-000.bin.tmp").write_bytes(b"\1\0")
    assert tokens_of(prepare(settings, BYTES)) == expected
    assert not (folder / ".work").exists()


def test_what_a_kill_left_is_taken_up_even_if_files_were_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.txt", "text")

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("train.data.prepare.finish.Finish.run", kill)
        with pytest.raises(KeyboardInterrupt):
            prepare(data(tmp_path, path), BYTES)
    (left,) = (tmp_path / "cache").glob("corpus-*/.work/task-000000.json")
    os.utime(path, ns=(1, 1))
    assert tokens_of(prepare(data(tmp_path, path), BYTES)) == encoded("text")
    assert not left.exists()


def test_folder_without_a_manifest_is_made_anew(tmp_path: Path) -> None:
    settings = data(tmp_path, write(tmp_path / "a.txt", "text"))
    whole = prepare(settings, BYTES)
    expected = tokens_of(whole)
    (Path(whole.address) / "manifest.json").unlink()
    Path(whole.train.shards[0].address).write_bytes(b"")
    assert tokens_of(prepare(settings, BYTES)) == expected


def test_failed_preparation_leaves_nothing_behind(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\nbad\n')
    with pytest.raises(DataError):
        prepare(data(tmp_path, path), BYTES)
    left = {entry.name.partition("-")[0] for entry in (tmp_path / "cache").iterdir()}
    assert left <= {"text", "corpus"}
    assert not [entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()]


def test_binary_file_is_refused_rather_than_trained_on(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"text\0more")
    with pytest.raises(DataError, match="is not text"):
        prepare(data(tmp_path, tmp_path / "a.txt"), BYTES)


def test_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"text": "x"}\n', encoding="utf-8")
    assert tokens_of(prepare(data(tmp_path, path), BYTES)) == encoded("x")


# Several sources.


def mixture(folder: Path, **paths: Path | str) -> DataSettings:
    sources = {name: SourceSettings(paths=(str(path),)) for name, path in paths.items()}
    return data(folder, sources=sources)


def prepared_folder(folder: Path, tokenizer: str = "bytes", text: str = "other text") -> Path:
    from train.data.prepare.job import run_job

    source = write(folder / "prepared.txt", text)
    job = Job(
        folder=folder / "prepared",
        sources=list_sources([str(source)]),
        recipe=Recipe(validation_share=0.0),
        tokenizer=TokenizerChoice.parse(tokenizer),
    )
    run_job(job, Silence())
    return job.folder


def test_each_source_is_a_corpus_of_its_own_with_its_own_text_key(tmp_path: Path) -> None:
    a = write(tmp_path / "a.txt", "one")
    b = write(tmp_path / "b.jsonl", '{"body": "two"}')
    sources = {
        "web": SourceSettings(paths=(str(a),)),
        "code": SourceSettings(paths=(str(b),), text_key="body"),
    }
    corpora = open_sources(data(tmp_path, sources=sources), BYTES)
    assert {name: tokens_of(corpus) for name, corpus in corpora.items()} == {
        "web": encoded("one"),
        "code": encoded("two"),
    }


def test_one_tokenizer_is_trained_on_the_text_of_all_sources(tmp_path: Path) -> None:
    a = write(tmp_path / "a.txt", "the cat sat " * 50)
    b = write(tmp_path / "b.txt", "dogs dig holes " * 50)
    corpora = open_sources(mixture(tmp_path, a=a, b=b), BPE)
    assert corpora["a"].tokenizer_fingerprint == corpora["b"].tokenizer_fingerprint
    assert len(tokens_of(corpora["a"])) < 300
    assert len(tokens_of(corpora["b"])) < 300
    assert open_sources(mixture(tmp_path, a=a, b=b), BPE) == corpora


def test_prepared_folder_is_opened_as_it_is(tmp_path: Path) -> None:
    folder = prepared_folder(tmp_path)
    corpus = prepare(data(tmp_path, folder), BPE)
    assert (tokens_of(corpus), corpus.address) == (encoded("other text"), str(folder))


def test_text_beside_a_folder_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = prepared_folder(tmp_path)
    text = write(tmp_path / "a.txt", "the cat sat " * 50)
    with pytest.raises(DataError, match=r"sources b and a have different .* tokenizer=bytes"):
        open_sources(mixture(tmp_path, a=text, b=folder), BPE)
    assert set(open_sources(mixture(tmp_path, a=text, b=folder), BYTES)) == {"a", "b"}


def test_tokenizer_to_use_is_named(tmp_path: Path) -> None:
    folder = prepared_folder(tmp_path, "bpe:280", "dogs dig holes " * 50)
    text = write(tmp_path / "a.txt", "the cat sat " * 50)
    with pytest.raises(DataError, match=rf"tokenizer=file tokenizer.path={folder}/tokenizer.json"):
        open_sources(mixture(tmp_path, a=text, b=folder), BPE)
    file = TokenizerSettings(
        kind=TokenizerKind.FILE, path=str(folder / "tokenizer.json"), vocab_size=300
    )
    assert set(open_sources(mixture(tmp_path, a=text, b=folder), file)) == {"a", "b"}


def test_folders_of_two_tokenizers_are_refused(tmp_path: Path) -> None:
    a = prepared_folder(tmp_path / "a")
    b = prepared_folder(tmp_path / "b", "bpe:280", "dogs dig holes " * 50)
    with pytest.raises(DataError, match=r"sources a and b .*; prepare both with one tokenizer"):
        open_sources(mixture(tmp_path, a=a, b=b), BYTES)


def test_tokens_and_text_in_one_source_are_refused(tmp_path: Path) -> None:
    folder = prepared_folder(tmp_path)
    with pytest.raises(DataError, match=r"prepared holds tokens and .*a\.txt text; give tokens"):
        prepare(data(tmp_path, folder, write(tmp_path / "a.txt", "x")), BYTES)


def test_tokenizer_that_nothing_uses_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = TokenizerSettings(kind=TokenizerKind.FILE, path="other.json", vocab_size=300)
    prepare(data(tmp_path, prepared_folder(tmp_path)), other)
    assert "tokenizer.path=other.json is not used: it is for text" in caplog.text


def test_error_names_the_source_if_there_are_several(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"source web: data\.paths: .*gone\.txt cannot be found"):
        open_sources(mixture(tmp_path, web=tmp_path / "gone.txt"), BYTES)


# What determines the tokens.


def test_share_of_the_documents_is_held_out(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"document {number}"}) for number in range(400)]
    path = write(tmp_path / "a.jsonl", "\n".join(lines))
    corpus = prepare(data(tmp_path, path, validation_share=0.25), BYTES)
    assert corpus.validation is not None
    assert 60 < (corpus.validation.num_documents or 0) < 140
    assert (corpus.validation.num_documents or 0) + (corpus.train.num_documents or 0) == 400


def test_duplicates_and_normal_forms_are_settings(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "e\\u0301"}\n{"text": "\\u00e9"}\n')
    both = data(tmp_path, path, normalise=Normalise.NFC, deduplicate=True)
    assert tokens_of(prepare(both, BYTES)) == encoded("\u00e9")
    assert tokens_of(prepare(data(tmp_path, path), BYTES)) == encoded("e\u0301", "\u00e9")


def test_bad_records_within_the_limit_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\nbad\n')
    corpus = prepare(data(tmp_path, path, max_bad_records=1), BYTES)
    assert tokens_of(corpus) == encoded("a")
    assert "1 bad records left out" in caplog.text


def test_what_is_odd_about_the_text_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "a.jsonl", "")
    path.write_bytes(b'{"text": "a\xff"}\n')
    prepare(data(tmp_path, path), BYTES)
    assert "1 documents are not UTF-8 throughout" in caplog.text


def test_half_done_corpus_is_not_trained_on_as_text(tmp_path: Path) -> None:
    write(tmp_path / "half" / ".work" / "plan.json", '{"text": "not text"}')
    with pytest.raises(DataError, match="half is a corpus that was not prepared to the end; run"):
        prepare(data(tmp_path, tmp_path / "half"), BYTES)


def test_large_text_is_prepared_by_several_processes_to_the_same_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("train.data.prepare.plan._LEAST_TASK_BYTES", 1000)
    paths = [write(tmp_path / "text" / f"{n}.txt", f"text {n} " * 500) for n in range(8)]
    small = prepare(data(tmp_path / "a", *paths), BYTES)
    monkeypatch.setattr(corpus_module, "_SMALL_BYTES", 1)
    large = prepare(data(tmp_path / "b", *paths), BYTES)
    assert tokens_of(large) == tokens_of(small)
    assert large.digest == small.digest
    assert "tokenising" in capfd.readouterr().err


def test_full_disk_is_one_error_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("train.data.prepare.shards._write_all", fail)
    path = write(tmp_path / "a.txt", "text")
    with pytest.raises(
        DataError, match=r"could not be written to .*cache \(No space left .*\); set data.cache_dir"
    ):
        prepare(data(tmp_path, path), BYTES)
    assert list((tmp_path / "cache").glob("corpus-*/")) == []


def test_damaged_memo_is_refused_with_what_to_delete(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "text")
    prepare(data(tmp_path, path), BYTES)
    (memo,) = (tmp_path / "cache").glob("text-*.json")
    memo.write_text("{")
    with pytest.raises(DataError, match=r"text-.*json is damaged .*; delete .* made anew"):
        prepare(data(tmp_path, path), BYTES)


def test_lock_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "text")
    folder = prepare(data(tmp_path, path), BYTES).address
    (Path(folder) / "manifest.json").unlink()
    lock = Path(f"{folder}.lock")
    lock.unlink()
    lock.mkdir()
    with pytest.raises(DataError, match=r"\.lock cannot be written \(Is a directory\); set data"):
        prepare(data(tmp_path, path), BYTES)
