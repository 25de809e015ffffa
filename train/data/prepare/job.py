"""A preparation from plan to manifest: taken up again where a kill left it.

Owns the sequence of steps, who does the tasks, and when bad records are too many. Called by the
command and by `train.data.corpus`.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from train.data.prepare.documents import Advance
from train.data.prepare.finish import EmptyCorpusError, Finish
from train.data.prepare.inputs import is_remote, open_binary
from train.data.prepare.plan import Task
from train.data.prepare.progress import Listener
from train.data.prepare.recipe import Recipe, check_recipe
from train.data.prepare.sources import PLAN_FILE, SourceFile, changed_sources
from train.data.prepare.task import TaskResult, TaskRunner, TooManyBadRecordsError, task_name
from train.data.prepare.tokenizer import (
    TOKENIZER_FILE,
    BytesEncoder,
    FileEncoder,
    TextEncoder,
    write_tokenizer,
)
from train.data.prepare.training_text import training_texts
from train.data.prepare.work_folder import (
    Job,
    OutputError,
    clear,
    finished,
    locked,
    read_json,
    settings_of,
    take_up,
)
from train.data.prepare.workers import Workers
from train.durable import fsync_file, write_json
from train.errors import DataError

_TOKENIZER_RECORD = "tokenizer-record.json"
_READ_BYTES = 2**20


def run_job(job: Job, listener: Listener) -> dict[str, Any]:
    """Prepare a corpus and return its manifest; what an earlier call has done is taken up.

    Raises: DataError with what is in the way; what is done stays.
    """
    check_recipe(job.recipe)
    settings = settings_of(job)
    try:
        with locked(job):
            return _run_locked(job, settings, listener)
    except OSError as error:
        kept = " What is done is kept: run the same command again."
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise OutputError(
            f"the corpus could not be written to {job.folder} ({error.strerror or error}); "
            + ("make room there." + kept if is_full else "give a folder that you may write to.")
        ) from error


def _run_locked(job: Job, settings: dict[str, Any], listener: Listener) -> dict[str, Any]:
    whole = finished(job, settings)
    if whole is not None:
        shutil.rmtree(job.work, ignore_errors=True)
        return whole
    tasks = take_up(job, settings)
    encoder = _encoder(job, tasks, listener)
    _run_tasks(job, tasks, encoder, listener)
    listener.stage("finishing")
    changed = changed_sources(s for s in job.sources if not is_remote(s.address))
    if changed:
        raise DataError(
            f"{', '.join(changed[:5])} changed while it was prepared; run the same command with "
            "--overwrite to start over"
        )
    results = [_result(job.work, number) for number in range(len(tasks))]
    finish = Finish(
        folder=job.folder,
        work=job.work,
        sources=job.sources,
        tasks=tasks,
        recipe=job.recipe,
        encoder=encoder,
        settings=settings,
    )
    try:
        manifest = finish.run(results)
    except EmptyCorpusError:
        clear(job)  # no other settings could make use of it
        raise
    shutil.rmtree(job.work, ignore_errors=True)
    return manifest


def _encoder(job: Job, tasks: Sequence[Task], listener: Listener) -> TextEncoder:
    """Return the tokenizer; it is trained or fetched once, and then lies in the work folder."""
    if job.tokenizer.kind == "bytes":
        return BytesEncoder()
    record = job.work / _TOKENIZER_RECORD
    path = job.work / TOKENIZER_FILE
    if not record.exists():
        if job.tokenizer.kind == "bpe":
            listener.stage("training the tokenizer")
        separator = write_tokenizer(
            job.tokenizer, path, training_texts(job.sources, tasks, job.recipe)
        )
        fsync_file(path)
        write_json(record, {"separator": separator, "kind": job.tokenizer.kind})
    return _open_encoder(job.work)


def _open_encoder(work: Path) -> TextEncoder:
    record = work / _TOKENIZER_RECORD
    if not record.exists():
        return BytesEncoder()
    noted = read_json(record)
    path = work / TOKENIZER_FILE
    return FileEncoder(path, kind=noted["kind"], separator=noted["separator"])


def open_work(
    work: Path, max_bad_records: int, advance: Callable[[Advance], None]
) -> tuple[TaskRunner, list[Task]]:
    """Return what a worker needs of a job that is under way."""
    plan = read_json(work / PLAN_FILE)
    sources = [SourceFile.of_json(values) for values in plan["sources"]]
    recipe = Recipe.of_settings(plan["settings"])
    runner = TaskRunner(work, sources, recipe, _open_encoder(work), max_bad_records, advance)
    return runner, [Task(*values) for values in plan["tasks"]]


def _run_tasks(job: Job, tasks: Sequence[Task], encoder: TextEncoder, listener: Listener) -> None:
    is_done = [(job.work / f"{task_name(n)}.json").exists() for n in range(len(tasks))]
    waiting = [number for number, done in enumerate(is_done) if not done]
    done = [number for number, done in enumerate(is_done) if done]
    num_bad = sum(_result(job.work, number).bad_records for number in done)
    listener.start(
        num_bytes=sum(source.num_bytes for source in job.sources),
        num_bytes_done=sum(_task_bytes(tasks[number], job.sources) for number in done),
    )
    with ExitStack() as stack:
        # Memory of this process is not there in another.
        is_here = any(source.address.startswith("memory:") for source in job.sources)
        if job.num_processes > 1 and len(waiting) > 1 and not is_here:
            count = min(job.num_processes, len(waiting))
            workers = stack.enter_context(Workers(job.work, count, job.max_bad_records))
            numbers = workers.run(waiting, listener.advance)
        else:
            stack.enter_context(_threads(job.has_own_threads))
            numbers = _run_here(job, tasks, encoder, waiting, listener)
        try:
            for number in numbers:
                num_bad += _result(job.work, number).bad_records
                if num_bad > job.max_bad_records:
                    raise TooManyBadRecordsError(_result(job.work, number), number)
        except TooManyBadRecordsError as error:
            raise _too_many(job, tasks, error) from error


def _run_here(
    job: Job,
    tasks: Sequence[Task],
    encoder: TextEncoder,
    waiting: Sequence[int],
    listener: Listener,
) -> Iterator[int]:
    runner = TaskRunner(
        job.work, job.sources, job.recipe, encoder, job.max_bad_records, listener.advance
    )
    for number in waiting:
        runner.run(tasks[number], number)
        yield number


@contextmanager
def _threads(has_own_threads: bool) -> Iterator[None]:
    """Say to the tokenizer how many threads it may use, while the context lasts."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if has_own_threads else "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _too_many(job: Job, tasks: Sequence[Task], error: TooManyBadRecordsError) -> DataError:
    """Return the error that names the first bad record, with its line in the whole file."""
    bad, task = error.result.listed[-1], tasks[error.number]
    address = job.sources[bad.file].address
    place = address
    if bad.line:
        place = f"{address}: line {bad.line + _count_lines(address, task.start)}"
    more = ""
    if job.max_bad_records:
        more = (
            f"; with it there are more than {job.max_bad_records} bad records: raise "
            "data.max_bad_records (`trimtab prepare --max-bad-records`) to leave them out"
        )
    return DataError(f"{place} {bad.reason}; {bad.advice}{more}")


def _count_lines(address: str, stop: int) -> int:
    """Return how many lines begin before byte `stop`, other than the one that `stop` is in."""
    num_lines, left, last = 0, stop, b"\n"
    with open_binary(address) as stream:
        while left > 0 and (part := stream.read(min(left, _READ_BYTES))):
            num_lines += part.count(b"\n")
            left -= len(part)
            last = part[-1:]
    return num_lines + (last != b"\n")


def _task_bytes(task: Task, sources: Sequence[SourceFile]) -> int:
    if task.is_range:
        return task.stop - task.start
    return sum(source.num_bytes for source in sources[task.first_file : task.last_file])


def _result(work: Path, number: int) -> TaskResult:
    return TaskResult.of_json(read_json(work / f"{task_name(number)}.json"))
