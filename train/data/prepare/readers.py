"""The documents of one file, or of a part of it, in pieces that fit in memory.

Owns lines, JSON, packings and text. A record that cannot be read is handed on as such: whoever
called decides how many are too many. Refuses a file that ends too early, since nobody knows how
much of it is lost, and to hold more than a piece of a text file, or `max_document_bytes` of a
record.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any, BinaryIO, NamedTuple, cast

from train.data.prepare.inputs import open_binary, unreadable
from train.data.prepare.recipe import Recipe
from train.data.prepare.sources import Format, SourceFile
from train.errors import DataError

_SKIP_BYTES = 2**20
# Each byte of a .zst can stand for 32 KB of text: little is unpacked at a time.
_ZSTD_READ_BYTES = 2**13
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_MAX_CUT_TRIALS = 64
# Enough to see the first record of a JSON text.
_JSON_HEAD_CHARACTERS = 2**16
_MAX_NAMED_FIELDS = 5
_COUNTED_REPLACE = "trimtab.counted_replace"


class _Replacements:
    """Does what `errors="replace"` does, and counts: how the library does it leaves no trace."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, error: UnicodeError) -> tuple[str, int]:
        assert isinstance(error, UnicodeDecodeError), "it is registered for decoding alone"
        self.count += 1
        return "\N{REPLACEMENT CHARACTER}", error.end


@cache
def _replacements() -> _Replacements:
    """Return the one of this process, known to codecs as `_COUNTED_REPLACE` from then on."""
    replacements = _Replacements()
    codecs.register_error(_COUNTED_REPLACE, replacements)
    return replacements


class Piece(NamedTuple):
    """A document, or a piece of a long one. `line`: from 1; 0 if the file is one document.

    `has_replaced`: what was not UTF-8 became U+FFFD.
    """

    line: int
    text: str
    is_last: bool
    has_replaced: bool = False


class BadRecord(NamedTuple):
    """A record that cannot be read; it ends the document whose pieces came before it."""

    line: int
    reason: str
    advice: str


@dataclass(slots=True)
class Position:
    """How far a reader is: lines or rows that it has met, bytes of the file (packed or not)."""

    lines: int = 0
    num_bytes: int = 0


Records = Iterator[Piece | BadRecord]


def read_records(
    source: SourceFile, recipe: Recipe, position: Position, start: int = 0, stop: int = -1
) -> Records:
    """Yield the documents that begin in bytes `[start, stop)` of a file; -1: up to its end.

    Lines count from the start of the range. Raises: DataError if the file cannot be opened, or ends
    too early.
    """
    if source.format in (Format.PARQUET, Format.ARROW):
        from train.data.prepare.columns import read_rows

        yield from read_rows(source, recipe, position, start, stop)
        return
    with closing(open_binary(source.address)) as raw:
        try:
            with closing(_unpack(raw, source)) as stream:
                if source.format is Format.JSONL:
                    lines = _lines(stream, raw, recipe, position, start, stop)
                    yield from _json_documents(lines, recipe)
                else:
                    yield from _text_pieces(stream, raw, recipe, position)
        except (EOFError, zlib.error, lzma.LZMAError, OSError, _zstd_error(source)) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise unreadable(source.address, error) from error
            raise cut_short(source, error) from error


