"""The corpora of a run: opens those that are tokens, and has text tokenised once.

The cache is addressed by content: the same text and settings are prepared once on a machine, and a
kill while preparing leaves nothing that looks whole. Every rank may call it; a file lock lets one
work while the others wait, with no process group.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from train.data.cache import ShardCache
from train.data.formats import is_tokens, open_corpus
from train.data.prepare.inputs import is_remote, unreadable
from train.data.prepare.job import run_job
from train.data.prepare.notes import notes
from train.data.prepare.plan import plan_tasks, text_bytes
from train.data.prepare.progress import Lines, Silence
from train.data.prepare.recipe import Recipe
from train.data.prepare.sources import SourceFile, list_sources
from train.data.prepare.tokenizer import TokenizerChoice, fingerprint_of, write_tokenizer
from train.data.prepare.training_text import training_texts
from train.data.prepare.work_folder import Job, OutputError, StaleWorkError, is_half_done
from train.data.settings import DataSettings, SourceSettings, TokenizerKind, TokenizerSettings
from train.data.shards import Corpus
from train.durable import write_json
from train.errors import DataError

__all__ = ["cache_folder", "open_sources"]

logger = logging.getLogger(__name__)

# Raised when a cached folder holds other files: it is made anew, and its tokens stay the same.
_LAYOUT_VERSION = 3
# Less text is tokenised in this process, whose tokenizer then has all cores.
_SMALL_BYTES = 64 * 2**20
# More text is told from other text by sizes and times alone: reading it would take minutes.
_DIGESTED_BYTES = 4 * 2**30


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Text:
    """A source that is text: its files, how they are read, and what stands for their content."""

    sources: Sequence[SourceFile]
    recipe: Recipe
    digest: str


def open_sources(data: DataSettings, tokenizer: TokenizerSettings) -> dict[str, Corpus]:
    """Return the corpus of each source of a run; text is prepared first if the cache lacks it.

    Raises: DataError if a file cannot be read, there is no text, or the sources' tokens are not of
    one tokenizer.
    """
    folder = cache_folder(data)
    named = data.named_sources()
    texts: dict[str, _Text] = {}
    for name, source in named.items():
        with _naming(data, name):
            if not _is_tokens(source.paths):
                texts[name] = _text(source, data, folder)
    choice, key = _tokenizer(tokenizer, list(texts.values()), folder)
    corpora: dict[str, Corpus] = {}
    for name, source in named.items():
        with _naming(data, name):
            if name in texts:
                corpora[name] = _prepared(texts[name], data, choice, key, folder)
            else:
                cache = ShardCache(folder, max_bytes=data.cache_bytes)
                corpora[name] = open_corpus(source.paths, dtype=data.token_dtype, cache=cache)
    _check_tokenizers(corpora, texts)
    if tokenizer.kind is TokenizerKind.FILE and not texts:
        logger.warning(
            "tokenizer.path=%s is not used: it is for text, and every source is tokens already",
            tokenizer.path,
        )
    return corpora


def cache_folder(data: DataSettings) -> Path:
    """Return the folder of prepared text and of remote files. Raises: DataError if it cannot be."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trimtab"
    folder = Path(data.cache_dir).expanduser() if data.cache_dir else default
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"data.cache_dir: {folder} cannot be made ({error.strerror}); set data.cache_dir to a "
            "folder that you may write to"
        ) from error
    return folder


@contextmanager
def _naming(data: DataSettings, name: str) -> Iterator[None]:
    """Say in errors which source they are about, if there are several."""
    try:
        yield
    except DataError as error:
        if not data.sources:
            raise
        raise DataError(f"source {name}: {error}") from error


def _is_tokens(paths: Sequence[str]) -> bool:
    found = {path: is_tokens(path) for path in paths}
    if len(set(found.values())) > 1:
        tokens = next(path for path in paths if found[path])
        text = next(path for path in paths if not found[path])
        raise DataError(
            f"data.paths: {tokens} holds tokens and {text} text; give tokens alone, text alone, or "
            "make them two of data.sources"
        )
    return any(found.values())


def _text(source: SourceSettings, data: DataSettings, cache: Path) -> _Text:
    sources = list_sources(source.paths)
    recipe = Recipe(
        text_key=source.text_key or data.text_key,
        normalise=str(data.normalise),
        deduplicate=data.deduplicate,
        validation_share=data.validation_share,
    )
    return _Text(sources=sources, recipe=recipe, digest=_text_digest(sources, cache))


def _tokenizer(
    settings: TokenizerSettings, texts: Sequence[_Text], cache: Path
) -> tuple[TokenizerChoice, Sequence[object]]:
    """Return the one tokenizer of all texts, and what stands for it."""
    kind = settings.kind
    choice = TokenizerChoice(
        kind=str(kind),
        path=settings.path,
        vocab_size=settings.vocab_size if kind is TokenizerKind.BPE else 0,
        separator=settings.separator,
    )
    if not texts or kind is TokenizerKind.BYTES:
        return choice, [str(kind)]
    if kind is TokenizerKind.FILE:
        return choice, [str(kind), fingerprint_of(str(settings.path)), settings.separator]
    read = [[text.digest, text.recipe.as_settings()] for text in texts]
    key = [str(kind), settings.vocab_size, settings.separator, read]
    if len(texts) == 1:
        return choice, key
    path = _trained(choice, key, texts, cache)
    separator = json.loads(path.with_suffix(".separator.json").read_text())["separator"]
    return TokenizerChoice(kind="file", path=str(path), separator=separator), key


