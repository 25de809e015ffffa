"""What determines the tokens of a corpus, besides its text and its tokenizer.

Owns the defaults. Refuses what could only be a mistake. Everything here is part of the identity of
a half-done output and of the finished corpus.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from train.errors import DataError

# Raised when the same text and recipe give other tokens.
TOKENS_VERSION = 3

NORMALISATIONS = ("none", "nfc", "nfkc")
MAX_DOCUMENT_BYTES = 256 * 2**20
SHARD_TOKENS = 256 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How text is read and cut.

    `validation_share`: of the documents, by the hash of their text. `max_document_bytes`: records
    of JSONL and columnar files that are longer are bad; text files have no limit.
    `shard_tokens`: about how many tokens a file gets. `piece_characters`: longer documents are
    tokenised in pieces of at most so many. `batch_characters`: tokenised in one call.
    """

    text_key: str = "text"
    normalise: str = "none"
    deduplicate: bool = True
    validation_share: float = 0.005
    max_document_bytes: int = MAX_DOCUMENT_BYTES
    shard_tokens: int = SHARD_TOKENS
    piece_characters: int = 2**20
    batch_characters: int = 2**20

    def as_settings(self) -> dict[str, Any]:
        """Return the recipe as the manifest keeps it."""
        return {"tokens_version": TOKENS_VERSION, **asdict(self)}

    @classmethod
    def of_settings(cls, settings: dict[str, Any]) -> Recipe:
        """Return the recipe that `as_settings` was asked of."""
        return cls(**{name: settings[name] for name in cls.__dataclass_fields__})


def check_recipe(recipe: Recipe) -> None:
    """Raises: DataError naming the option whose value cannot be."""
    if recipe.normalise not in NORMALISATIONS:
        raise DataError(
            f"--normalise={recipe.normalise} is unknown; use one of {', '.join(NORMALISATIONS)}"
        )
    if not 0 <= recipe.validation_share < 1:
        raise DataError(
            f"--validation-share={recipe.validation_share:g} is no share of the documents; use 0 "
            "or more, and less than 1"
        )
    least = {
        "--max-document-bytes": recipe.max_document_bytes,
        "--shard-tokens": recipe.shard_tokens,
    }
    for option, value in least.items():
        if value < 1:
            raise DataError(f"{option}={value} is too small; use 1 or more")
