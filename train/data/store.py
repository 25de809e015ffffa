"""The token store: the tokens of one split, by offset.

Owns the way from an offset to shards and their documents. Reads from memory maps, which are opened
when they are first needed; refuses a shard whose file is missing or of another size when it opens
it, and so late that a run whose other shards are whole can go on without it. Knows nothing of
samples. Called by samples on all ranks; no collective. One thread may announce while another reads.
"""

from __future__ import annotations

import itertools
import logging
from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from train.data import addresses
from train.data.cache import ShardCache
from train.data.mapped import MappedShards, digest_problem
from train.data.origins import DocumentIndex, SampleOrigin
from train.data.settings import Verify
from train.data.shards import Corpus, Shard, Split
from train.errors import DataError

logger = logging.getLogger(__name__)

Offsets = npt.NDArray[np.int64]

_SKIPPING = "set data.on_bad_shard=skip"


class TokenStore:
    """Tokens of a split by offset: the concatenation of its shards.

    `verify=digests` compares digests in `check`, or, without a call of it, when a shard is opened:
    both read all of it. `bad_shards`: addresses that `bad` tells of; to read them fails.
    """

    def __init__(
        self,
        corpus: Corpus,
        split: Split,
        *,
        cache: ShardCache | None = None,
        verify: Verify = Verify.SIZES,
        bad_shards: frozenset[str] = frozenset(),
    ) -> None:
        shards = split.shards
        self.dtype: np.dtype[np.integer] = np.dtype(corpus.dtype)
        self.num_tokens = split.num_tokens
        self.has_documents = bool(shards) and all(shard.documents for shard in shards)
        self._shards = shards
        self._cache = cache
        self._verify = verify
        self._files = corpus.files
        self._repair = _repair(corpus)
        self._starts = np.cumsum([0, *(shard.num_tokens for shard in shards)], dtype=np.int64)
        self._boundaries: list[int] = self._starts.tolist()
        counts = [each.documents.num_documents if each.documents else 1 for each in shards]
        self._documents_before = [0, *itertools.accumulate(counts)]
        is_bad = [shard.address in bad_shards for shard in shards]
        # One longer than shards: how many bad ones lie before each.
        self._bad_before = np.cumsum([0, *is_bad], dtype=np.int64)
        self._mapped = MappedShards(
            shards,
            dtype=self.dtype,
            cache=cache,
            verifies_digests=verify is Verify.DIGESTS,
            repair=self._repair,
        )
        self._indices: dict[int, DocumentIndex] = {}
        # How many documents a row is looked through for at first; found by trial.
        self._width = 8

    def read(
        self,
        offsets: Offsets,
        out: npt.NDArray[np.integer],
        places: Sequence[int] | npt.NDArray[np.int64] | None = None,
    ) -> None:
        """Fill row `places[i]` of `out` (row i without) with the tokens from `offsets[i]` on.

        `out`: [m, L], of the store's dtype or a wider one. Raises: DataError if a shard cannot be
        opened or is not what it should be; IndexError if there are no such tokens.
        """
        if not len(offsets):
            return
        length = out.shape[1]
        low, high = self._span(offsets, length)
        number = bisect_right(self._boundaries, low) - 1
        rows: slice | Sequence[int] | npt.NDArray[np.int64]
        rows = slice(len(offsets)) if places is None else places
        if high <= self._boundaries[number + 1]:
            start = self._boundaries[number]
            windows = self._mapped.get(number).windows(length)
            out[rows] = windows[offsets - start if start else offsets]
        else:
            targets = range(len(offsets)) if places is None else places
            self._read_each(offsets, out, targets)

    def _read_each(
        self,
        offsets: Offsets,
        out: npt.NDArray[np.integer],
        places: Sequence[int] | npt.NDArray[np.int64],
    ) -> None:
        """Read row by row, from several shards; rows may lie across their boundaries."""
        length = out.shape[1]
        boundaries = self._boundaries
        numbers = (np.searchsorted(self._starts, offsets, side="right") - 1).tolist()
        for number, offset, place in zip(numbers, offsets.tolist(), places, strict=True):
            first = offset - boundaries[number]
            if offset + length <= boundaries[number + 1]:
                # Kept under no name: a remote shard gives way to the next one only so.
                out[place] = self._mapped.get(number).tokens[first : first + length]
                continue
            for part, first, last in self._pieces(offset, offset + length):
                at = boundaries[part] + first - offset
                out[place, at : at + last - first] = self._mapped.get(part).tokens[first:last]

    def announce(self, offsets: Offsets, length: int) -> None:
        """Have the rows that will be read later come from the disk, or their shards from afar.

        Does not wait for them. Raises: DataError if a local shard cannot be opened.
        """
        if not len(offsets):
            return
        self._span(offsets, length)
        numbers = np.searchsorted(self._starts, offsets, side="right") - 1
        for number, offset in zip(numbers.tolist(), offsets.tolist(), strict=True):
            if offset + length <= self._boundaries[number + 1]:
                self._announce(number, offset - self._boundaries[number], length)
                continue
            for part, first, last in self._pieces(offset, offset + length):
                self._announce(part, first, last - first)

    def _announce(self, number: int, first: int, length: int) -> None:
        mapped = self._mapped.get_if_open(number)
        if mapped is None:
            shard = self._shards[number]
            if addresses.is_remote(shard.address):
                assert self._cache is not None, "a store of remote shards has a cache"
                self._cache.prefetch(shard.address, shard.num_bytes, shard.sha256)
                return
            mapped = self._mapped.get(number)
        mapped.announce(first, length)

    def document_starts(self, offsets: Offsets, length: int) -> npt.NDArray[np.int32]:
        """Return the columns where documents begin in rows of `length` tokens: int32 [n, K].

        The first is 0, even in the midst of a document; they ascend, `length` stands for none. No
        token is read. Raises: DataError if an index cannot be read; only with `has_documents`.
        """
        if not len(offsets):
            return np.zeros((0, 1), dtype=np.int32)
        low, high = self._span(offsets, length)
        number = bisect_right(self._boundaries, low) - 1
        if high <= self._boundaries[number + 1]:
            local = offsets - self._boundaries[number]
            return self._starts_in(self._index(number).begins, local, length)
        columns, counts = self._columns(offsets, length)
        rows, ranks = _places(counts)
        starts = np.full((len(offsets), 1 + int(counts.max())), length, dtype=np.int32)
        starts[:, 0] = 0
        starts[rows, ranks + 1] = columns
        return starts

    def _starts_in(
        self, begins: npt.NDArray[np.int64], offsets: Offsets, length: int
    ) -> npt.NDArray[np.int32]:
        """Return where documents begin in rows of one shard.

        One search a row, and a look at as many documents behind it as rows mostly have: a second
        search for the last one costs more. Rows that have more of them are looked at again.
        """
        firsts = begins.searchsorted(offsets, side="right")
        while True:
            width = self._width
            places = firsts[:, None] + np.arange(width)
            columns = begins.take(places, mode="clip") - offsets[:, None]
            if int(firsts.max()) + width > len(begins):
                columns[places >= len(begins)] = length
            count = int((columns < length).sum(axis=1).max(initial=0))
            if count < width or width > len(begins):
                break
            self._width = 2 * width
        starts = np.empty((len(offsets), 1 + count), dtype=np.int32)
        starts[:, 0] = 0
        np.minimum(columns[:, :count], length, out=starts[:, 1:], casting="unsafe")
        return starts

    def _columns(self, offsets: Offsets, length: int) -> tuple[Offsets, Offsets]:
        """Return the columns where documents begin, row after row, and how many each row has.

        Column 0 is left out. For rows in several shards: one search a row and shard.
        """
        found, shifts, counts, counts_of_rows = [], [], [], []
        for offset in offsets.tolist():
            counts_of_rows.append(0)
            for number, first, last in self._pieces(offset, offset + length):
                begins = self._index(number).begins
                shift = self._boundaries[number] - offset
                # A row that began in an earlier shard sees this one's first document begin.
                start, stop = begins.searchsorted((first if shift > 0 else first + 1, last))
                found.append(begins[start:stop])
                shifts.append(shift)
                counts.append(stop - start)
                counts_of_rows[-1] += stop - start
        columns = np.concatenate(found) + np.repeat(shifts, counts)
        return columns, np.array(counts_of_rows, dtype=np.int64)

    def documents_within(self, start: int, stop: int) -> tuple[SampleOrigin, ...]:
        """Return the stretches of documents that make up the tokens `[start, stop)`, in order.

        A shard that does not say where its documents are counts as one, its file being theirs.
        Raises: DataError if an index cannot be read.
        """
        found: list[SampleOrigin] = []
        for number, first, last in self._pieces(start, stop):
            shard = self._shards[number]
            before = self._documents_before[number]
            if shard.documents is not None:
                found += self._index(number).within(first, last, first_document=before)
                continue
            found.append(
                SampleOrigin(
                    file=shard.address,
                    line=None,
                    document=before,
                    token_offset_in_document=first,
                    num_tokens=last - first,
                )
            )
        return tuple(found)

    def bad(self, offsets: Offsets, length: int) -> npt.NDArray[np.bool_]:
        """Return which rows of `length` tokens touch a bad shard: bool [n]."""
        if not self._bad_before[-1]:
            return np.zeros(len(offsets), dtype=np.bool_)
        firsts = np.searchsorted(self._starts, offsets, side="right") - 1
        lasts = np.searchsorted(self._starts, offsets + (length - 1), side="right") - 1
        return self._bad_before[lasts + 1] > self._bad_before[firsts]

    def check(self) -> list[str]:
        """Return the addresses of shards that are missing or damaged; logs what is wrong."""
        return [self._shards[number].address for number in self.problems()]

    def problems(self, part: slice = slice(None)) -> dict[int, str]:
        """Return what is wrong with which shard, by number; each text says what to do.

        `part`: which shards to look at. Sizes, also of the documents; with `verify=digests` digests
        of local shards too. What is downloaded is always compared with its digest.
        """
        verifies_digests = self._verify is Verify.DIGESTS
        found = addresses.for_each(
            lambda shard: _problem(shard, verifies_digests=verifies_digests), self._shards[part]
        )
        problems: dict[int, str] = {}
        for number, problem in zip(range(len(self._shards))[part], found, strict=True):
            if problem is not None:
                problems[number] = f"{problem}; {self._repair}"
                logger.warning("%s", problem)
        self._mapped.verifies_digests = False  # all are known; those with problems were named
        return problems

    def close(self) -> None:
        """Close all files; a later call opens them again."""
        self._mapped.close()
        self._indices.clear()

    def _span(self, offsets: Offsets, length: int) -> tuple[int, int]:
        low, high = int(offsets.min()), int(offsets.max()) + length
        if low < 0 or high > self.num_tokens or length < 1:
            raise IndexError(f"tokens {low} to {high} of {self.num_tokens} were asked for")
        return low, high

    def _pieces(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Return shard number, first and last token in it, for each shard of `[start, stop)`."""
        pieces = []
        number = bisect_right(self._boundaries, start) - 1
        while start < stop:
            begin, end = self._boundaries[number : number + 2]
            if start < end:
                pieces.append((number, start - begin, min(stop, end) - begin))
                start = end
            number += 1
        return pieces

    def _index(self, number: int) -> DocumentIndex:
        if (index := self._indices.get(number)) is None:
            index = self._indices[number] = self._open_index(self._shards[number])
        return index

    def _open_index(self, shard: Shard) -> DocumentIndex:
        documents = shard.documents
        assert documents is not None, "the caller asks has_documents first"
        if addresses.is_remote(documents.address):
            assert self._cache is not None, "a store of remote shards has a cache"
            path = self._cache.path(documents.address, documents.num_bytes, documents.sha256)
        else:
            path = Path(documents.address)
        return DocumentIndex.open(
            path,
            documents,
            shard=shard.address,
            num_tokens=shard.num_tokens,
            files=self._files,
            # Who asks for documents cannot do without those of one shard.
            repair=self._repair.removesuffix(f", or {_SKIPPING}"),
        )


def check_vocabulary(
    rows: npt.NDArray[np.integer], vocab_size: int, where: str | Callable[[int], str]
) -> None:
    """Refuse tokens that the model does not have; costs one pass over `rows`, [n, L].

    `where`: what the rows are, or a function from the number of a row to what that one is. Raises:
    DataError with the first bad token.
    """
    if not rows.size:
        return
    # Negative ones become the largest.
    ids = rows.view(f"u{rows.dtype.itemsize}")
    if int(ids.max()) < vocab_size:
        return
    row, column = (int(place[0]) for place in np.nonzero(ids >= vocab_size))
    place = where if isinstance(where, str) else where(row)
    raise DataError(
        f"token {int(rows[row, column])} at column {column} of {place} is not in the vocabulary, "
        f"which has {vocab_size}: the corpus was tokenised with another tokenizer, or is damaged; "
        "set model.vocab_size to that tokenizer's, or run with data.verify=digests"
    )


def _repair(corpus: Corpus) -> str:
    again = f"delete {corpus.address} and prepare the corpus again" if corpus.is_prepared else ""
    ways = ["bring the file back whole", again, _SKIPPING]
    return ", or ".join(way for way in ways if way)


def _problem(shard: Shard, *, verifies_digests: bool) -> str | None:
    try:
        return _difference(shard, verifies_digests=verifies_digests)
    except OSError as error:
        return f"{shard.address} cannot be read ({error.strerror or error})"


def _difference(shard: Shard, *, verifies_digests: bool) -> str | None:
    files = [each for each in (shard, shard.documents) if each and each.num_bytes is not None]
    for file in files:
        found = addresses.num_bytes(file.address)
        if found is None:
            return f"{file.address} is missing"
        if found != file.num_bytes:
            return f"{file.address} has {found:,} bytes, {file.num_bytes:,} were expected"
    for file in files if verifies_digests else ():
        if file.sha256 is not None and not addresses.is_remote(file.address):
            problem = digest_problem(file.address, file.sha256, Path(file.address))
            if problem is not None:
                return problem
    return None


def _places(counts: Offsets) -> tuple[Offsets, Offsets]:
    """Return row and rank in its row of each of `counts` things, one row after the other."""
    rows = np.repeat(np.arange(len(counts)), counts)
    return rows, np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
