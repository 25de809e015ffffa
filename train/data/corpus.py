"""From text to a token store: finds the prepared corpus in the cache, or has it made.

The cache is addressed by content: the same text and tokenizer settings are prepared once on a
machine, and a kill while preparing leaves nothing that looks whole. Every rank may call it; a file
lock lets one work while the others wait, with no process group.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from train.data.encode import Encoder
from train.data.files import documents, list_files
from train.data.store import CorpusInfo
from train.durable import fsync_file, fsync_folder, write_json
from train.errors import DataError
from train.settings import DataSettings, TokenizerKind, TokenizerSettings

__all__ = ["documents", "list_files", "prepare"]

logger = logging.getLogger(__name__)

# Raised when the same text gives other tokens. Run folders remember the digest, so that a run under
# way cannot be resumed on such a corpus.
_TOKENS_VERSION = 1
# Raised when a cached folder holds other files: it is made anew, and its tokens stay the same.
_LAYOUT_VERSION = 2


def prepare(data: DataSettings, tokenizer: TokenizerSettings) -> CorpusInfo:
    """Return the prepared corpus, making it first if the cache does not have it.

    Raises: DataError if a file cannot be read, or there is no text.
    """
    files = list_files(data)
    cache = _cache_folder(data)
    digest = _content_digest(files, data, tokenizer, cache)
    folder = cache / f"corpus-{digest[:20]}-v{_LAYOUT_VERSION}"
    if not (folder / "manifest.json").exists():
        with _locked(cache / f"{folder.name}.lock"):
            if not (folder / "manifest.json").exists():  # another process may have made it
                _build(files, data, tokenizer, folder, digest)
    manifest = _read_json(folder / "manifest.json")
    return CorpusInfo(
        folder=folder,
        digest=manifest["digest"],
        num_tokens=manifest["num_tokens"],
        num_documents=manifest["num_documents"],
        vocab_size=manifest["vocab_size"],
        dtype=manifest["dtype"],
        files=tuple(files),
    )


def _cache_folder(data: DataSettings) -> Path:
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


def _content_digest(
    files: Sequence[Path], data: DataSettings, tokenizer: TokenizerSettings, cache: Path
) -> str:
    """Digest of text and tokenizer settings; text that is unchanged on disk is not read again."""
    stats = hashlib.sha256()
    for path in files:
        try:
            stat = path.stat()
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror})") from error
        stats.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    memo = cache / f"text-{stats.hexdigest()[:20]}.json"
    if memo.exists():
        text_digest = str(_read_json(memo)["digest"])
    else:
        text_digest = _digest_files(files)
        _remember(memo, text_digest)
    settings = [_TOKENS_VERSION, text_digest, data.text_key, str(tokenizer.kind)]
    if tokenizer.kind is TokenizerKind.BPE:
        settings.append(tokenizer.vocab_size)
    elif tokenizer.kind is TokenizerKind.FILE:
        settings.append(_digest_files([Path(str(tokenizer.path)).expanduser()]))
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def _remember(memo: Path, digest: str) -> None:
    try:
        write_json(memo, {"digest": digest})
    except OSError as error:
        raise DataError(
            f"{memo} cannot be written ({error.strerror}); set data.cache_dir to a disk with room"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} is damaged ({error}); delete {path.parent} and it is made anew"
        ) from error
    return value


def _digest_files(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        try:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise DataError(
                f"{path} cannot be read ({error.strerror}); fix its permissions or take it out of "
                "data.paths"
            ) from error
        digest.update(path.suffix.encode())
    return digest.hexdigest()


def _build(
    files: Sequence[Path],
    data: DataSettings,
    tokenizer: TokenizerSettings,
    folder: Path,
    digest: str,
) -> None:
    started = time.monotonic()
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    for leftover in folder.parent.glob(f".{folder.name}.*.tmp"):  # of a killed preparation
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir()
    try:
        encoder = Encoder(files, data, tokenizer, temporary)
        log = encoder.write(temporary / "tokens.bin")
        if log.num_tokens < 2:
            raise DataError(
                f"the corpus is empty: {len(files)} files hold no text; point data.paths to some"
            )
        manifest = {
            "digest": digest,
            "num_tokens": log.num_tokens,
            "num_documents": log.num_documents,
            "vocab_size": encoder.vocab_size,
            "dtype": encoder.dtype,
            "num_files": len(files),
        }
        log.write(temporary)
        fsync_file(temporary / "tokens.bin")
        write_json(temporary / "manifest.json", manifest)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
        fsync_folder(folder.parent)
    except OSError as error:
        raise DataError(
            f"the corpus could not be written to {folder.parent} ({error.strerror}); set "
            "data.cache_dir to a disk with room"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    logger.info(
        "prepared %s tokens from %d documents in %.1f s: %s",
        f"{log.num_tokens:,}",
        log.num_documents,
        time.monotonic() - started,
        folder,
    )


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
