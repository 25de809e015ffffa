"""The tokenizer of a corpus: read from a file or a name, trained here, or plain bytes.

Owns the separator between documents and the way from text to numbers. Refuses a separator that the
tokenizer does not have: it would be a token that no model has seen. Text that looks like a
special token is encoded as the text that it is, so no document can forge a separator. The one
module that knows the `tokenizers` package; it is imported only when one is needed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from train.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_DOCUMENT = "<|endoftext|>"
BYTES_END_OF_DOCUMENT = 256
TOKENIZER_FILE = "tokenizer.json"
# Beyond this, more text no longer changes the merges that matter, and takes minutes.
MAX_TRAINING_CHARACTERS = 200_000_000

_SEPARATORS = (
    END_OF_DOCUMENT,
    *("<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<｜end▁of▁sentence｜>", "[SEP]"),
)
Tokens = npt.NDArray[np.integer]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerChoice:
    """What was asked for. `kind`: bytes, bpe or file; `vocab_size` is that of a bpe.

    `path` of a file: a tokenizer.json, a folder with one, or a name on the Hugging Face hub.
    `separator`: the token behind each document; None: the tokenizer's own, and where none is known,
    `END_OF_DOCUMENT`, which is added. `option`: what the user gave it as.
    Raises: DataError if a separator is given for bytes.
    """

    kind: str
    path: str | None = None
    vocab_size: int = 0
    separator: str | None = None
    option: str = field(default="tokenizer.path", compare=False)

    def __post_init__(self) -> None:
        """Check the combination."""
        if self.kind == "bytes" and self.separator is not None:
            raise DataError(
                f"--separator (tokenizer.separator)={self.separator} is given, and bytes have a "
                f"separator of their own, token {BYTES_END_OF_DOCUMENT}; leave it out"
            )

    @classmethod
    def parse(cls, text: str, separator: str | None = None) -> TokenizerChoice:
        """Read `bytes`, `bpe:32000`, or anything else as a path or name.

        Raises: DataError if the size of a bpe is none.
        """
        if text == "bytes":
            return cls(kind="bytes", separator=separator)
        kind, colon, size = text.partition(":")
        if kind == "bpe":
            if not (colon and size.isascii() and size.isdigit() and int(size) >= 257):
                raise DataError(
                    f"--tokenizer={text} has no size; use for example bpe:32000, at least bpe:257"
                )
            return cls(kind="bpe", vocab_size=int(size), separator=separator)
        return cls(kind="file", path=text, separator=separator, option="--tokenizer")


class TextEncoder(Protocol):
    """Text to tokens, and what a reader must know of them."""

    kind: str
    vocab_size: int
    dtype: str
    fingerprint: str
    separator: str
    separator_id: int

    def encode(self, texts: Sequence[str], data: Sequence[bytes]) -> tuple[Tokens, Tokens]:
        """Return the tokens of all texts, a separator behind each, and how many each has with it.

        `data` are the same texts in UTF-8.
        """


class BytesEncoder:
    """256 values, and one more behind each document."""

    kind = "bytes"
    vocab_size = BYTES_END_OF_DOCUMENT + 1
    dtype = "uint16"
    fingerprint = hashlib.sha256(b"bytes").hexdigest()
    separator = END_OF_DOCUMENT
    separator_id = BYTES_END_OF_DOCUMENT

    def encode(self, texts: Sequence[str], data: Sequence[bytes]) -> tuple[Tokens, Tokens]:
        """Return the bytes of all texts, a separator behind each, and how many each has."""
        lengths = np.fromiter(map(len, data), np.int64, len(data)) + 1
        tokens = np.frombuffer(b"\0".join([*data, b""]), dtype=np.uint8).astype(np.uint16)
        tokens[np.cumsum(lengths) - 1] = self.separator_id
        return tokens, lengths


class FileEncoder:
    """The tokenizer of a `tokenizer.json` that has the separator among its tokens."""

    def __init__(self, path: Path, *, kind: str, separator: str) -> None:
        content = path.read_bytes()
        self._tokenizer = parse_tokenizer(content.decode(), str(path))
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.kind = kind
        self.vocab_size = _num_ids(self._tokenizer)
        self.dtype = "uint16" if self.vocab_size <= 2**16 else "uint32"
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self.separator = separator
        number = self._tokenizer.token_to_id(separator)
        assert number is not None, "the separator was added when the file was written"
        self.separator_id = number

    def encode(self, texts: Sequence[str], data: Sequence[bytes]) -> tuple[Tokens, Tokens]:
        """Return the tokens of all texts, a separator behind each, and how many each has."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        # The way out of the library is a list of Python integers: once each, into one array.
        numbers = [encoding.ids for encoding in encodings]
        for ids in numbers:
            ids.append(self.separator_id)
        lengths = np.fromiter(map(len, numbers), np.int64, len(numbers))
        total = int(lengths.sum())
        return np.fromiter(chain.from_iterable(numbers), np.dtype(self.dtype), total), lengths


