"""From tokens back to text that a person reads: excerpts of samples in reports.

Never the way back to the tokens: what is no text is shown as U+FFFD. The text is as it was in the
corpus, control characters and markup with it; whoever prints it escapes it for the place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import groupby
from typing import TYPE_CHECKING

from train.data.prepare.tokenizer import (
    BYTES_END_OF_DOCUMENT,
    END_OF_DOCUMENT,
    parse_tokenizer,
)
from train.data.shards import Corpus
from train.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_ELLIPSIS = "…"


class TokenDecoder:
    """Decodes the tokens of one corpus; the separator between documents is shown as its name."""

    def __init__(self, is_token: Callable[[int], bool], join: Callable[[list[int]], str]) -> None:
        self._is_token = is_token
        self._join = join

    @classmethod
    def open(cls, corpus: Corpus) -> TokenDecoder:
        """Return the decoder of a corpus: its tokenizer, or bytes.

        The tokens of a corpus whose files do not say what they mean are shown as numbers.
        Raises: DataError if the tokenizer cannot be read.
        """
        if corpus.tokenizer_fingerprint is None:
            return cls(lambda token: True, _list_numbers)
        if corpus.tokenizer_path is None:
            return cls(lambda token: 0 <= token <= BYTES_END_OF_DOCUMENT, _join_bytes)
        path = corpus.tokenizer_path
        try:
            tokenizer = parse_tokenizer(path.read_text(encoding="utf-8"), str(path))
        except (DataError, OSError, ValueError) as error:
            raise DataError(
                f"{path} is damaged; delete {corpus.address} and prepare the corpus again"
            ) from error
        return cls(
            lambda token: _is_known(tokenizer, token),
            lambda tokens: tokenizer.decode(tokens, skip_special_tokens=False),
        )

    def decode(self, tokens: Iterable[int], max_characters: int) -> str:
        """Return the text of `tokens`, at most `max_characters` of it, cut with an ellipsis.

        Any integer is taken: one that is no token of the corpus gives U+FFFD.
        """
        numbers = [int(token) for token in tokens]
        runs = groupby(numbers, key=self._is_token)
        text = "".join(
            self._join(list(run)) if is_token else _REPLACEMENT * len(list(run))
            for is_token, run in runs
        )
        if len(text) <= max_characters:
            return text
        return text[: max(0, max_characters - 1)] + _ELLIPSIS[: max(0, max_characters)]


def _is_known(tokenizer: Tokenizer, token: int) -> bool:
    return 0 <= token < 2**32 and tokenizer.id_to_token(token) is not None


def _list_numbers(tokens: list[int]) -> str:
    return " ".join(map(str, tokens))


def _join_bytes(tokens: list[int]) -> str:
    pieces = groupby(tokens, key=lambda token: token == BYTES_END_OF_DOCUMENT)
    return "".join(
        END_OF_DOCUMENT * len(list(piece)) if is_end else bytes(piece).decode(errors="replace")
        for is_end, piece in pieces
    )
