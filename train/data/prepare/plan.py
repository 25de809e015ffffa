"""How the work is cut: a list of tasks that depends on the input files and the recipe alone.

Owns where big files are cut. A task is the unit of work and of what survives a kill; its documents
are a stretch of the corpus. Called by `job`; `readers` reads what a task names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from train.data.prepare.recipe import Recipe
from train.data.prepare.sources import Format, SourceFile

# Cut at this many pieces if the corpus is small, so that every core of a machine has work.
_MOST_TASKS_OF_SMALL = 256
_LEAST_TASK_BYTES = 8 * 2**20
_BYTES_A_TOKEN = 4
_PACKED_RATIO = {Format.PARQUET: 2, Format.ARROW: 1}
_TEXT_PACKED_RATIO = 4
WHOLE = -1


@dataclass(frozen=True, slots=True)
class Task:
    """Files `[first_file, last_file)` of the corpus, or bytes `[start, stop)` of a single one.

    A range holds the records that begin in it; of a columnar file, it is that share of the rows.
    """

    first_file: int
    last_file: int
    start: int = 0
    stop: int = WHOLE

    @property
    def is_range(self) -> bool:
        """Whether it is a part of a file."""
        return self.stop != WHOLE


def plan_tasks(sources: Sequence[SourceFile], recipe: Recipe) -> list[Task]:
    """Return the tasks, in the order of the corpus."""
    total = sum(text_bytes(source) for source in sources)
    most = max(1, recipe.shard_tokens * _BYTES_A_TOKEN)
    least = min(_LEAST_TASK_BYTES, most)
    return list(_cut(sources, min(most, max(least, total // _MOST_TASKS_OF_SMALL))))


def _cut(sources: Sequence[SourceFile], task_bytes: int) -> Iterator[Task]:
    first, num_bytes = 0, 0
    for number, source in enumerate(sources):
        size = text_bytes(source)
        if _can_be_cut(source) and size > 2 * task_bytes:
            if first < number:
                yield Task(first, number)
            yield from _ranges(number, source.num_bytes, -(-size // task_bytes))
            first, num_bytes = number + 1, 0
            continue
        num_bytes += size
        if num_bytes >= task_bytes:
            yield Task(first, number + 1)
            first, num_bytes = number + 1, 0
    if first < len(sources):
        yield Task(first, len(sources))


def _ranges(number: int, num_bytes: int, count: int) -> Iterator[Task]:
    for part in range(count):
        yield Task(number, number + 1, num_bytes * part // count, num_bytes * (part + 1) // count)


def _can_be_cut(source: SourceFile) -> bool:
    is_plain_lines = source.format is Format.JSONL and not source.packing
    return is_plain_lines or source.format is Format.PARQUET


def text_bytes(source: SourceFile) -> int:
    """Return about how many bytes of text a file holds."""
    ratio = _TEXT_PACKED_RATIO if source.packing else _PACKED_RATIO.get(source.format, 1)
    return source.num_bytes * ratio
