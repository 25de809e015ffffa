"""The command line of preparation: options, progress on stderr, a summary on stdout.

Owns what the user reads at the end. Refuses contradictory options before anything is listed.
Called by `train/prepare.py`, which `trimtab prepare` starts, and as a worker by itself.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from train.data.prepare.finish import BAD_RECORDS_FILE
from train.data.prepare.job import open_work, run_job
from train.data.prepare.notes import notes
from train.data.prepare.progress import Bar, Lines, Listener
from train.data.prepare.recipe import MAX_DOCUMENT_BYTES, SHARD_TOKENS, Recipe, check_recipe
from train.data.prepare.sources import list_sources
from train.data.prepare.tokenizer import TOKENIZER_FILE, TokenizerChoice
from train.data.prepare.verify import stray_files, verify_folder
from train.data.prepare.work_folder import Job
from train.data.prepare.workers import WORKER_OPTION, serve
from train.errors import DataError, TrimtabError

_MAX_SHOWN_BAD_RECORDS = 3
_INTERRUPTED = 130
_TERMINATED = 143


class _TerminatedError(BaseException):
    """SIGTERM came."""


class _Warnings(logging.Handler):
    """Writes to the stderr of the moment, which is not that of the start while a bar is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        sys.stderr.write(f"{record.levelname}: {record.getMessage()}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run with the arguments of the command line and return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == [WORKER_OPTION]:
        folder, max_bad_records = Path(given[1]), int(given[2])
        serve(lambda advance: open_work(folder, max_bad_records, advance), sys.stdin, sys.stdout)
        return 0
    logging.basicConfig(handlers=[_Warnings()])
    try:
        with _hearing_sigterm():
            options = _parser().parse_args(given)
            if options.verify is not None:
                _verify(options)
            else:
                _prepare(options)
    except TrimtabError as error:
        sys.stderr.write(f"trimtab: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("trimtab: interrupted; the same command goes on from here\n")
        return _INTERRUPTED
    except _TerminatedError:
        sys.stderr.write("trimtab: stopped by SIGTERM; the same command goes on from here\n")
        return _TERMINATED
    return 0


@contextmanager
def _hearing_sigterm() -> Iterator[None]:
    """Have SIGTERM, with which schedulers stop a job, end it like Ctrl-C does."""

    def stop(_number: int, _frame: FrameType | None) -> NoReturn:
        raise _TerminatedError

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise DataError(f"{message}; see `trimtab prepare --help`")


def _parser() -> argparse.ArgumentParser:
    recipe = Recipe()
    parser = _Parser(prog="trimtab prepare", description=__doc__)
    parser.add_argument("sources", nargs="*")
    parser.add_argument("--output")
    parser.add_argument("--verify")
    parser.add_argument("--tokenizer", default="bpe:32000")
    parser.add_argument("--separator")
    parser.add_argument("--text-key", default=recipe.text_key)
    parser.add_argument("--normalise", default=recipe.normalise)
    parser.add_argument("--deduplicate", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--validation-share", type=float, default=recipe.validation_share)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--max-bad-records", type=int, default=1000)
    parser.add_argument("--max-document-bytes", type=int, default=MAX_DOCUMENT_BYTES)
    parser.add_argument("--shard-tokens", type=int, default=SHARD_TOKENS)
    parser.add_argument("--overwrite", action="store_true")
    return parser


def _verify(options: argparse.Namespace) -> None:
    if options.sources or options.output:
        raise DataError("--verify takes a prepared folder alone; leave SOURCES and --output out")
    folder = Path(options.verify).expanduser()
    problems = verify_folder(folder)
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise DataError(
            f"{options.verify} is damaged; prepare it again with --overwrite:\n{listed}"
        )
    sys.stdout.write(f"{options.verify} is whole: all sizes, digests and documents fit\n")
    strays = stray_files(folder)
    if strays:
        sys.stdout.write(f"no part of it: {', '.join(strays)}\n")


def _prepare(options: argparse.Namespace) -> None:
    started = time.monotonic()
    job = _job(options)
    with _listener() as listener:
        manifest = run_job(job, listener)
    sys.stdout.write(summary(job, manifest, time.monotonic() - started))


def _job(options: argparse.Namespace) -> Job:
    if not options.sources:
        raise DataError(
            "no SOURCES given; name files, folders, globs or addresses such as s3://..."
        )
    if not options.output:
        raise DataError("no --output given; name the folder that the corpus is to be in")
    for name, least in (("processes", 1), ("max_bad_records", 0)):
        if getattr(options, name) < least:
            option = f"--{name.replace('_', '-')}"
            raise DataError(f"{option}={getattr(options, name)} is too small; use {least} or more")
    if "://" in options.output:
        raise DataError(
            f"--output={options.output} is remote; give a local folder, and copy it when it is done"
        )
    recipe = Recipe(
        text_key=options.text_key,
        normalise=options.normalise,
        deduplicate=options.deduplicate,
        validation_share=options.validation_share,
        max_document_bytes=options.max_document_bytes,
        shard_tokens=options.shard_tokens,
    )
    check_recipe(recipe)
    tokenizer = TokenizerChoice.parse(options.tokenizer, options.separator)
    folder = Path(options.output).expanduser()
    return Job(
        folder=folder,
        sources=list_sources(options.sources, but=os.path.normpath(folder), option="SOURCES"),
        recipe=recipe,
        tokenizer=tokenizer,
        num_processes=options.processes,
        max_bad_records=options.max_bad_records,
        overwrite=options.overwrite,
    )


@contextmanager
def _listener() -> Iterator[Listener]:
    if sys.stderr.isatty():
        with Bar(sys.stderr) as bar:
            yield bar
    else:
        yield Lines(sys.stderr)


def summary(job: Job, manifest: dict[str, Any], seconds: float) -> str:
    """Return what a user reads at the end."""
    counts, tokenizer = manifest["counts"], manifest["tokenizer"]
    lines = [f"{job.folder} is prepared, after {seconds:.1f} s"]
    for split, part in manifest["splits"].items():
        lines.append(
            f"  {split:<12}{part['num_tokens']:,} tokens of {part['num_documents']:,} documents in "
            f"{len(part['shards']):,} files"
        )
    lines.append(
        f"  {'tokenizer':<12}{tokenizer['kind']}, {manifest['vocab_size']:,} tokens, "
        f"{tokenizer['separator']} ({tokenizer['separator_id']}) behind each document"
    )
    lines.append(
        f"  {'left out':<12}{counts['duplicates']:,} duplicates, {counts['empty']:,} empty "
        f"documents, {counts['bad_records']:,} bad records"
    )
    if counts["bad_records"]:
        lines += _bad_records(job.folder, counts["bad_records"])
    lines += [f"  {'note':<12}{note}" for note in notes(manifest)]
    overrides = [f"data.paths=[{job.folder}]", "tokenizer=bytes"]
    if tokenizer["kind"] != "bytes":
        path = f"tokenizer.path={job.folder / TOKENIZER_FILE}"
        overrides[1:] = ["tokenizer=file", path, f"model.vocab_size={manifest['vocab_size']}"]
    lines.append(f"train on it with: {shlex.join(overrides)}")
    return "\n".join(lines) + "\n"


def _bad_records(folder: Path, count: int) -> list[str]:
    path = folder / BAD_RECORDS_FILE
    listed = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    lines = [
        f"    {bad['file']}:{bad['line']} {bad['reason']}"
        for bad in listed[:_MAX_SHOWN_BAD_RECORDS]
    ]
    if count > len(lines):
        lines.append(f"    and {count - len(lines):,} more; the first of them are in {path}")
    return lines