def write_tokenizer(choice: TokenizerChoice, path: Path, texts: Iterable[str]) -> str:
    """Write the tokenizer.json that was asked for, and return its separator.

    `texts` are read if it is to be trained. A file that has the separator is copied as it is.
    Raises: DataError if it cannot be had, or lacks the separator that is asked for.
    """
    if choice.kind == "bpe":
        separator = choice.separator or END_OF_DOCUMENT
        content = train_bpe(texts, choice.vocab_size, separator).to_str(pretty=True)
    else:
        content = load_tokenizer(str(choice.path), choice.option)
        tokenizer = parse_tokenizer(content, str(choice.path), choice.option)
        separator = choice.separator or find_separator(tokenizer)
        if tokenizer.token_to_id(separator) is None:
            if choice.separator is not None:
                raise _no_separator(choice, tokenizer)
            tokenizer.add_special_tokens([separator])
            content = tokenizer.to_str(pretty=True)
        elif _is_of_text(separator, tokenizer):
            raise DataError(
                f"--separator (tokenizer.separator)={separator} is an ordinary token of "
                f"{choice.option}={choice.path}, which text has too, so documents could not be "
                "told apart; give a special token"
            )
    path.write_text(content, encoding="utf-8")
    return separator


def _is_of_text(separator: str, tokenizer: Tokenizer) -> bool:
    """Return whether plain text can become the separator."""
    tokens = tokenizer.get_added_tokens_decoder().values()
    special = {token.content for token in tokens if token.special}
    encoded = tokenizer.encode(separator, add_special_tokens=False).ids
    return separator not in special and tokenizer.token_to_id(separator) in encoded


def _no_separator(choice: TokenizerChoice, tokenizer: Tokenizer) -> DataError:
    wanted = str(choice.separator)
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    near = get_close_matches(wanted, special, cutoff=0.0)
    return DataError(
        f"--separator (tokenizer.separator)={wanted}: {choice.option}={choice.path} has no such "
        f"token; give one that it has{', such as ' if near else ''}{', '.join(near)}"
    )


def find_separator(tokenizer: Tokenizer) -> str:
    """Return the token behind documents: the tokenizer's own, if it has one that is known."""
    for separator in _SEPARATORS:
        if tokenizer.token_to_id(separator) is not None:
            return separator
    return END_OF_DOCUMENT


def load_tokenizer(path: str, option: str = "tokenizer.path") -> str:
    """Return the text of a tokenizer.json: a file's, that in a folder, or one by name on the hub.

    `option`: what the path was given as. Raises: DataError if there is none.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        local = local / TOKENIZER_FILE
    if local.exists() or path.endswith(".json") or path.startswith(("/", ".", "~")):
        try:
            return local.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(
                f"{option}={path}: {local} cannot be read ({reason}); give a tokenizer.json, "
                "a folder with one, or a name on the Hugging Face hub"
            ) from error
    from train.data.prepare.hub import fetch_tokenizer

    try:
        return str(fetch_tokenizer(path).to_str(pretty=True))
    except Exception as error:  # tokenizers raises plain Exception for all that can go wrong
        kinds = "bytes, bpe:SIZE or " if option == "--tokenizer" else ""
        raise DataError(
            f"{option}={path} is no file here, and could not be had from the Hugging Face hub "
            f"({_first_line(error)}); check the name and the network, or give {kinds}a "
            "tokenizer.json"
        ) from error


def parse_tokenizer(content: str, path: str, option: str = "tokenizer.path") -> Tokenizer:
    """Return the tokenizer that `content` describes. Raises: DataError if it describes none."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(content)
    except Exception as error:  # tokenizers raises plain Exception for any bad file
        raise DataError(f"{option}={path} is not a tokenizer.json ({error})") from error


def train_bpe(texts: Iterable[str], vocab_size: int, separator: str) -> Tokenizer:
    """Return a byte-level BPE trained on `texts`; the same texts give the same one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[separator],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(iter(texts), trainer)
    return tokenizer


def fingerprint_of(path: str, option: str = "tokenizer.path") -> str:
    """Return the sha256 of a tokenizer.json that was asked for, as it is before anything is added.

    Raises: DataError if there is none.
    """
    return hashlib.sha256(load_tokenizer(path, option).encode()).hexdigest()


def _num_ids(tokenizer: Tokenizer) -> int:
    """Return how many rows an embedding needs: ids may have holes."""
    highest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    return max(highest + 1, tokenizer.get_vocab_size())


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def describe(encoder: TextEncoder) -> dict[str, Any]:
    """Return what the manifest says of a tokenizer."""
    return {
        "kind": encoder.kind,
        "fingerprint": encoder.fingerprint,
        "separator": encoder.separator,
        "separator_id": encoder.separator_id,
    }
