"""The text that a tokenizer is trained on.

Owns which part of a big corpus that is: some of each task, so that no part of the corpus is unknown
to its tokenizer. Called by `job` and by `train.data.corpus`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from train.data.prepare.plan import Task, text_bytes
from train.data.prepare.readers import Piece, Position, read_records
from train.data.prepare.recipe import Recipe
from train.data.prepare.sources import SourceFile
from train.data.prepare.tokenizer import MAX_TRAINING_CHARACTERS


def training_texts(
    sources: Sequence[SourceFile],
    tasks: Sequence[Task],
    recipe: Recipe,
    max_characters: int = MAX_TRAINING_CHARACTERS,
) -> Iterator[str]:
    """Yield text of the corpus in order: all of it, or about `max_characters` from all over it.

    Bad records are passed by; the pass that writes the tokens reports them.
    """
    if sum(text_bytes(source) for source in sources) <= max_characters:
        for task in tasks:
            yield from _texts(sources, task, recipe)
        return
    left = max_characters
    for number, task in enumerate(tasks):
        quota = left // (len(tasks) - number)
        for text in _texts(sources, task, recipe):
            yield text[:quota]
            left -= min(quota, len(text))
            quota -= len(text)
            if quota <= 0:
                break


def _texts(sources: Sequence[SourceFile], task: Task, recipe: Recipe) -> Iterator[str]:
    for source in sources[task.first_file : task.last_file]:
        for record in read_records(source, recipe, Position(), task.start, task.stop):
            if isinstance(record, Piece) and record.text:
                yield record.text.encode(errors="replace").decode()
