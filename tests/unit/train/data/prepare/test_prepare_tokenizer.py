"""Tokenizers: which one is meant, its separator, and what comes out."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import huggingface_hub
import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from train.data.prepare.plan import Task
from train.data.prepare.recipe import Recipe
from train.data.prepare.sources import list_sources
from train.data.prepare.tokenizer import (
    BytesEncoder,
    FileEncoder,
    TokenizerChoice,
    load_tokenizer,
    train_bpe,
    write_tokenizer,
)
from train.data.prepare.training_text import training_texts
from train.errors import DataError

TEXTS = ["the cat sat on the mat, naïve – 文字 " * 20, "a second text"]


@pytest.fixture(scope="module")
def trained() -> str:
    return train_bpe(TEXTS, 300, "<|endoftext|>").to_str(pretty=True)


def word_tokenizer(*special: str) -> str:
    tokenizer = Tokenizer(models.WordLevel({"the": 0, "cat": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(special))
    return str(tokenizer.to_str(pretty=True))


def encoder_of(folder: Path, content: str, separator: str | None = None) -> FileEncoder:
    given = folder / "given.json"
    given.write_text(content)
    choice = TokenizerChoice(kind="file", path=str(given), separator=separator)
    path = folder / "tokenizer.json"
    found = write_tokenizer(choice, path, [])
    return FileEncoder(path, kind="file", separator=found)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bytes", TokenizerChoice(kind="bytes")),
        ("bpe:32000", TokenizerChoice(kind="bpe", vocab_size=32_000)),
        ("a/t.json", TokenizerChoice(kind="file", path="a/t.json")),
        ("org/model", TokenizerChoice(kind="file", path="org/model")),
    ],
)
def test_choice_is_read_from_one_word(text: str, expected: TokenizerChoice) -> None:
    assert TokenizerChoice.parse(text) == expected


@pytest.mark.parametrize("text", ["bpe", "bpe:", "bpe:100", "bpe:many"])
def test_bpe_without_a_size_is_refused(text: str) -> None:
    with pytest.raises(DataError, match=rf"--tokenizer={text} has no size; use for example bpe"):
        TokenizerChoice.parse(text)


def test_bytes_have_a_separator_behind_each_text() -> None:
    tokens, lengths = BytesEncoder().encode(["ab", "ü"], [b"ab", "ü".encode()])
    assert tokens.tolist() == [97, 98, 256, 195, 188, 256]
    assert (lengths.tolist(), tokens.dtype) == ([3, 3], "uint16")


def test_trained_tokenizer_gives_the_text_back(tmp_path: Path, trained: str) -> None:
    encoder = encoder_of(tmp_path, trained)
    tokens, lengths = encoder.encode(TEXTS, [])
    reader = Tokenizer.from_str(trained)
    first = tokens[: lengths[0]].tolist()
    assert first[-1] == encoder.separator_id
    assert reader.decode(first[:-1]) == TEXTS[0]
    assert (len(tokens), encoder.vocab_size) == (lengths.sum(), reader.get_vocab_size())


def test_the_same_texts_train_the_same_tokenizer_on_any_number_of_threads(
    trained: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "TOKENIZERS_PARALLELISM", "false")
    assert train_bpe(TEXTS, 300, "<|endoftext|>").to_str(pretty=True) == trained


def test_text_that_looks_like_a_separator_is_no_separator(tmp_path: Path, trained: str) -> None:
    encoder = encoder_of(tmp_path, trained)
    tokens, _ = encoder.encode(["a<|endoftext|>b"], [])
    assert tokens.tolist().count(encoder.separator_id) == 1
    assert tokens[-1] == encoder.separator_id


@pytest.mark.parametrize(
    ("special", "asked", "found"),
    [
        (("</s>",), None, "</s>"),
        (("<eos>", "<pad>"), None, "<eos>"),
        (("</s>", "<|endoftext|>"), None, "<|endoftext|>"),
        (("</s>", "<doc>"), "<doc>", "<doc>"),
        (("<pad>",), None, "<|endoftext|>"),
    ],
)
def test_separator_is_the_one_asked_for_or_the_tokenizer_s_own(
    tmp_path: Path, special: tuple[str, ...], asked: str | None, found: str
) -> None:
    content = word_tokenizer(*special)
    encoder = encoder_of(tmp_path, content, asked)
    assert encoder.separator == found
    tokens, _ = encoder.encode(["the cat"], [])
    assert tokens.tolist() == [0, 1, encoder.separator_id]
    is_copy = (tmp_path / "tokenizer.json").read_text() == content
    assert is_copy == (found in special)


def test_separator_that_the_tokenizer_lacks_is_refused_with_those_near_it(tmp_path: Path) -> None:
    content = word_tokenizer("</s>", "<doc>", "<pad>")
    with pytest.raises(
        DataError, match=r"=<s>: tokenizer\.path=.*given\.json has no such .*, such as </s>, "
    ):
        encoder_of(tmp_path, content, "<s>")
    with pytest.raises(DataError, match=r"has no such token; give one that it has$"):
        encoder_of(tmp_path, word_tokenizer(), "cats")


def test_separator_that_text_has_too_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"=cat is an ordinary token of tokenizer\.path=.*given"):
        encoder_of(tmp_path, word_tokenizer("</s>"), "cat")
    plain = Tokenizer.from_str(word_tokenizer())
    plain.add_tokens([AddedToken("<doc>", special=False)])
    with pytest.raises(DataError, match="=<doc> is an ordinary token"):
        encoder_of(tmp_path, plain.to_str(), "<doc>")


def test_separator_of_bytes_is_refused() -> None:
    with pytest.raises(DataError, match=r"=<eos> is given, and bytes .* token 256; leave it out"):
        TokenizerChoice.parse("bytes", "<eos>")


def test_ids_with_holes_need_as_many_rows_as_the_highest(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"the": 0, "?": 70_000}, unk_token="?"))
    encoder = encoder_of(tmp_path, str(tokenizer.to_str()))
    assert (encoder.vocab_size, encoder.dtype) == (70_001, "uint32")


def test_folder_means_the_file_in_it(tmp_path: Path, trained: str) -> None:
    (tmp_path / "tokenizer.json").write_text(trained)
    assert load_tokenizer(str(tmp_path)) == trained


@pytest.mark.parametrize("name", ["gone.json", "./gone", "/no/such/folder"])
def test_file_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(DataError, match=r"cannot be read \(No such file or directory\); give a"):
        load_tokenizer(name)


def test_name_that_the_hub_does_not_give_is_tried_once_and_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    num_tries = 0

    def fail(*_: object, **__: object) -> None:
        nonlocal num_tries
        num_tries += 1
        logging.getLogger("huggingface_hub.utils").warning("once more")
        raise RuntimeError("no network\ndetails")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", fail)
    with pytest.raises(
        DataError, match=r"tokenizer\.path=no/model is no file here, .*hub \(no network\); check"
    ):
        load_tokenizer("no/model")
    with pytest.raises(DataError, match=r"--tokenizer=byte is no .*, or give bytes, bpe:SIZE or a"):
        load_tokenizer("byte", "--tokenizer")
    assert num_tries == 2
    assert "once more" not in caplog.text


def test_name_without_the_hub_is_what_was_fetched_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: str
) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(trained)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no network")

    def fetched(name: str, file: str, *, local_files_only: bool) -> str:
        assert (name, file, local_files_only) == ("org/model", "tokenizer.json", True)
        return str(path)

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", fail)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetched)
    assert load_tokenizer("org/model") == trained
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *_, **__: None)
    monkeypatch.setattr(
        Tokenizer, "from_pretrained", staticmethod(lambda _: Tokenizer.from_str(trained))
    )
    assert load_tokenizer("org/model") == trained


def test_file_that_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"given\.json is not a tokenizer\.json \("):
        encoder_of(tmp_path, "{}")


def test_training_text_is_all_of_a_small_corpus_and_some_of_each_task_of_a_big_one(
    tmp_path: Path,
) -> None:
    for name in "abcd":
        (tmp_path / f"{name}.txt").write_text(name * 100)
    sources = list_sources([str(tmp_path)])
    tasks = [Task(number, number + 1) for number in range(4)]
    assert len("".join(training_texts(sources, tasks, Recipe()))) == 400
    some = list(training_texts(sources, tasks, Recipe(), max_characters=200))
    assert some == ["a" * 50, "b" * 50, "c" * 50, "d" * 50]
