"""Documents out of files: lines, packings, long ones in pieces, bad ones by line."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import zstandard

from train.data.prepare.readers import (
    BadRecord,
    Piece,
    Position,
    cut_pieces,
    has_records,
    read_records,
)
from train.data.prepare.recipe import Recipe
from train.data.prepare.sources import list_sources
from train.errors import DataError

RECIPE = Recipe()
ROOT = Path(__file__).resolve().parents[5]
PACK = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}


def read(
    path: Path, recipe: Recipe = RECIPE, start: int = 0, stop: int = -1
) -> list[Piece | BadRecord]:
    (source,) = list_sources([str(path)])
    return list(read_records(source, recipe, Position(), start, stop))


def texts(path: Path, recipe: Recipe = RECIPE) -> list[str]:
    return [record.text for record in read(path, recipe) if isinstance(record, Piece)]


def write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_each_line_is_a_document_with_its_line(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl", '\ufeff{"text": "one"}\r\n\n{"text": "two\\nlines", "id": 3}'
    )
    assert read(path) == [Piece(1, "one", True), Piece(3, "two\nlines", True)]


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("stem", ["a.jsonl", "a.txt"])
def test_packed_files_give_what_is_in_them(tmp_path: Path, suffix: str, stem: str) -> None:
    content = '{"text": "öne"}\n{"text": "two"}\n'.encode()
    packed = write(
        tmp_path / f"{stem}{suffix}", PACK[suffix](content[:20]) + PACK[suffix](content[20:])
    )
    plain = write(tmp_path / stem, content)
    assert read(packed) == read(plain)


@pytest.mark.parametrize("suffix", PACK)
def test_packed_file_that_ends_too_early_is_refused_by_name(tmp_path: Path, suffix: str) -> None:
    source = random.Random(0)
    lines = [json.dumps({"text": f"{source.random()}"}) for _ in range(40_000)]
    packed = PACK[suffix]("\n".join(lines).encode())
    path = write(tmp_path / f"a.jsonl{suffix}", packed[: len(packed) - 50])
    with pytest.raises(DataError, match=rf"{path} cannot be unpacked \(.*\): it is damaged or cut"):
        read(path)


@pytest.mark.parametrize("suffix", PACK)
def test_file_that_is_not_packed_as_it_says_is_refused(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a.txt{suffix}", "no packed text at all" * 10)
    with pytest.raises(
        DataError, match=rf"{path} cannot be unpacked \(.*get it once more, or take"
    ):
        read(path)


def test_lines_of_all_ranges_together_are_those_of_the_file(tmp_path: Path) -> None:
    source = random.Random(1)
    lines = [json.dumps({"text": "x" * source.randrange(40)}) for _ in range(50)]
    path = write(tmp_path / "a.jsonl", "\n".join(lines))
    size = path.stat().st_size
    whole = texts(path)
    for count in (2, 3, 7, 100, size):
        cuts = [size * part // count for part in range(count + 1)]
        found = [r for a, b in pairwise(cuts) for r in read(path, RECIPE, a, b)]
        assert [record.text for record in found if isinstance(record, Piece)] == whole


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": ', "is not JSON (Expecting value)"),
        ("[" * 100_000, "is not JSON (maximum recursion"),
        ('{"body": "a", "n": 1}', "has no text under 'text', but under body"),
        ('{"text": 5}', "has no text under 'text'"),
        ('["text"]', "has no text under 'text'"),
        ("null", "has no text under 'text'"),
        ('{"text": "' + "x" * 200_000 + '"}', "is longer than 150,000 bytes"),
    ],
)
def test_bad_line_is_named_and_the_next_is_read(tmp_path: Path, line: str, reason: str) -> None:
    path = write(tmp_path / "a.jsonl", f'{{"text": "a"}}\n{line}\n{{"text": "b"}}\n')
    first, bad, last = read(path, replace(RECIPE, max_document_bytes=150_000))
    assert (first, last) == (Piece(1, "a", True), Piece(3, "b", True))
    assert isinstance(bad, BadRecord)
    assert (bad.line, bad.reason.startswith(reason)) == (2, True)


def test_byte_that_is_no_utf8_is_replaced_and_marked(tmp_path: Path) -> None:
    replaced = "ab\N{REPLACEMENT CHARACTER}cd"
    whole = read(write(tmp_path / "a.txt", b"ab\xffcd"))
    assert whole == [Piece(0, replaced, True, has_replaced=True)]
    lines = b'{"text": "ab\xffcd"}\n{"text": "a", "id": "\xff"}\n{"text": "\xef\xbf\xbd"}'
    assert read(write(tmp_path / "a.jsonl", lines)) == [
        Piece(1, replaced, True, has_replaced=True),
        Piece(2, "a", True),
        Piece(3, "\N{REPLACEMENT CHARACTER}", True),
    ]


@pytest.mark.parametrize("content", [b"ab\xe6\x96", b"\xe6\x96\xe6\x96x", b"\xff\xfe\xc0\x80"])
def test_what_is_replaced_is_what_python_replaces(tmp_path: Path, content: bytes) -> None:
    assert texts(write(tmp_path / "a.txt", content)) == [content.decode(errors="replace")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[{"id": 1, "text": "a"}]', True),
        ('\n {"text" : "a"}', True),
        ('[{"body": "a"}]', False),
        ('a "text": b', False),
        ("", False),
    ],
)
def test_json_text_with_the_field_looks_like_records(text: str, *, expected: bool) -> None:
    assert has_records(text, RECIPE) == expected


def test_file_with_nul_bytes_is_no_text(tmp_path: Path) -> None:
    recipe = replace(RECIPE, piece_characters=10)
    *pieces, bad = read(write(tmp_path / "a.txt", b"text " * 20 + b"\0"), recipe)
    assert not any(piece.is_last for piece in pieces if isinstance(piece, Piece))
    assert bad[1] == "is not text (it has NUL bytes)"


# Pieces.


def test_pieces_of_a_long_text_file_are_the_text(tmp_path: Path) -> None:
    source = random.Random(2)
    text = "".join(source.choice("ab \n\n文") for _ in range(5000))
    recipe = replace(RECIPE, piece_characters=64)
    path = write(tmp_path / "a.txt", text)
    found = read(path, recipe)
    assert "".join(texts(path, recipe)) == text
    assert [piece.is_last for piece in found if isinstance(piece, Piece)][-2:] == [False, True]
    assert all(len(piece) <= 65 for piece in texts(path, recipe))
    assert "".join(piece.text for piece in cut_pieces(text, 0, 64)) == text


def test_pieces_end_behind_single_line_ends_if_they_can() -> None:
    text = "aaaa bbbb\ncccc\n\ndddd eeee ffff"
    assert next(cut_pieces(text, 3, 18)).text == "aaaa bbbb\n"
    assert [piece.text for piece in cut_pieces("aaaa bbbb cccc dddd", 3, 12)] == [
        "aaaa bbbb",
        " cccc dddd",
    ]
    assert [piece.text for piece in cut_pieces("文" * 10, 3, 4)] == ["文" * 4, "文" * 4, "文" * 2]


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """A packed text of 100 MB is one document; reading it takes a few pieces' worth."""
    path = tmp_path / "a.txt.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(100):
            file.write(b"some words of a long text\n" * 40_000)
    long_line = tmp_path / "b.jsonl"
    with long_line.open("wb") as file:
        file.write(b'{"text": "')
        file.truncate(200_000_000)
    script = (
        "import sys, resource\n"
        "from train.data.prepare.readers import *\n"
        "from train.data.prepare.sources import list_sources\n"
        "recipe = Recipe(max_document_bytes=2**20)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for source in list_sources(sys.argv[1:]):\n"
        "    n = sum(1 for _ in read_records(source, recipe, Position()))\n"
        "grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before\n"
        "print(grown)\n"
    )
    arguments = [sys.executable, "-c", script, str(path), str(long_line)]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 50_000  # KB


# Packages that are not there.


@pytest.mark.parametrize(
    ("name", "package"),
    [("a.txt.zst", "zstandard"), ("a.parquet", "pyarrow"), ("a.arrow", "pyarrow")],
)
def test_missing_package_is_named_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=rf"which needs a package: pip install {package}, or pip"):
        read(write(tmp_path / name, b"x"))


def test_file_that_cannot_be_opened_is_refused_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "text")
    (source,) = list_sources([str(path)])
    path.unlink()
    with pytest.raises(DataError, match=r"a\.txt cannot be read \(No such file .*; fix its perm"):
        list(read_records(source, RECIPE, Position()))


def test_disk_that_fails_in_the_middle_is_no_bad_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n')

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("train.data.prepare.readers._lines", fail)
    with pytest.raises(DataError, match=r"a\.jsonl cannot be read \(Input/output error\)"):
        read(path)
