"""Tokens back to text, for a person to read."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from train.data.corpus import prepare
from train.data.store import CorpusInfo
from train.data.text import TokenDecoder
from train.errors import DataError
from train.settings import DataSettings, TokenizerKind, TokenizerSettings

TEXT = "the cat sat on the mat, naïve – 文字\n" * 20
BAD = "\N{REPLACEMENT CHARACTER}"


@pytest.fixture(params=[TokenizerKind.BYTES, TokenizerKind.BPE])
def info(request: pytest.FixtureRequest, tmp_path: Path) -> CorpusInfo:
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    data = DataSettings(
        paths=(str(tmp_path / "a.txt"),),
        text_key="text",
        sequence_length=8,
        validation_samples=0,
        cache_dir=str(tmp_path / "cache"),
    )
    vocab_size = 257 if request.param is TokenizerKind.BYTES else 300
    return prepare(data, TokenizerSettings(kind=request.param, path=None, vocab_size=vocab_size))


def tokens_of(info: CorpusInfo) -> list[int]:
    return np.fromfile(info.tokens_path, dtype=info.dtype).tolist()


def test_text_comes_back_with_the_separator_named(info: CorpusInfo) -> None:
    decoder = TokenDecoder.open(info)
    assert decoder.decode(tokens_of(info), 10_000) == f"{TEXT}<|endoftext|>"


def test_rows_of_the_store_are_taken_as_they_are(info: CorpusInfo) -> None:
    tokens = np.fromfile(info.tokens_path, dtype=info.dtype)
    assert TokenDecoder.open(info).decode(tokens[:-1], 10_000) == TEXT


@pytest.mark.parametrize("max_characters", [0, 1, 2, 12, len(TEXT) - 1])
def test_long_text_is_cut_with_an_ellipsis(info: CorpusInfo, max_characters: int) -> None:
    text = TokenDecoder.open(info).decode(tokens_of(info)[:-1], max_characters)
    assert len(text) == max_characters
    assert text == (TEXT[: max_characters - 1] + "…" if max_characters else "")


def test_text_that_just_fits_is_not_cut(info: CorpusInfo) -> None:
    assert TokenDecoder.open(info).decode(tokens_of(info)[:-1], len(TEXT)) == TEXT


def test_no_tokens_are_no_text(info: CorpusInfo) -> None:
    assert TokenDecoder.open(info).decode([], 10) == ""


def test_numbers_that_are_no_tokens_are_replaced_one_by_one(info: CorpusInfo) -> None:
    decoder = TokenDecoder.open(info)
    first = tokens_of(info)[:1]
    odd = [-1, *first, info.vocab_size, 2**32, 10**30, *first, -(2**70)]
    letter = decoder.decode(first, 10)
    assert decoder.decode(odd, 100) == f"{BAD}{letter}{BAD}{BAD}{BAD}{letter}{BAD}"


@pytest.mark.parametrize("seed", range(20))
def test_any_tokens_at_all_give_text(info: CorpusInfo, seed: int) -> None:
    source = random.Random(seed)
    tokens = [source.randrange(-5, 2 * info.vocab_size) for _ in range(200)]
    text = TokenDecoder.open(info).decode(tokens, 150)
    assert len(text) <= 150
    assert text.encode().decode() == text  # what a report can be written with


def test_character_that_is_cut_in_the_middle_is_replaced(tmp_path: Path) -> None:
    plain = CorpusInfo(
        folder=tmp_path, digest="d", num_tokens=0, num_documents=0, vocab_size=257, dtype="uint16"
    )
    decoder = TokenDecoder.open(plain)
    assert decoder.decode([*"文".encode()[1:], 97, 256, 256, 0xFF], 50) == (
        f"{BAD}{BAD}a<|endoftext|><|endoftext|>{BAD}"
    )


def test_damaged_tokenizer_is_refused_with_the_folder_to_delete(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    broken = CorpusInfo(
        folder=tmp_path, digest="d", num_tokens=0, num_documents=0, vocab_size=300, dtype="uint16"
    )
    with pytest.raises(DataError, match=rf"is damaged; delete {tmp_path} and it is made anew"):
        TokenDecoder.open(broken)
