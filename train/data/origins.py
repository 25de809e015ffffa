"""Where the tokens of a corpus come from: each document's file, line and first token.

Preparation writes it beside the tokens; it is read only when someone asks, since a run has no need
of it until something goes wrong. Refuses to keep text: the files do.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from train.durable import fsync_file
from train.errors import DataError

# One row a document, in the order of the tokens.
_FIRST_TOKENS = "documents.npy"  # int64: offset of the document's first token in tokens.bin
_FILES = "document_files.npy"  # int32: which file of the corpus, in the order of `list_files`
_LINES = "document_lines.npy"  # int64: line in that file from 1, 0 if the file is one document
_NO_LINE = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOrigin:
    """A stretch of a sample that comes from one document.

    `line`: from 1, None if the file is one document. `document`: its number in the corpus.
    `num_tokens` counts the separator after the document, if the sample reaches that far.
    """

    file: str
    line: int | None
    document: int
    token_offset_in_document: int
    num_tokens: int


class DocumentLog:
    """Notes the documents while they are encoded: 20 bytes of memory each."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self._first_tokens = array("q")
        self._files = array("i")
        self._lines = array("q")

    @property
    def num_documents(self) -> int:
        """How many documents were noted."""
        return len(self._first_tokens)

    def add(self, *, file: int, line: int | None, num_tokens: int) -> None:
        """Note the next document: the number of its file, its line, its tokens with separator."""
        self._first_tokens.append(self.num_tokens)
        self._files.append(file)
        self._lines.append(_NO_LINE if line is None else line)
        self.num_tokens += num_tokens

    def write(self, folder: Path) -> None:
        """Write what was noted; returns when it is on disk."""
        columns = {_FIRST_TOKENS: self._first_tokens, _FILES: self._files, _LINES: self._lines}
        for name, column in columns.items():
            np.save(folder / name, np.array(column))
            fsync_file(folder / name)


class DocumentIndex:
    """Finds the documents of any stretch of tokens by binary search in memory-mapped files."""

    def __init__(self, folder: Path, files: Sequence[Path]) -> None:
        self._folder = folder
        self._files = files
        self._columns: tuple[npt.NDArray[np.integer], ...] | None = None

    def within(self, start: int, stop: int) -> tuple[SampleOrigin, ...]:
        """Return the stretches of documents that make up the tokens `[start, stop)`, in order.

        Raises: DataError if the files of the index are missing or do not fit the corpus.
        """
        if self._columns is None:
            self._columns = tuple(self._open(name) for name in (_FIRST_TOKENS, _FILES, _LINES))
        first_tokens, files, lines = self._columns
        first = int(np.searchsorted(first_tokens, start, side="right")) - 1
        last = int(np.searchsorted(first_tokens, stop, side="left"))
        begins = [int(offset) for offset in first_tokens[first:last]]
        ends = [*begins[1:], stop]
        return tuple(
            SampleOrigin(
                file=self._name(int(files[document])),
                line=int(lines[document]) or None,
                document=document,
                token_offset_in_document=max(0, start - begin),
                num_tokens=end - max(start, begin),
            )
            for document, begin, end in zip(range(first, last), begins, ends, strict=True)
        )

    def _open(self, name: str) -> npt.NDArray[np.integer]:
        try:
            column: npt.NDArray[np.integer] = np.load(self._folder / name, mmap_mode="r")
        except (OSError, EOFError, ValueError) as error:
            raise DataError(
                f"{self._folder / name} cannot be read ({error}); delete {self._folder} and it is "
                "made anew"
            ) from error
        return column

    def _name(self, file: int) -> str:
        if file >= len(self._files):
            raise DataError(
                f"{self._folder / _FILES} names file {file} of a corpus of {len(self._files)} "
                f"files; delete {self._folder} and it is made anew"
            )
        return str(self._files[file])
