"""Text in Parquet and Arrow files: rows, ranges, wrong columns, damage."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from train.data.prepare.readers import BadRecord, Piece, Position, read_records
from train.data.prepare.recipe import Recipe
from train.data.prepare.sources import list_sources
from train.errors import DataError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

RECIPE = Recipe()
TEXTS = [f"text {number}" for number in range(1000)]


def read(
    path: Path, recipe: Recipe = RECIPE, start: int = 0, stop: int = -1
) -> list[Piece | BadRecord]:
    (source,) = list_sources([str(path)])
    return list(read_records(source, recipe, Position(), start, stop))


def write(path: Path, values: Any = None, **options: Any) -> Path:
    table = pa.table({"id": range(len(values or TEXTS)), "text": values or TEXTS})
    if path.suffix == ".parquet":
        pq.write_table(table, path, **options)
    else:
        make = pa.ipc.new_file if options.get("is_file") else pa.ipc.new_stream
        with make(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=100)
    return path


EXPECTED = [Piece(number, text, True) for number, text in enumerate(TEXTS, start=1)]


def test_rows_are_documents_with_their_number(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.parquet")) == EXPECTED
    assert read(write(tmp_path / "a.arrow")) == EXPECTED
    assert read(write(tmp_path / "b.arrow", is_file=True)) == EXPECTED


def test_rows_of_all_ranges_together_are_those_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", row_group_size=64)
    size = path.stat().st_size
    for count in (2, 5, 40):
        cuts = [size * part // count for part in range(count + 1)]
        found = [r for a, b in pairwise(cuts) for r in read(path, RECIPE, a, b)]
        assert [record[1] for record in found] == TEXTS


def test_missing_value_is_a_bad_record_and_a_long_one_too(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", ["a", None, "b" * 50, "文" * 10])
    found = read(path, replace(RECIPE, max_document_bytes=40))
    assert [type(record) for record in found] == [Piece, BadRecord, BadRecord, Piece]
    assert [record.line for record in found] == [1, 2, 3, 4]
    assert (found[1][1], found[2][1]) == (
        "has no text under 'text'",
        "is longer than 40 bytes",
    )


def test_long_value_comes_in_pieces(tmp_path: Path) -> None:
    found = read(write(tmp_path / "a.parquet", ["ab " * 50]), replace(RECIPE, piece_characters=64))
    assert len(found) > 2
    assert "".join(record[1] for record in found) == "ab " * 50


def test_column_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    for name in ("a.parquet", "a.arrow"):
        with pytest.raises(DataError, match=r"has no column 'body', but id, text; set data\.text"):
            read(write(tmp_path / name), replace(RECIPE, text_key="body"))


def test_column_that_is_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"column 'id' holds int64, and text is expected; set"):
        read(write(tmp_path / "a.parquet"), replace(RECIPE, text_key="id"))


def test_column_of_categories_is_text(tmp_path: Path) -> None:
    values = pa.array(["a", "b", "a"]).dictionary_encode()
    found = read(write(tmp_path / "a.arrow", values))
    assert [record[1] for record in found] == ["a", "b", "a"]


def test_damaged_file_is_refused_by_name(tmp_path: Path) -> None:
    arrow = write(tmp_path / "a.arrow")
    arrow.write_bytes(arrow.read_bytes()[:5000])
    parquet = write(tmp_path / "a.parquet")
    parquet.write_bytes(parquet.read_bytes()[:-8])
    (tmp_path / "b.parquet").write_text("no columns at all")
    for path in (arrow, parquet, tmp_path / "b.parquet"):
        with pytest.raises(DataError, match=rf"{path} cannot be unpacked \(.*\): it is damaged or"):
            read(path)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_value_that_is_not_utf8_is_replaced_and_marked(tmp_path: Path, suffix: str) -> None:
    values = pa.array([b"ab\xff", b"good", None], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, values.buffers())
    marked, good, missing = read(write(tmp_path / f"a{suffix}", text))
    assert marked == Piece(1, "ab\N{REPLACEMENT CHARACTER}", True, has_replaced=True)
    assert good == Piece(2, "good", True)
    assert isinstance(missing, BadRecord)


def test_disk_that_fails_in_the_middle_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.parquet")

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("train.data.prepare.columns._documents", fail)
    with pytest.raises(DataError, match=r"a\.parquet cannot be read \(Input/output error\)"):
        read(path)
