"""From documents to tokens: trains or reads the tokenizer, and writes the file of tokens.

Each document is followed by one separator. Notes where each document lies. Called by preparation,
in one process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from train.data.files import numbered_documents
from train.data.origins import DocumentLog
from train.errors import DataError
from train.settings import DataSettings, TokenizerKind, TokenizerSettings

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_DOCUMENT = "<|endoftext|>"
BYTES_END_OF_DOCUMENT = 256


class _Document(NamedTuple):
    """The text of a document, which file of the corpus it is in, and its line there, from 1."""

    file: int
    line: int | None
    text: str


class Encoder:
    """Trains or reads the tokenizer at construction; then writes documents as tokens."""

    def __init__(
        self,
        files: Sequence[Path],
        data: DataSettings,
        settings: TokenizerSettings,
        folder: Path,
    ) -> None:
        self._files = files
        self._text_key = data.text_key
        self._tokenizer: Tokenizer | None = None
        if settings.kind is TokenizerKind.BPE:
            self._tokenizer = self._train(settings.vocab_size)
        elif settings.kind is TokenizerKind.FILE:
            self._tokenizer = read_tokenizer(Path(str(settings.path)).expanduser())
        if self._tokenizer is None:
            self.vocab_size = BYTES_END_OF_DOCUMENT + 1
        else:
            self.vocab_size = self._tokenizer.get_vocab_size()
            self._tokenizer.save(str(folder / "tokenizer.json"))
        self.dtype = "uint16" if self.vocab_size <= 2**16 else "uint32"

    def write(self, path: Path) -> DocumentLog:
        """Write all documents, each followed by the separator; return where they lie."""
        log = DocumentLog()
        with path.open("wb") as file:
            for batch in self._batches():
                texts = [document.text for document in batch]
                for document, tokens in zip(batch, self._encode(texts), strict=True):
                    array = np.asarray(tokens, dtype=self.dtype)
                    file.write(array.tobytes())
                    log.add(file=document.file, line=document.line, num_tokens=len(array))
        return log

    def _documents(self) -> Iterator[_Document]:
        for number, path in enumerate(self._files):
            for line, text in numbered_documents(path, self._text_key):
                if text:
                    yield _Document(number, line, text)

    def _batches(self) -> Iterator[list[_Document]]:
        batch: list[_Document] = []
        num_characters = 0
        for document in self._documents():
            batch.append(document)
            num_characters += len(document.text)
            if num_characters > 2_000_000:
                yield batch
                batch, num_characters = [], 0
        if batch:
            yield batch

    def _encode(self, texts: list[str]) -> Iterator[list[int]]:
        if self._tokenizer is None:
            for text in texts:
                yield [*text.encode(), BYTES_END_OF_DOCUMENT]
            return
        end = self._tokenizer.token_to_id(END_OF_DOCUMENT)
        assert end is not None, "every tokenizer here has the separator"
        for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            yield [*encoding.ids, end]

    def _train(self, vocab_size: int) -> Tokenizer:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_DOCUMENT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        texts = (document.text for document in self._documents())
        tokenizer.train_from_iterator(texts, trainer)
        return tokenizer


def read_tokenizer(path: Path) -> Tokenizer:
    """Return the tokenizer of a tokenizer.json, with the separator among its tokens.

    Raises: DataError if the file is none.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception for any bad file
        raise DataError(f"tokenizer.path={path} is not a tokenizer.json ({error})") from error
    if tokenizer.token_to_id(END_OF_DOCUMENT) is None:
        tokenizer.add_special_tokens([END_OF_DOCUMENT])
    return tokenizer
