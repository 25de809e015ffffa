"""Text in columns: Parquet files, and the Arrow files of datasets that were saved to disk.

The one module that knows pyarrow; it is imported when the first such file is met. Rows count from
1, like lines. Refuses a file without the column, which is a wrong setting and no bad record.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any, BinaryIO

from train.data.prepare.inputs import open_binary, unreadable
from train.data.prepare.readers import (
    Piece,
    Position,
    Records,
    cut_pieces,
    cut_short,
    decode,
    no_text,
    too_long,
)
from train.data.prepare.recipe import Recipe
from train.data.prepare.sources import Format, SourceFile
from train.errors import DataError

_BATCH_ROWS = 1024
_ARROW_FILE_MAGIC = b"ARROW1"


def read_rows(
    source: SourceFile, recipe: Recipe, position: Position, start: int, stop: int
) -> Records:
    """Yield the documents of a file, or of the share `[start, stop)` of its bytes.

    Raises: DataError if pyarrow is missing, or the file is damaged or has no such column of text.
    """
    pyarrow = _pyarrow(source)
    with closing(open_binary(source.address)) as stream:
        try:
            yield from _documents(
                _columns(pyarrow, stream, source, recipe, start, stop), recipe, position
            )
        except (pyarrow.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise unreadable(source.address, error) from error
            raise cut_short(source, error) from error


def _pyarrow(source: SourceFile) -> Any:
    try:
        import pyarrow  # type: ignore[import-untyped]  # it ships no types
        import pyarrow.ipc  # type: ignore[import-untyped]
        import pyarrow.parquet  # type: ignore[import-untyped]
    except ImportError as error:
        raise DataError(
            f"{source.address} is {source.format.title()}, which needs a package: pip install "
            "pyarrow, or pip install 'trimtab[data]'"
        ) from error
    return pyarrow


def _documents(
    columns: Iterator[tuple[list[Any], int]], recipe: Recipe, position: Position
) -> Records:
    for values, num_bytes in columns:
        for text in values:
            position.lines += 1
            has_replaced = False
            if isinstance(text, bytes):
                text, has_replaced = decode(text)
            if text is None:
                yield no_text(position.lines, recipe)
            elif (
                len(text) <= recipe.piece_characters and len(text) * 4 <= recipe.max_document_bytes
            ):
                yield Piece(position.lines, text, True, has_replaced)
            elif len(text.encode(errors="replace")) > recipe.max_document_bytes:
                yield too_long(position.lines, recipe)
            else:
                size = recipe.piece_characters
                yield from cut_pieces(text, position.lines, size, has_replaced=has_replaced)
        position.num_bytes += num_bytes


def _columns(
    pyarrow: Any, stream: BinaryIO, source: SourceFile, recipe: Recipe, start: int, stop: int
) -> Iterator[tuple[list[Any], int]]:
    """Yield values of the text column, with about how many bytes of the file they stand for."""
    if source.format is Format.ARROW:
        head = stream.read(len(_ARROW_FILE_MAGIC))
        stream.seek(0)
        is_file = head == _ARROW_FILE_MAGIC
        reader = (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(stream)
        _check_column(pyarrow, reader.schema, source, recipe)
        before = 0
        numbers = range(reader.num_record_batches) if is_file else None
        batches = map(reader.get_batch, numbers) if numbers is not None else iter(reader)
        for batch in batches:
            now = stream.tell()
            yield _values(pyarrow, batch.column(recipe.text_key)), max(0, now - before)
            before = now
        return
    parquet = pyarrow.parquet.ParquetFile(stream)
    _check_column(pyarrow, parquet.schema_arrow, source, recipe)
    groups = _row_groups(parquet.metadata, source.num_bytes, start, stop)
    num_rows = max(1, parquet.metadata.num_rows)
    batches = parquet.iter_batches(
        _BATCH_ROWS, row_groups=groups, columns=[recipe.text_key], use_threads=False
    )
    for batch in batches if groups else ():
        values = _values(pyarrow, batch.column(0))
        yield values, source.num_bytes * len(values) // num_rows


def _row_groups(metadata: Any, num_bytes: int, start: int, stop: int) -> list[int]:
    """Return the row groups whose first row lies in the share `[start, stop)` of the file."""
    if stop < 0:
        return list(range(metadata.num_row_groups))
    first, groups = 0, []
    for group in range(metadata.num_row_groups):
        # In whole numbers, so that each group is in exactly one share.
        if start * metadata.num_rows <= first * num_bytes < stop * metadata.num_rows:
            groups.append(group)
        first += metadata.row_group(group).num_rows
    return groups


def _check_column(pyarrow: Any, schema: Any, source: SourceFile, recipe: Recipe) -> None:
    if recipe.text_key not in schema.names:
        raise DataError(
            f"{source.address} has no column {recipe.text_key!r}, but {', '.join(schema.names)}; "
            "set data.text_key (`trimtab prepare --text-key`) to the one that holds the text"
        )
    kind = schema.field(recipe.text_key).type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    types = pyarrow.types
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
        raise DataError(
            f"{source.address}: column {recipe.text_key!r} holds {kind}, and text is expected; set "
            "data.text_key (`trimtab prepare --text-key`) to the one that holds it"
        )


def _values(pyarrow: Any, column: Any) -> list[Any]:
    """Return the values of a column of text; in bytes, if one of them is not UTF-8."""
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        if pyarrow.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        values = column.cast(pyarrow.large_binary()).to_pylist()
    return values
