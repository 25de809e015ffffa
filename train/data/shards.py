"""What a tokenised corpus consists of: splits, their shards, and where their documents lie.

Records without behaviour. `train.data.formats` makes them from what lies on a disk or in a bucket;
the token store reads what they name. Addresses are local paths, or those of fsspec (`s3://...`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentsFile:
    """The file that says where the documents of one shard begin: `.npy` of ours, or `.idx`.

    `num_bytes`, `sha256`: None if nothing says them beforehand.
    """

    address: str
    num_documents: int
    num_bytes: int | None = None
    sha256: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One file of tokens. `num_bytes` is the whole file; its tokens begin at `byte_offset`."""

    address: str
    num_tokens: int
    num_bytes: int
    byte_offset: int = 0
    sha256: str | None = None
    documents: DocumentsFile | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """The tokens of one purpose: those of its shards, one after the other."""

    shards: tuple[Shard, ...]
    num_documents: int | None = None

    @property
    def num_tokens(self) -> int:
        """How many tokens the shards have together."""
        return sum(shard.num_tokens for shard in self.shards)


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """A tokenised corpus that was found whole as far as its own files say.

    `digest` stands for the tokens: a run remembers it. `vocab_size`, `tokenizer_fingerprint` and
    `separator_id`: None where the files do not say. `tokenizer_path`: a local tokenizer.json.
    `files`: what the text was read from, which is no part of what the corpus is.
    """

    address: str
    digest: str
    dtype: str
    vocab_size: int | None
    tokenizer_path: Path | None
    tokenizer_fingerprint: str | None
    separator_id: int | None
    train: Split
    validation: Split | None = None
    files: tuple[str, ...] = field(default=(), compare=False, repr=False)

    @property
    def is_prepared(self) -> bool:
        """Whether Trimtab wrote it, and can write it again."""
        return self.tokenizer_fingerprint is not None
