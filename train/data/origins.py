"""Where the tokens of a shard come from: each document's first token, input file and line.

Preparation writes it beside the tokens, Megatron in its `.idx`. It is read only when someone asks:
a run that does not tell documents apart has no need of it until something goes wrong. Refuses to
keep text: the files do. Called by the token store.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from train.data.megatron import first_tokens_of
from train.data.shards import DocumentsFile
from train.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOrigin:
    """A stretch of a sample that comes from one document.

    `line`: from 1, None if the file is one document. `document`: its number in the split.
    `num_tokens` counts the separator after the document, if the sample reaches that far.
    """

    file: str
    line: int | None
    document: int
    token_offset_in_document: int
    num_tokens: int


class DocumentIndex:
    """Finds the documents of any stretch of one shard by binary search.

    `first_tokens`: int64 [num_documents], ascending, relative to the shard; `begins`: the same,
    each token once. `file_numbers`, `lines`: the same shape as `first_tokens`, or None if the
    shard's own file is all there is to name.
    """

    def __init__(
        self,
        *,
        address: str,
        first_tokens: npt.NDArray[np.int64],
        file_numbers: npt.NDArray[np.int64] | None = None,
        lines: npt.NDArray[np.int64] | None = None,
        files: Sequence[str] = (),
    ) -> None:
        self.first_tokens = first_tokens
        self.begins = first_tokens
        self._address = address
        self._file_numbers = file_numbers
        self._lines = lines
        self._files = files

    @classmethod
    def open(
        cls,
        path: Path,
        documents: DocumentsFile,
        *,
        shard: str,
        num_tokens: int,
        files: Sequence[str],
        repair: str,
    ) -> DocumentIndex:
        """Open the local copy `path` of `documents`; of ours, nothing is read into memory.

        Raises: DataError if it is missing, damaged, or that of another shard.
        """
        if path.suffix == ".idx":
            index = cls(address=shard, first_tokens=first_tokens_of(path), files=(shard,))
            # Megatron keeps documents without tokens; ours have at least their separator.
            index.begins = np.unique(index.first_tokens)
            return index
        try:
            columns = np.load(path, mmap_mode="r")
        except (OSError, EOFError, ValueError) as error:
            raise DataError(f"{documents.address} cannot be read ({error}); {repair}") from error
        expected = (3, documents.num_documents)
        if columns.dtype != np.int64 or columns.shape != expected:
            raise DataError(
                f"{documents.address} holds {columns.dtype} {list(columns.shape)}, int64 "
                f"{list(expected)} was expected; {repair}"
            )
        first_tokens, file_numbers, lines = columns.view(np.ndarray)
        if first_tokens.size and not (0 == first_tokens[0] <= first_tokens[-1] < num_tokens):
            raise DataError(
                f"{documents.address} has documents from token {first_tokens[0]} to "
                f"{first_tokens[-1]} of a shard of {num_tokens}; {repair}"
            )
        return cls(
            address=documents.address,
            first_tokens=first_tokens,
            file_numbers=file_numbers,
            lines=lines,
            files=files,
        )

    def within(self, start: int, stop: int, *, first_document: int) -> list[SampleOrigin]:
        """Return the stretches of documents that make up `[start, stop)` of the shard, in order.

        `first_document`: how many documents of the split lie before this shard. Documents without
        tokens are left out. Raises: DataError if an input file is named that the corpus lacks.
        """
        first = int(np.searchsorted(self.first_tokens, start, side="right")) - 1
        last = int(np.searchsorted(self.first_tokens, stop, side="left"))
        first = max(0, first)
        begins = self.first_tokens[first:last].tolist()
        ends = [*begins[1:], stop]
        return [
            SampleOrigin(
                file=self._file(document),
                line=self._line(document),
                document=first_document + document,
                token_offset_in_document=max(0, start - begin),
                num_tokens=end - max(start, begin),
            )
            for document, begin, end in zip(range(first, last), begins, ends, strict=True)
            if end > max(start, begin)
        ]

    def _line(self, document: int) -> int | None:
        return None if self._lines is None else int(self._lines[document]) or None

    def _file(self, document: int) -> str:
        number = 0 if self._file_numbers is None else int(self._file_numbers[document])
        if not 0 <= number < len(self._files):
            raise DataError(
                f"{self._address} names input file {number} of a corpus of {len(self._files)} "
                "files; it belongs to another corpus: prepare this one again"
            )
        return self._files[number]
