"""Tokens back to text, for a person to read."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from train.data.formats import open_corpus
from train.data.prepare.job import run_job
from train.data.prepare.progress import Silence
from train.data.prepare.recipe import Recipe
from train.data.prepare.sources import list_sources
from train.data.prepare.tokenizer import TokenizerChoice
from train.data.prepare.work_folder import Job
from train.data.shards import Corpus, Split
from train.data.text import TokenDecoder
from train.errors import DataError

TEXT = "the cat sat on the mat, naïve – 文字\n" * 20
BAD = "\N{REPLACEMENT CHARACTER}"


@pytest.fixture(params=["bytes", "bpe:300"])
def info(request: pytest.FixtureRequest, tmp_path: Path, fast_disk: None) -> Corpus:
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    job = Job(
        folder=tmp_path / "corpus",
        sources=list_sources([str(tmp_path / "a.txt")]),
        recipe=Recipe(validation_share=0.0),
        tokenizer=TokenizerChoice.parse(request.param),
    )
    run_job(job, Silence())
    return open_corpus(str(job.folder), dtype=None, cache=None)


def corpus_of(folder: Path, **changes: object) -> Corpus:
    values = {
        "address": str(folder),
        "digest": "d",
        "dtype": "uint16",
        "vocab_size": 257,
        "tokenizer_path": None,
        "tokenizer_fingerprint": "f",
        "separator_id": 256,
        "train": Split(shards=()),
    }
    return Corpus(**{**values, **changes})  # type: ignore[arg-type]


def tokens_of(info: Corpus) -> list[int]:
    return np.fromfile(info.train.shards[0].address, dtype=info.dtype).tolist()


def test_text_comes_back_with_the_separator_named(info: Corpus) -> None:
    decoder = TokenDecoder.open(info)
    assert decoder.decode(tokens_of(info), 10_000) == f"{TEXT}<|endoftext|>"


def test_rows_of_the_store_are_taken_as_they_are(info: Corpus) -> None:
    tokens = np.fromfile(info.train.shards[0].address, dtype=info.dtype)
    assert TokenDecoder.open(info).decode(tokens[:-1], 10_000) == TEXT


@pytest.mark.parametrize("max_characters", [0, 1, 2, 12, len(TEXT) - 1])
def test_long_text_is_cut_with_an_ellipsis(info: Corpus, max_characters: int) -> None:
    text = TokenDecoder.open(info).decode(tokens_of(info)[:-1], max_characters)
    assert len(text) == max_characters
    assert text == (TEXT[: max_characters - 1] + "…" if max_characters else "")


def test_text_that_just_fits_is_not_cut(info: Corpus) -> None:
    assert TokenDecoder.open(info).decode(tokens_of(info)[:-1], len(TEXT)) == TEXT


def test_no_tokens_are_no_text(info: Corpus) -> None:
    assert TokenDecoder.open(info).decode([], 10) == ""


def test_numbers_that_are_no_tokens_are_replaced_one_by_one(info: Corpus) -> None:
    decoder = TokenDecoder.open(info)
    first = tokens_of(info)[:1]
    odd = [-1, *first, info.vocab_size, 2**32, 10**30, *first, -(2**70)]
    letter = decoder.decode(first, 10)
    assert decoder.decode(odd, 100) == f"{BAD}{letter}{BAD}{BAD}{BAD}{letter}{BAD}"


@pytest.mark.parametrize("seed", range(20))
def test_any_tokens_at_all_give_text(info: Corpus, seed: int) -> None:
    source = random.Random(seed)
    tokens = [source.randrange(-5, 2 * info.vocab_size) for _ in range(200)]
    text = TokenDecoder.open(info).decode(tokens, 150)
    assert len(text) <= 150
    assert text.encode().decode() == text  # what a report can be written with


def test_character_that_is_cut_in_the_middle_is_replaced(tmp_path: Path) -> None:
    plain = corpus_of(tmp_path)
    decoder = TokenDecoder.open(plain)
    assert decoder.decode([*"文".encode()[1:], 97, 256, 256, 0xFF], 50) == (
        f"{BAD}{BAD}a<|endoftext|><|endoftext|>{BAD}"
    )


def test_damaged_tokenizer_is_refused_with_the_folder_to_delete(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    broken = corpus_of(tmp_path, tokenizer_path=tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match=rf"is damaged; delete {tmp_path} and prepare the corpus"):
        TokenDecoder.open(broken)


def test_tokens_of_a_file_that_does_not_say_what_they_mean_are_numbers(tmp_path: Path) -> None:
    foreign = corpus_of(tmp_path, tokenizer_fingerprint=None, vocab_size=None, separator_id=None)
    assert TokenDecoder.open(foreign).decode([5, 70_000, 1], 50) == "5 70000 1"
