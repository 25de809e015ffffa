"""From pieces of text to tokens in the right split.

Owns what is done to a document's text: normal form, hash, split, tokens, separator. The split is a
function of the hash alone, so a document falls on the same side in every corpus. Called by `task`.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, cast

import numpy as np

from train.data.prepare.readers import Piece
from train.data.prepare.recipe import Recipe
from train.data.prepare.shards import HASH_BYTES, SplitWriter
from train.data.prepare.tokenizer import TextEncoder

_MAX_BATCH_DOCUMENTS = 8192


class Advance(NamedTuple):
    """What a task has done since it last said so. `source_bytes`: of the files, packed or not."""

    documents: int
    tokens: int
    text_bytes: int
    source_bytes: int


class DocumentSink:
    """Collects documents until there are enough for the tokenizer, and hands them to the writers.

    A document that comes in pieces goes through a file of its own: only its end tells its hash.
    """

    def __init__(
        self, recipe: Recipe, encoder: TextEncoder, writers: Sequence[SplitWriter], spilled: Path
    ) -> None:
        self._normalise = recipe.normalise
        self._first_hash = round(recipe.validation_share * 2**64)
        self._batch_characters = min(recipe.batch_characters, recipe.shard_tokens)
        self._encoder = encoder
        self._writers = writers
        self._texts: list[str] = []
        self._data: list[bytes] = []
        self._places: list[tuple[int, int]] = []
        self._batched_characters = 0
        self._long = _LongDocument(spilled)
        self._unsaid = Advance(0, 0, 0, 0)
        self.num_read = 0
        self.num_empty = 0
        self.num_characters = 0
        self.num_not_utf8 = 0

    @property
    def is_full(self) -> bool:
        """Whether it is time to flush."""
        return (
            self._batched_characters >= self._batch_characters
            or len(self._texts) >= _MAX_BATCH_DOCUMENTS
            or self._unsaid.text_bytes > 0
        )

    def add(self, file: int, piece: Piece) -> None:
        """Take a document, or the next piece of one."""
        text, data, has_surrogates = self._clean(piece.text)
        has_replaced = piece.has_replaced or has_surrogates
        if not piece.is_last or self._long.is_open:
            self._add_piece(file, piece, text, data)
            self._long.has_replaced |= has_replaced
            if piece.is_last:
                self._end_long(file, piece.line)
        elif text:
            self._texts.append(text)
            self._data.append(data)
            self._places.append((file, piece.line))
            self._batched_characters += len(text)
            self.num_characters += len(text)
            self.num_read += 1
            self.num_not_utf8 += has_replaced
        else:
            self.num_empty += 1

    def flush(self, source_bytes: int) -> Advance:
        """Write what was collected; return what was done since the last flush."""
        self._write_batch()
        done = self._unsaid._replace(source_bytes=source_bytes)
        self._unsaid = Advance(0, 0, 0, 0)
        return done

    def drop_open(self) -> None:
        """Forget the pieces of a document whose end cannot be read."""
        self._long.drop()

    def _clean(self, text: str) -> tuple[str, bytes, bool]:
        """Return the normal form, the same in UTF-8, and whether it had to be changed for that."""
        if self._normalise != "none":
            form = cast(Literal["NFC", "NFKC"], self._normalise.upper())
            text = unicodedata.normalize(form, text)
        try:
            return text, text.encode(), False
        except UnicodeEncodeError:  # crawls hold lone surrogates, which no encoder takes
            data = text.encode(errors="replace")
            return data.decode(), data, True

    def _write_batch(self) -> None:
        if not self._texts:
            return
        tokens, lengths = self._encoder.encode(self._texts, self._data)
        hashes = b"".join(blake2b(data, digest_size=HASH_BYTES).digest() for data in self._data)
        documents = np.empty((3, len(lengths)), dtype=np.int64)
        documents[0] = np.cumsum(lengths) - lengths
        documents[1:] = np.array(self._places, dtype=np.int64).T
        self._note(len(lengths), len(tokens), sum(map(len, self._data)))
        self._texts, self._data, self._places, self._batched_characters = [], [], [], 0
        is_held_out = self._is_held_out(hashes)
        if not is_held_out.any():
            self._writers[0].add(tokens, documents, hashes)
            return
        rows = np.frombuffer(hashes, dtype=f"V{HASH_BYTES}")
        for writer, chosen in zip(self._writers, (~is_held_out, is_held_out), strict=True):
            if chosen.any():
                part = documents[:, chosen]
                part[0] = np.cumsum(lengths[chosen]) - lengths[chosen]
                writer.add(tokens[np.repeat(chosen, lengths)], part, rows[chosen].tobytes())

    def _is_held_out(self, hashes: bytes) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        numbers = np.frombuffer(hashes, dtype="<u8")[:: HASH_BYTES // 8]
        return cast(
            "np.ndarray[tuple[int], np.dtype[np.bool_]]", numbers < np.uint64(self._first_hash)
        )

    def _add_piece(self, file: int, piece: Piece, text: str, data: bytes) -> None:
        self._write_batch()
        tokens, _ = self._encoder.encode([text], [data])
        if not piece.is_last:
            tokens = tokens[:-1]
        self._long.add(tokens.tobytes(), data, len(text))
        self._note(int(piece.is_last), len(tokens), len(data))

    def _end_long(self, file: int, line: int) -> None:
        self.num_read += 1
        self.num_characters += self._long.num_characters
        self.num_not_utf8 += self._long.has_replaced
        digest = self._long.finish()
        writer = self._writers[int(self._is_held_out(digest)[0])]
        document = np.array([[0], [file], [line]], dtype=np.int64)
        item_bytes = np.dtype(self._encoder.dtype).itemsize
        writer.add_spilled(self._long.path, item_bytes, document, digest)
        self._long.drop()

    def _note(self, documents: int, tokens: int, text_bytes: int) -> None:
        unsaid = self._unsaid
        self._unsaid = Advance(
            unsaid.documents + documents,
            unsaid.tokens + tokens,
            unsaid.text_bytes + text_bytes,
            0,
        )


class _LongDocument:
    """The tokens of a document that comes in pieces, in a file, and the hash of its text."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None
        self._hash = blake2b(digest_size=HASH_BYTES)
        self.num_characters = 0
        self.has_replaced = False

    @property
    def is_open(self) -> bool:
        """Whether pieces came, and no end."""
        return self._file is not None

    def add(self, tokens: bytes, data: bytes, num_characters: int) -> None:
        """Take the next piece."""
        if self._file is None:
            self._file = self.path.open("wb")
            self._hash = blake2b(digest_size=HASH_BYTES)
            self.num_characters = 0
            self.has_replaced = False
        self.num_characters += num_characters
        self._file.write(tokens)
        self._hash.update(data)

    def finish(self) -> bytes:
        """Close the file and return the hash."""
        if self._file is not None:
            self._file.close()
            self._file = None
        return self._hash.digest()

    def drop(self) -> None:
        """Remove the file."""
        self.finish()
        self.path.unlink(missing_ok=True)
