"""Where a sample comes from: file, line and place, against the text itself."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from train.data.corpus import prepare
from train.data.order import SampleOrder
from train.data.origins import DocumentIndex, DocumentLog, SampleOrigin
from train.data.store import CorpusInfo, TokenStore
from train.data.stream import OrderedSource
from train.errors import DataError
from train.settings import DataSettings, TokenizerKind, TokenizerSettings

BYTES = TokenizerSettings(kind=TokenizerKind.BYTES, path=None, vocab_size=257)
BPE = TokenizerSettings(kind=TokenizerKind.BPE, path=None, vocab_size=300)
END = 256
LENGTH = 8


def settings(folder: Path) -> DataSettings:
    return DataSettings(
        paths=(str(folder / "text"),),
        text_key="text",
        sequence_length=LENGTH,
        validation_samples=0,
        cache_dir=str(folder / "cache"),
    )


def write_texts(folder: Path, seed: int) -> dict[tuple[str, int | None], str]:
    """Write some files with lines and documents of any length; return the text of each place."""
    source = random.Random(seed)
    (folder / "text").mkdir()
    texts: dict[tuple[str, int | None], str] = {}
    for number in range(source.randrange(1, 6)):
        path = folder / "text" / f"{number}{source.choice(['.txt', '.jsonl'])}"
        if path.suffix == ".txt":
            texts[str(path), None] = "".join(source.choices("abcdé\n", k=source.randrange(40)))
            path.write_text(texts[str(path), None], encoding="utf-8", newline="")
            continue
        with path.open("w") as file:
            for line in range(1, source.randrange(2, 12)):
                if source.random() < 0.2:
                    file.write("\n")
                    continue
                text = "".join(source.choices("xyzü", k=source.choice([0, 1, 3, 30])))
                texts[str(path), line] = text
                file.write(json.dumps({"text": text}) + "\n")
    (folder / "text" / "last.txt").write_text("so that there is enough text", encoding="utf-8")
    texts[str(folder / "text" / "last.txt"), None] = "so that there is enough text"
    return {place: text for place, text in texts.items() if text}


def store_of(info: CorpusInfo) -> TokenStore:
    return TokenStore(info, sequence_length=LENGTH, validation_samples=0)


@pytest.mark.parametrize("seed", range(40))
def test_origins_lead_to_the_text_that_the_sample_holds(tmp_path: Path, seed: int) -> None:
    texts = write_texts(tmp_path, seed)
    info = prepare(settings(tmp_path), BYTES)
    store = store_of(info)
    for sample in range(store.num_samples):
        (row,) = store.rows(np.array([sample], dtype=np.int64)).tolist()
        found: list[int] = []
        for origin in store.origins(sample):
            document = [*texts[origin.file, origin.line].encode(), END]
            start = origin.token_offset_in_document
            found += document[start : start + origin.num_tokens]
        assert found == row


@pytest.mark.parametrize("seed", range(10))
def test_all_documents_are_there_in_order_and_numbered(tmp_path: Path, seed: int) -> None:
    texts = write_texts(tmp_path, seed)
    info = prepare(settings(tmp_path), BYTES)
    origins = DocumentIndex(info.folder, info.files).within(0, info.num_tokens)
    assert sorted((origin.file, origin.line or 0) for origin in origins) == [
        (origin.file, origin.line or 0) for origin in origins
    ]
    assert {(origin.file, origin.line) for origin in origins} == set(texts)
    assert [origin.document for origin in origins] == list(range(info.num_documents))
    assert sum(origin.num_tokens for origin in origins) == info.num_tokens


def test_sample_inside_one_document_has_one_origin_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.jsonl").write_text('\n{"text": "%s"}\n' % ("x" * 100))
    store = store_of(prepare(settings(tmp_path), BYTES))
    assert store.origins(3) == (
        SampleOrigin(
            file=str(tmp_path / "text" / "a.jsonl"),
            line=2,
            document=0,
            token_offset_in_document=3 * LENGTH,
            num_tokens=LENGTH + 1,
        ),
    )


def test_tokens_of_a_trained_tokenizer_are_counted_as_its_tokens(tmp_path: Path) -> None:
    write_texts(tmp_path, 3)
    info = prepare(settings(tmp_path), BPE)
    tokens = np.fromfile(info.tokens_path, dtype=info.dtype)
    end = int(tokens[-1])
    origins = DocumentIndex(info.folder, info.files).within(0, info.num_tokens)
    lengths = np.diff(np.flatnonzero(tokens == end), prepend=-1)
    assert [origin.num_tokens for origin in origins] == lengths.tolist()


def test_source_tells_the_origin_of_an_index_of_the_order(tmp_path: Path) -> None:
    write_texts(tmp_path, 5)
    store = store_of(prepare(settings(tmp_path), BYTES))
    order = SampleOrder(num_samples=store.num_samples, seed=7)
    indices = np.arange(3 * store.num_samples, dtype=np.int64)
    source = OrderedSource(store, order)
    for index, sample in zip(indices.tolist(), order.samples(indices).tolist(), strict=True):
        assert source.origins(index) == store.origins(sample)


def test_moved_text_is_named_where_it_lies_now(tmp_path: Path) -> None:
    write_texts(tmp_path, 5)
    first = prepare(settings(tmp_path), BYTES)
    (tmp_path / "text" / "last.txt").rename(tmp_path / "text" / "later.txt")
    second = prepare(settings(tmp_path), BYTES)
    assert second.folder == first.folder
    last = store_of(second).num_samples - 1
    assert store_of(second).origins(last)[-1].file == str(tmp_path / "text" / "later.txt")


# What it costs.


def test_index_is_opened_by_the_first_question_and_not_before(tmp_path: Path) -> None:
    write_texts(tmp_path, 5)
    info = prepare(settings(tmp_path), BYTES)
    for path in info.folder.glob("document*.npy"):
        path.rename(path.with_suffix(".hidden"))
    store = store_of(info)
    store.rows(np.array([0], dtype=np.int64))
    for path in info.folder.glob("document*.hidden"):
        path.rename(path.with_suffix(".npy"))
    assert store.origins(0)


def test_log_of_a_million_documents_is_small_and_is_found_in(tmp_path: Path) -> None:
    log = DocumentLog()
    for number in range(1_000_000):
        log.add(file=number // 1000, line=number % 1000 + 1, num_tokens=3)
    log.write(tmp_path)
    files = [Path(f"{number}.jsonl") for number in range(1000)]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 21_000_000
    assert DocumentIndex(tmp_path, files).within(2_000_000, 2_000_003) == (
        origin(file="666.jsonl", line=667, document=666_666, place=2, num_tokens=1),
        origin(file="666.jsonl", line=668, document=666_667, place=0, num_tokens=2),
    )


def origin(*, file: str, line: int, document: int, place: int, num_tokens: int) -> SampleOrigin:
    return SampleOrigin(
        file=file,
        line=line,
        document=document,
        token_offset_in_document=place,
        num_tokens=num_tokens,
    )


# What is refused, and what is made anew.


@pytest.mark.parametrize("content", [None, b"", b"no array"], ids=["missing", "empty", "torn"])
@pytest.mark.parametrize("name", ["documents", "document_files", "document_lines"])
def test_damaged_index_is_refused_with_the_folder_to_delete(
    tmp_path: Path, name: str, content: bytes | None
) -> None:
    write_texts(tmp_path, 5)
    info = prepare(settings(tmp_path), BYTES)
    path = info.folder / f"{name}.npy"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}\.npy cannot be read .* delete .* made anew"):
        store_of(info).origins(0)


def test_file_that_the_corpus_does_not_have_is_refused(tmp_path: Path) -> None:
    log = DocumentLog()
    log.add(file=1, line=None, num_tokens=5)
    log.write(tmp_path)
    with pytest.raises(DataError, match="names file 1 of a corpus of 1 files; delete"):
        DocumentIndex(tmp_path, [Path("a.txt")]).within(0, 3)


def test_cache_without_an_index_is_made_anew_and_is_the_same_corpus(tmp_path: Path) -> None:
    """A cache of the layout before this one had no version in the names of its folders."""
    write_texts(tmp_path, 5)
    new = prepare(settings(tmp_path), BYTES)
    tokens = new.tokens_path.read_bytes()
    old = new.folder.with_name(new.folder.name.removesuffix("-v2"))
    assert old != new.folder
    new.folder.rename(old)
    for path in old.glob("document*.npy"):
        path.unlink()
    again = prepare(settings(tmp_path), BYTES)
    assert again == new
    assert again.tokens_path.read_bytes() == tokens
    assert store_of(again).origins(0)


def test_killed_preparation_leaves_no_folder_with_half_an_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_texts(tmp_path, 5)

    def fail(log: DocumentLog, folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(DocumentLog, "write", fail)
    with pytest.raises(DataError, match=r"could not be written .*No space left"):
        prepare(settings(tmp_path), BYTES)
    assert not [entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()]