def cut_short(source: SourceFile, error: BaseException) -> DataError:
    """Return the error for a file that cannot be unpacked to its end."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return DataError(
        f"{source.address} cannot be unpacked ({reason}): it is damaged or cut short; get it once "
        "more, or take it out of the sources (data.paths)"
    )


def cut_pieces(
    text: str, line: int, piece_characters: int, *, has_replaced: bool = False
) -> Iterator[Piece]:
    """Yield a document as pieces of at most `piece_characters`."""
    begin = 0
    while len(text) - begin > piece_characters:
        piece = text[begin : begin + piece_characters]
        place = cut_place(piece)
        yield Piece(line, piece[:place], False, has_replaced)
        begin += place
    yield Piece(line, text[begin:], True, has_replaced)


def cut_place(text: str) -> int:
    """Return where `text` is cut such that tokens and normal forms stay what they would be.

    That is behind a line end or before a space that stands alone, else behind any line end, before
    any space, or at the end. In the second half only, so that pieces stay long.
    """
    least = len(text) // 2
    for sign, shift in (("\n", 1), (" ", 0)):
        place = len(text) - 1
        for _ in range(_MAX_CUT_TRIALS):
            place = text.rfind(sign, least, place)
            if place < 1:
                break
            if not text[place - 1].isspace() and not text[place + 1].isspace():
                return place + shift
    for place in (text.rfind("\n", least) + 1, text.rfind(" ", least)):
        if place > 0:
            return place
    return len(text)


def _unpack(raw: BinaryIO, source: SourceFile) -> BinaryIO:
    if source.packing == "gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw, mode="rb"))
    if source.packing == "bz2":
        return cast(BinaryIO, bz2.BZ2File(raw, "rb"))
    if source.packing == "xz":
        return cast(BinaryIO, lzma.LZMAFile(raw, "rb"))
    if source.packing == "zst":
        return cast(BinaryIO, io.BufferedReader(_ZstdStream(raw, source.address), _SKIP_BYTES))
    return raw


def _zstd_error(source: SourceFile) -> type[Exception]:
    if source.packing != "zst":
        return EOFError
    try:
        import zstandard
    except ImportError:
        return EOFError
    return cast(type[Exception], zstandard.ZstdError)


class _ZstdStream(io.RawIOBase):
    """Unpacks frame after frame; a frame that ends too early is an error, unlike in the library."""

    def __init__(self, raw: BinaryIO, address: str) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise DataError(
                f"{address} is packed with zstd, which needs a package: pip install zstandard, or "
                "pip install 'trimtab[data]'"
            ) from error
        self._raw = raw
        self._library = zstandard.ZstdDecompressor(max_window_size=2**31)
        self._frame: Any = None
        self._packed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if not self._packed:
                self._packed = self._raw.read(_ZSTD_READ_BYTES)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("the file ends inside a frame")
                return 0
            if self._frame is None:
                self._frame = self._library.decompressobj()
            self._ready = memoryview(self._frame.decompress(self._packed))
            self._packed = b""
            if self._frame.eof:
                self._packed = self._frame.unused_data
                self._frame = None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def _lines(
    stream: BinaryIO, raw: BinaryIO, recipe: Recipe, position: Position, start: int, stop: int
) -> Iterator[tuple[int, bytes | None]]:
    """Yield the lines that begin in `[start, stop)` with their number; None: one that is too long.

    A line is never held beyond what is allowed.
    """
    offset = start
    if start > 0:  # the line that `start` is in the middle of belongs to the range before
        stream.seek(start - 1)
        offset += _skip_line(stream) - 1
    most = recipe.max_document_bytes
    while stop < 0 or offset < stop:
        line: bytes | None = stream.readline(most + 1)
        if not line:
            break
        offset += len(line)
        if len(line) > most and not line.endswith(b"\n"):
            offset += _skip_line(stream)
            line = None
        position.lines += 1
        position.num_bytes = offset - start if stream is raw else raw.tell()
        if line is not None and offset == len(line) and line.startswith(_BYTE_ORDER_MARK):
            line = line[len(_BYTE_ORDER_MARK) :]
        yield position.lines, line


def _skip_line(stream: BinaryIO) -> int:
    skipped = 0
    while True:
        part = stream.readline(_SKIP_BYTES)
        skipped += len(part)
        if not part or part.endswith(b"\n"):
            return skipped


def _json_documents(lines: Iterator[tuple[int, bytes | None]], recipe: Recipe) -> Records:
    key = recipe.text_key
    for number, line in lines:
        if line is None:
            yield too_long(number, recipe)
            continue
        if line.isspace():
            continue
        content, has_replaced = decode(line)
        try:
            record = json.loads(content)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else error
            advice = "each line of a .jsonl file is one JSON object"
            yield BadRecord(number, f"is not JSON ({reason})", advice)
            continue
        text = record.get(key) if isinstance(record, dict) else None
        if not isinstance(text, str):
            yield no_text(number, recipe, _text_fields(record))
            continue
        # It may have been in another field.
        has_replaced = has_replaced and "\N{REPLACEMENT CHARACTER}" in text
        if len(text) <= recipe.piece_characters:
            yield Piece(number, text, True, has_replaced)
        else:
            yield from cut_pieces(text, number, recipe.piece_characters, has_replaced=has_replaced)


def _text_fields(record: object) -> list[str]:
    fields = record.items() if isinstance(record, dict) else ()
    return [str(name) for name, value in fields if isinstance(value, str)]


def decode(data: bytes) -> tuple[str, bool]:
    """Return UTF-8 as text, and whether some of it was none and is replaced."""
    try:
        return data.decode(), False
    except UnicodeDecodeError:
        return data.decode(errors="replace"), True


def has_records(text: str, recipe: Recipe) -> bool:
    """Return whether a JSON text looks as if its documents lay in a field of its objects."""
    head = text[:_JSON_HEAD_CHARACTERS].lstrip()
    field = re.escape(json.dumps(recipe.text_key))
    return head.startswith(("[", "{")) and re.search(rf"{field}\s*:", head) is not None


def too_long(line: int, recipe: Recipe) -> BadRecord:
    """Return the bad record of a line or row that is too long to be held."""
    reason = f"is longer than {recipe.max_document_bytes:,} bytes"
    return BadRecord(line, reason, "raise --max-document-bytes of `trimtab prepare`, or cut it")


def no_text(line: int, recipe: Recipe, fields: Iterable[str] = ()) -> BadRecord:
    """Return the bad record of a line or row without text; `fields` are those that hold some."""
    reason = f"has no text under {recipe.text_key!r}"
    named = ", ".join(f"{field:.40}" for field in islice(fields, _MAX_NAMED_FIELDS))
    if named:
        reason += f", but under {named}"
    advice = "set data.text_key (`trimtab prepare --text-key`) to the field that holds it"
    return BadRecord(line, reason, advice)


def _text_pieces(stream: BinaryIO, raw: BinaryIO, recipe: Recipe, position: Position) -> Records:
    """Yield one document: a whole file, in pieces."""
    most = recipe.piece_characters
    replacements = _replacements()
    before = replacements.count
    with io.TextIOWrapper(stream, encoding="utf-8-sig", errors=_COUNTED_REPLACE) as text:
        ready = ""
        is_end = False
        while not is_end:
            wanted = most + 1 - len(ready)
            more = text.read(wanted)
            position.num_bytes = raw.tell()
            is_end = len(more) < wanted
            if "\0" in more:
                reason = "is not text (it has NUL bytes)"
                yield BadRecord(0, reason, "take it out of data.paths")
                return
            ready += more
            if not is_end:
                place = cut_place(ready[:most])
                yield Piece(0, ready[:place], False, replacements.count > before)
                ready = ready[place:]
        yield Piece(0, ready, True, replacements.count > before)
