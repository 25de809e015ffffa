"""One task: reads its documents, and writes them as shards of tokens.

Owns what is done to a document's text, its hash, and the split it falls into. All is a pure
function of the task's input. Called in the process of the job, or in one of its workers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from train.data.prepare.documents import Advance, DocumentSink
from train.data.prepare.plan import Task
from train.data.prepare.readers import BadRecord, Position, has_records, read_records
from train.data.prepare.recipe import Recipe
from train.data.prepare.shards import SPLITS, SplitWriter, TaskShard
from train.data.prepare.sources import SourceFile
from train.data.prepare.tokenizer import TextEncoder
from train.durable import write_json

MAX_LISTED_BAD_RECORDS = 100
# Of a task's result, what the corpus has the sum of.
COUNTS = ("documents_read", "empty", "bad_records", "characters", "not_utf8", "json_as_text")


class ListedBadRecord(NamedTuple):
    """A bad record; its line counts from the start of the task's range."""

    file: int
    line: int
    reason: str
    advice: str


@dataclass(slots=True, kw_only=True)
class TaskResult:
    """What a finished task leaves on record. `num_lines`: that its range of a file has.

    `not_utf8`: documents with characters that were replaced. `json_as_text`: files of one JSON text
    whose objects have the field that holds text.
    """

    documents_read: int = 0
    empty: int = 0
    bad_records: int = 0
    characters: int = 0
    not_utf8: int = 0
    json_as_text: int = 0
    num_lines: int = 0
    listed: list[ListedBadRecord] = field(default_factory=list)
    shards: list[TaskShard] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return the record."""
        record: dict[str, Any] = {name: getattr(self, name) for name in (*COUNTS, "num_lines")}
        record["listed"] = [list(bad) for bad in self.listed]
        record["shards"] = [shard.as_json() for shard in self.shards]
        return record

    @classmethod
    def of_json(cls, record: dict[str, Any]) -> TaskResult:
        """Return what `as_json` was asked of."""
        listed = [ListedBadRecord(*bad) for bad in record["listed"]]
        shards = [TaskShard(**shard) for shard in record["shards"]]
        return cls(**{**record, "listed": listed, "shards": shards})


class TooManyBadRecordsError(Exception):
    """A task alone has more bad records than the whole job may; the first are in `result`."""

    def __init__(self, result: TaskResult, number: int) -> None:
        super().__init__(f"{result.bad_records} bad records in task {number}")
        self.result = result
        self.number = number


class TaskRunner:
    """Runs tasks one after another with one tokenizer; writes into one work folder."""

    def __init__(
        self,
        folder: Path,
        sources: Sequence[SourceFile],
        recipe: Recipe,
        encoder: TextEncoder,
        max_bad_records: int,
        advance: Callable[[Advance], None],
    ) -> None:
        self._folder = folder
        self._sources = sources
        self._recipe = recipe
        self._encoder = encoder
        self._max_bad_records = max_bad_records
        self._advance = advance

    def run(self, task: Task, number: int) -> TaskResult:
        """Write the shards of a task and then its record, whose presence says that it is done.

        Raises: DataError if a file cannot be read, TooManyBadRecordsError, or OSError of the disk.
        """
        name = task_name(number)
        result = TaskResult()
        writers = [
            SplitWriter(self._folder, name, split, self._recipe.shard_tokens) for split in SPLITS
        ]
        documents = DocumentSink(
            self._recipe, self._encoder, writers, self._folder / f"{name}.{os.getpid()}.tmp"
        )
        try:
            for file in range(task.first_file, task.last_file):
                self._read_file(task, file, documents, result, number)
            for writer in writers:
                writer.finish()
                result.shards += writer.shards
            result.documents_read = documents.num_read
            result.characters = documents.num_characters
            result.empty = documents.num_empty
            result.not_utf8 = documents.num_not_utf8
        finally:
            documents.drop_open()
            for writer in writers:
                writer.close()
        write_json(self._folder / f"{name}.json", result.as_json())
        return result

    def _read_file(
        self, task: Task, file: int, documents: DocumentSink, result: TaskResult, number: int
    ) -> None:
        source, position = self._sources[file], Position()
        before = 0
        is_json_begin = source.is_json_text
        records = read_records(source, self._recipe, position, task.start, task.stop)
        for record in records:
            if isinstance(record, BadRecord):
                documents.drop_open()
                result.bad_records += 1
                if len(result.listed) < MAX_LISTED_BAD_RECORDS:
                    result.listed.append(ListedBadRecord(file, *record))
                if result.bad_records > self._max_bad_records:
                    raise TooManyBadRecordsError(result, number)
                continue
            if is_json_begin:
                is_json_begin = False
                result.json_as_text += has_records(record.text, self._recipe)
            documents.add(file, record)
            if documents.is_full:
                self._advance(documents.flush(position.num_bytes - before))
                before = position.num_bytes
        size = task.stop - task.start if task.is_range else source.num_bytes
        is_last = file == task.last_file - 1
        self._advance(
            documents.flush(size - before) if is_last else Advance(0, 0, 0, size - before)
        )
        result.num_lines = position.lines


def task_name(number: int) -> str:
    """Return how the files of a task begin."""
    return f"task-{number:06d}"
