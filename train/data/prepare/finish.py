"""The last pass: from the shards of all tasks to the finished folder.

Owns which documents are dropped as duplicates, the shards' final names, absolute lines and the
manifest, which is written last. Each step may be repeated after a kill: a file is either still in
the work folder or already under its final name. Called by `job`, in one process.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from train.data.prepare.duplicates import Mask, find_duplicates
from train.data.prepare.plan import Task
from train.data.prepare.recipe import Recipe
from train.data.prepare.shards import (
    SPLITS,
    TaskShard,
    documents_file,
    hashes_file,
    tokens_file,
    write_array,
    write_kept,
)
from train.data.prepare.sources import SourceFile
from train.data.prepare.task import COUNTS, MAX_LISTED_BAD_RECORDS, ListedBadRecord, TaskResult
from train.data.prepare.tokenizer import TOKENIZER_FILE, TextEncoder, describe
from train.durable import fsync_folder, write_atomically, write_json
from train.errors import DataError

FORMAT = "trimtab-corpus"
FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
BAD_RECORDS_FILE = "bad_records.jsonl"
_MAX_NAMED_BAD_RECORDS = 3


class EmptyCorpusError(DataError):
    """There would be nothing to train on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """All that the last pass needs: `work` holds what the tasks left, `folder` gets the corpus."""

    folder: Path
    work: Path
    sources: Sequence[SourceFile]
    tasks: Sequence[Task]
    recipe: Recipe
    encoder: TextEncoder
    settings: dict[str, Any]

    def run(self, results: Sequence[TaskResult]) -> dict[str, Any]:
        """Write the corpus and return its manifest.

        Raises: EmptyCorpusError if there would be nothing to train on.
        """
        for leftover in self.folder.glob("*.tmp"):  # of a pass that was cut short
            leftover.unlink()
        lines_before = self._lines_before(results)
        splits: dict[str, Any] = {}
        num_duplicates = 0
        for split in SPLITS:
            shards = [
                (shard, lines_before[number])
                for number, result in enumerate(results)
                for shard in result.shards
                if shard.split == split
            ]
            dropped: dict[int, Mask] = {}
            if self.recipe.deduplicate:
                dropped = find_duplicates([hashes_file(self.work, s.name) for s, _ in shards])
            num_duplicates += sum(int(mask.sum()) for mask in dropped.values())
            splits[split] = self._publish(split, shards, dropped)
        counts = {name: sum(getattr(result, name) for result in results) for name in COUNTS}
        counts["duplicates"] = num_duplicates
        listed = self._listed(results, lines_before)
        self._check_text(splits, counts["bad_records"], listed)
        self._write_bad_records(listed)
        if self.encoder.kind != "bytes":
            tokenizer = (self.work / TOKENIZER_FILE).read_text(encoding="utf-8")
            write_atomically(self.folder / TOKENIZER_FILE, tokenizer)
        manifest = self._manifest(splits, counts)
        fsync_folder(self.folder)
        write_json(self.folder / MANIFEST_FILE, manifest)
        return manifest

    def _lines_before(self, results: Sequence[TaskResult]) -> list[int]:
        """Return how many lines of its file lie before each task's range."""
        before: list[int] = []
        for number, task in enumerate(self.tasks):
            last = self.tasks[number - 1] if number else None
            is_next = last is not None and task.start > 0 and last.first_file == task.first_file
            before.append(before[-1] + results[number - 1].num_lines if is_next else 0)
        return before

    def _publish(
        self, split: str, shards: Sequence[tuple[TaskShard, int]], dropped: dict[int, Mask]
    ) -> dict[str, Any]:
        records: list[dict[str, Any]] = []
        for number, (shard, lines_before) in enumerate(shards):
            documents = np.load(documents_file(self.work, shard.name))
            mask = dropped.get(number)
            if mask is not None and mask.all():
                continue
            name = f"{split}-{len(records):05d}"
            target = tokens_file(self.folder, name)
            num_tokens, sha256 = shard.num_tokens, shard.sha256
            source = tokens_file(self.work, shard.name)
            if mask is not None:
                documents, num_tokens, sha256 = self._without(shard, documents, mask, target)
            elif source.exists():  # else it was renamed before a kill
                source.rename(target)
            documents[2] += np.where(documents[2] > 0, lines_before, 0)
            records.append(self._record(name, documents, num_tokens, sha256))
        return {
            "num_tokens": sum(record["num_tokens"] for record in records),
            "num_documents": sum(record["num_documents"] for record in records),
            "shards": records,
        }

    def _without(
        self, shard: TaskShard, documents: npt.NDArray[np.int64], mask: Mask, target: Path
    ) -> tuple[npt.NDArray[np.int64], int, str]:
        """Write a shard without the documents of `mask`; return the others, tokens and digest."""
        lengths = np.diff(documents[0], append=shard.num_tokens)
        kept = ~mask
        source = tokens_file(self.work, shard.name)
        sha256 = write_kept(source, target, np.dtype(self.encoder.dtype), lengths, kept)
        documents, lengths = documents[:, kept], lengths[kept]
        documents[0] = np.cumsum(lengths) - lengths
        return documents, int(lengths.sum()), sha256

    def _record(
        self, name: str, documents: npt.NDArray[np.int64], num_tokens: int, sha256: str
    ) -> dict[str, Any]:
        path = documents_file(self.folder, name)
        documents_sha256 = write_array(path, documents)
        return {
            "file": tokens_file(self.folder, name).name,
            "num_tokens": num_tokens,
            "num_documents": documents.shape[1],
            "num_bytes": num_tokens * np.dtype(self.encoder.dtype).itemsize,
            "sha256": sha256,
            "documents_file": path.name,
            "documents_num_bytes": path.stat().st_size,
            "documents_sha256": documents_sha256,
        }

    def _check_text(
        self, splits: dict[str, Any], num_bad: int, listed: Sequence[ListedBadRecord]
    ) -> None:
        num_train, num_validation = (splits[split]["num_tokens"] for split in SPLITS)
        if num_train + num_validation < 2:
            empty = f"the corpus is empty: {len(self.sources)} files hold no text; "
            if not listed:
                raise EmptyCorpusError(empty + "point data.paths to some")
            named = "; ".join(
                self.sources[bad.file].address
                + (f": line {bad.line} " if bad.line else " ")
                + bad.reason
                for bad in listed[:_MAX_NAMED_BAD_RECORDS]
            )
            raise EmptyCorpusError(
                f"{empty}{num_bad:,} records could not be read, the first: {named}; "
                f"{listed[0].advice}"
            )
        if num_train == 0:
            raise EmptyCorpusError(
                f"all {num_validation:,} tokens of the corpus fell into its validation split; "
                "lower data.validation_share (`trimtab prepare --validation-share`) or give more "
                "text"
            )

    def _listed(
        self, results: Sequence[TaskResult], lines_before: list[int]
    ) -> list[ListedBadRecord]:
        """Return the first bad records, with their lines in the whole file."""
        listed = [
            bad._replace(line=bad.line + (before if bad.line else 0))
            for result, before in zip(results, lines_before, strict=True)
            for bad in result.listed
        ]
        return listed[:MAX_LISTED_BAD_RECORDS]

    def _write_bad_records(self, listed: Sequence[ListedBadRecord]) -> None:
        """List the first bad records, one JSON object a line."""
        lines = [
            {"file": self.sources[bad.file].address, "line": bad.line, "reason": bad.reason}
            for bad in listed
        ]
        if lines:
            text = "".join(json.dumps(line) + "\n" for line in lines)
            write_atomically(self.folder / BAD_RECORDS_FILE, text)

    def _manifest(self, splits: dict[str, Any], counts: dict[str, int]) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "digest": digest_of(self.settings, self.encoder.fingerprint, splits),
            "dtype": self.encoder.dtype,
            "vocab_size": self.encoder.vocab_size,
            "tokenizer": describe(self.encoder),
            "splits": splits,
            "files": [source.address for source in self.sources],
            "files_num_bytes": [source.num_bytes for source in self.sources],
            "counts": counts,
            "settings": self.settings,
        }


def digest_of(settings: dict[str, Any], fingerprint: str, splits: dict[str, Any]) -> str:
    """Return the identity of a corpus's tokens: what determined them, and their own digests."""
    digests = [[shard["sha256"] for shard in splits[split]["shards"]] for split in SPLITS]
    identity = json.dumps([settings, fingerprint, digests], sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()
