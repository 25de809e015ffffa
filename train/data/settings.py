"""The shape of the configuration of data and tokenizer. Values live in `conf/`, combinations are
checked in `checks.py`. Imports no torch and no numpy.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, ClassVar

from pydantic import BeforeValidator, ConfigDict, Field

from train.amounts import (
    REFUSE_UNKNOWN,
    Amount,
    AmountField,
    AmountUnit,
    Count,
    NonNegative,
    PositiveFloat,
    Share,
)


def _one_or_many(value: object) -> object:
    return (value,) if isinstance(value, str) else value


class Packing(StrEnum):
    """How documents become samples of one length."""

    CONCATENATE = "concatenate"
    """All documents behind one another, cut every `sequence_length` tokens."""
    BEST_FIT = "best_fit"
    """Whole documents where they fit, the rest of a sample is padding."""


class Normalise(StrEnum):
    """Unicode normalisation of text before it is tokenised."""

    NONE = "none"
    NFC = "nfc"
    NFKC = "nfkc"


class Verify(StrEnum):
    """What is compared with the manifest when a corpus is opened."""

    SIZES = "sizes"
    DIGESTS = "digests"


class OnBadShard(StrEnum):
    """What happens if files of tokens are missing or damaged."""

    STOP = "stop"
    SKIP = "skip"
    """Their samples go into the skip ledger, and the run says so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceSettings:
    """`data.sources.NAME`: one source of a mixture.

    `weight`: its share of the samples, relative to the others'. `max_epochs`: how often it is read
    at most; null: without limit. `text_key`: null takes `data.text_key`.
    """

    __pydantic_config__: ClassVar[ConfigDict] = REFUSE_UNKNOWN
    paths: Annotated[tuple[str, ...], BeforeValidator(_one_or_many)]
    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    max_epochs: PositiveFloat | None = None
    text_key: str | None = None


_AT_ONCE = Amount(0, AmountUnit.TOKENS)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSettings:
    """One of `data.stages`: from `start` on, sources have these weights.

    `ramp`: how long the shares take to get there, in a straight line; 0: at once.
    """

    __pydantic_config__: ClassVar[ConfigDict] = REFUSE_UNKNOWN
    start: AmountField
    weights: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]]
    ramp: AmountField = _AT_ONCE


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSettings:
    """`data`: the corpus, or a mixture of several, and how it becomes samples.

    `paths` is one source, `sources` are several. Without either, the corpus is the running
    interpreter's own standard library.
    """

    __pydantic_config__: ClassVar[ConfigDict] = REFUSE_UNKNOWN
    paths: Annotated[tuple[str, ...], BeforeValidator(_one_or_many)]
    sources: dict[str, SourceSettings]
    stages: tuple[StageSettings, ...]
    text_key: str
    normalise: Normalise
    deduplicate: bool
    max_bad_records: NonNegative
    token_dtype: str | None
    sequence_length: Count
    packing: Packing
    isolates_documents: bool
    block_samples: Count | None
    window_blocks: Count
    validation_share: Share
    validation_samples: NonNegative
    validation_interval_steps: Count | None
    read_ahead_batches: NonNegative
    verify: Verify
    on_bad_shard: OnBadShard
    cache_dir: str | None
    cache_bytes: Count

    def named_sources(self) -> dict[str, SourceSettings]:
        """Return the sources, sorted by name: their order in the config changes nothing.

        `paths` alone is one that is called text.
        """
        return dict(sorted(self.sources.items())) or {"text": SourceSettings(paths=self.paths)}


class TokenizerKind(StrEnum):
    """Which tokenizer."""

    BPE = "bpe"
    FILE = "file"
    BYTES = "bytes"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerSettings:
    """`tokenizer`: trained on the corpus, read from a `tokenizer.json`, or plain bytes.

    `path`: a tokenizer.json, a folder with one, or a name on the Hugging Face hub. `separator`: the
    token behind each document; null takes the tokenizer's own.
    """

    __pydantic_config__: ClassVar[ConfigDict] = REFUSE_UNKNOWN
    kind: TokenizerKind
    path: str | None
    vocab_size: Annotated[int, Field(ge=257)]
    separator: str | None = None