def _trained(
    choice: TokenizerChoice, key: Sequence[object], texts: Sequence[_Text], cache: Path
) -> Path:
    """Return the tokenizer trained on several texts in order; it is trained once."""
    path = cache / f"tokenizer-{_digest_of(key)[:20]}.json"
    record = path.with_suffix(".separator.json")
    if record.exists():
        return path
    with _locked(path.with_suffix(".lock")), _told_of_disk(cache):
        if not record.exists():  # another process may have made it
            parts = (
                training_texts(text.sources, plan_tasks(text.sources, text.recipe), text.recipe)
                for text in texts
            )
            separator = write_tokenizer(choice, path, (line for part in parts for line in part))
            write_json(record, {"separator": separator})
    return path


def _prepared(
    text: _Text, data: DataSettings, choice: TokenizerChoice, key: Sequence[object], cache: Path
) -> Corpus:
    settings = [text.digest, text.recipe.as_settings(), key, data.max_bad_records]
    folder = cache / f"corpus-{_digest_of(settings)[:20]}-v{_LAYOUT_VERSION}"
    if not (folder / "manifest.json").exists():
        with _locked(cache / f"{folder.name}.lock"):
            if not (folder / "manifest.json").exists():  # another process may have made it
                _build(text, data, choice, folder)
    corpus = open_corpus(str(folder), dtype=None, cache=None)
    # The same text may lie elsewhere than when it was prepared.
    return dataclasses.replace(corpus, files=tuple(source.address for source in text.sources))


def _build(text: _Text, data: DataSettings, choice: TokenizerChoice, folder: Path) -> None:
    started = time.monotonic()
    num_bytes = sum(text_bytes(source) for source in text.sources)
    is_small = num_bytes < _SMALL_BYTES
    job = Job(
        folder=folder,
        sources=text.sources,
        recipe=text.recipe,
        tokenizer=choice,
        num_processes=1 if is_small else len(os.sched_getaffinity(0)),
        has_own_threads=is_small,
        max_bad_records=data.max_bad_records,
    )
    if folder.exists() and not is_half_done(folder):
        shutil.rmtree(folder)
    try:
        with _told_of_disk(folder.parent):
            manifest = _run(job, is_small=is_small)
    except DataError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    counts = manifest["counts"]
    if counts["bad_records"]:
        logger.warning("%d bad records left out: %s", counts["bad_records"], folder)
    for note in notes(manifest):
        logger.warning("%s: %s", folder, note)
    logger.info(
        "prepared %s tokens from %d documents in %.1f s: %s",
        f"{manifest['splits']['train']['num_tokens']:,}",
        manifest["splits"]["train"]["num_documents"],
        time.monotonic() - started,
        folder,
    )


def _run(job: Job, *, is_small: bool) -> dict[str, Any]:
    listener = Silence() if is_small else Lines(sys.stderr)
    try:
        return run_job(job, listener)
    except StaleWorkError:  # a kill left it, and since then the files were touched
        return run_job(dataclasses.replace(job, overwrite=True), listener)


@contextmanager
def _told_of_disk(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, OutputError) as error:
        cause = error.__cause__ if isinstance(error, OutputError) else error
        raise DataError(
            f"the corpus could not be written to {folder} "
            f"({getattr(cause, 'strerror', None) or cause}); set data.cache_dir to a disk with room"
        ) from error


def _check_tokenizers(corpora: Mapping[str, Corpus], texts: Mapping[str, _Text]) -> None:
    """Raises: DataError if two sources say that their tokens mean different things."""
    known = {name: c for name, c in corpora.items() if c.tokenizer_fingerprint is not None}
    # A prepared folder cannot follow the run's tokenizer: the others have to follow it.
    names = sorted(known, key=lambda name: name in texts)
    for name in names[1:]:
        first, other = corpora[names[0]], corpora[name]
        if (first.tokenizer_fingerprint, first.separator_id) == (
            other.tokenizer_fingerprint,
            other.separator_id,
        ):
            continue
        advice = "prepare both with one tokenizer"
        if name in texts:
            advice = (
                f"use its tokenizer for all: tokenizer=file tokenizer.path={first.tokenizer_path}"
                if first.tokenizer_path is not None
                else "use its tokenizer for all: tokenizer=bytes"
            )
        raise DataError(
            f"sources {names[0]} and {name} have different tokenizers or separators "
            f"({str(first.tokenizer_fingerprint)[:12]} with separator {first.separator_id}, "
            f"{str(other.tokenizer_fingerprint)[:12]} with {other.separator_id}); {advice}"
        )


def _text_digest(sources: Sequence[SourceFile], cache: Path) -> str:
    """Return the digest of text and formats; text that is unchanged on disk is not read again."""
    stats = hashlib.sha256()
    for source in sources:
        stats.update(f"{source.address}\0{source.num_bytes}\0{source.stamp}\n".encode())
    is_large = sum(source.num_bytes for source in sources) > _DIGESTED_BYTES
    if is_large or any(is_remote(source.address) for source in sources):
        return stats.hexdigest()
    memo = cache / f"text-{stats.hexdigest()[:20]}.json"
    if memo.exists():
        return str(_read_json(memo)["digest"])
    digest = _digest_files(sources)
    with _told_of_disk(cache):
        write_json(memo, {"digest": digest})
    return digest


def _digest_files(sources: Sequence[SourceFile]) -> str:
    digest = hashlib.sha256()
    for source in sources:
        try:
            with Path(source.address).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise unreadable(source.address, error) from error
        digest.update(f"{source.format}.{source.packing}".encode())
    return digest.hexdigest()


def _digest_of(settings: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} is damaged ({error}); delete {path.parent} and it is made anew"
        ) from error
    return value


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`; it is freed when the process ends, however it ends."""
    try:
        file = path.open("w")
    except OSError as error:
        raise DataError(
            f"{path} cannot be written ({error.strerror}); set data.cache_dir to a folder that you "
            "may write to"
        ) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)
