"""From text to a token store: gather documents, train or read a tokenizer, encode, cache.

The cache is addressed by content: the same text and tokenizer settings are prepared once on a
machine, and a kill while preparing leaves nothing that looks whole. Every rank may call it; a file
lock lets one work while the others wait, with no process group.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import logging
import os
import shutil
import sysconfig
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from train.data.store import CorpusInfo
from train.durable import fsync_file, fsync_folder, write_json
from train.errors import DataError
from train.settings import DataSettings, TokenizerKind, TokenizerSettings

if TYPE_CHECKING:
    from tokenizers import Tokenizer

logger = logging.getLogger(__name__)

END_OF_DOCUMENT = "<|endoftext|>"
_BYTES_END_OF_DOCUMENT = 256
# What is read of a folder; a file that is named outright is read whatever its suffix.
_TEXT_SUFFIXES = frozenset(
    {
        *(".txt", ".text", ".md", ".rst", ".tex", ".html", ".xml", ".csv", ".json", ".jsonl"),
        *(".yaml", ".yml", ".toml", ".py", ".pyi", ".ipynb", ".c", ".h", ".cc", ".cpp", ".hpp"),
        *(".cu", ".java", ".kt", ".scala", ".js", ".jsx", ".ts", ".tsx", ".go", ".rs", ".rb"),
        *(".php", ".cs", ".swift", ".lua", ".r", ".jl", ".hs", ".ml", ".sh", ".sql"),
    }
)
_PACKED_SUFFIXES = frozenset({".gz", ".zst", ".bz2", ".xz", ".zip", ".tar", ".parquet", ".arrow"})
# Raised when the meaning of a cached folder changes.
_CACHE_VERSION = 1


def prepare(data: DataSettings, tokenizer: TokenizerSettings) -> CorpusInfo:
    """Return the prepared corpus, making it first if the cache does not have it.

    Raises: DataError if a file cannot be read, or there is no text.
    """
    files = list_files(data)
    cache = _cache_folder(data)
    digest = _content_digest(files, data, tokenizer, cache)
    folder = cache / f"corpus-{digest[:20]}"
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
    )


def list_files(data: DataSettings) -> list[Path]:
    """Return the files of the corpus, sorted. Raises: DataError if there are none."""
    if not data.paths:
        root = Path(sysconfig.get_paths()["stdlib"])
        unwanted = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
        found = {
            path for path in root.rglob("*.py") if not unwanted & set(path.relative_to(root).parts)
        }
        return sorted(found)
    files: set[Path] = set()
    for pattern in data.paths:
        expanded = str(Path(pattern).expanduser())
        for match in glob.glob(expanded, recursive=True) or [expanded]:  # noqa: PTH207 - any root
            path = Path(match)
            if path.is_dir():
                inside = [
                    inner
                    for inner in path.rglob("*")
                    if inner.is_file() and "__pycache__" not in inner.parts
                ]
                texts = {inner for inner in inside if inner.suffix.lower() in _TEXT_SUFFIXES}
                if len(texts) < len(inside):
                    left_out = len(inside) - len(texts)
                    logger.warning("%s: %d files without a text suffix left out", path, left_out)
                files |= texts
            else:
                files.add(path)
    missing = [str(path) for path in sorted(files) if not path.exists()]
    if missing:
        raise DataError(f"data.paths: {', '.join(missing[:5])} cannot be found; check the globs")
    packed = [str(path) for path in sorted(files) if path.suffix.lower() in _PACKED_SUFFIXES]
    if packed:
        raise DataError(f"data.paths: {', '.join(packed[:5])} is packed; unpack it to plain text")
    odd = [str(path) for path in sorted(files) if not path.is_file()]
    if odd:
        raise DataError(f"data.paths: {', '.join(odd[:5])} is not a regular file; take it out")
    if not files:
        raise DataError(
            f"data.paths={list(data.paths)} holds no text files; text is expected in "
            f"{', '.join(sorted(_TEXT_SUFFIXES))}, or name the files themselves"
        )
    return sorted(files)


def documents(path: Path, text_key: str) -> Iterator[str]:
    """Yield the documents of one file: each line of a JSONL file, or the whole text.

    Raises: DataError naming the file and line.
    """
    try:
        if path.suffix != ".jsonl":
            text = path.read_text(encoding="utf-8-sig", errors="replace")
            if "\0" in text:
                raise DataError(f"{path} is not text (it has NUL bytes); take it out of data.paths")
            yield text
            return
        with path.open(encoding="utf-8-sig", errors="replace") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _text_of(json.loads(line), text_key, path, number)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise DataError(
            f"{path}: line {number} is not JSON ({reason}); each line of a .jsonl file is one "
            "JSON object"
        ) from error
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}); fix its permissions or take it out of "
            "data.paths"
        ) from error


def _text_of(record: object, text_key: str, path: Path, number: int) -> str:
    text = record.get(text_key) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise DataError(
            f"{path}: line {number} has no text under {text_key!r}; set data.text_key to the "
            "field that holds it"
        )
    # Crawls hold lone surrogates, which no encoder takes.
    return text.encode(errors="replace").decode()


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
    settings = [_CACHE_VERSION, text_digest, data.text_key, str(tokenizer.kind)]
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
        encoder = _Encoder(files, data, tokenizer, temporary)
        num_tokens, num_documents = encoder.write(temporary / "tokens.bin")
        if num_tokens < 2:
            raise DataError(
                f"the corpus is empty: {len(files)} files hold no text; point data.paths to some"
            )
        manifest = {
            "digest": digest,
            "num_tokens": num_tokens,
            "num_documents": num_documents,
            "vocab_size": encoder.vocab_size,
            "dtype": encoder.dtype,
            "num_files": len(files),
        }
        write_json(temporary / "manifest.json", manifest)
        fsync_file(temporary / "tokens.bin")
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
        f"{num_tokens:,}",
        num_documents,
        time.monotonic() - started,
        folder,
    )


class _Encoder:
    """Trains or reads the tokenizer at construction; then writes documents as tokens."""

    def __init__(
        self,
        files: Sequence[Path],
        data: DataSettings,
        settings: TokenizerSettings,
        folder: Path,
    ) -> None:
        self._files = files
        self._text_key = data.text_key
        self._tokenizer: Tokenizer | None = None
        if settings.kind is TokenizerKind.BPE:
            self._tokenizer = self._train(settings.vocab_size)
        elif settings.kind is TokenizerKind.FILE:
            self._tokenizer = _read_tokenizer(Path(str(settings.path)).expanduser())
        if self._tokenizer is None:
            self.vocab_size = _BYTES_END_OF_DOCUMENT + 1
        else:
            self.vocab_size = self._tokenizer.get_vocab_size()
            self._tokenizer.save(str(folder / "tokenizer.json"))
        self.dtype = "uint16" if self.vocab_size <= 2**16 else "uint32"

    def write(self, path: Path) -> tuple[int, int]:
        """Write all documents, each followed by the separator; return tokens and documents."""
        num_tokens = num_documents = 0
        with path.open("wb") as file:
            for texts in self._batches():
                for tokens in self._encode(texts):
                    array = np.asarray(tokens, dtype=self.dtype)
                    file.write(array.tobytes())
                    num_tokens += len(array)
                    num_documents += 1
        return num_tokens, num_documents

    def _all_documents(self) -> Iterator[str]:
        for path in self._files:
            for text in documents(path, self._text_key):
                if text:
                    yield text

    def _batches(self) -> Iterator[list[str]]:
        batch: list[str] = []
        num_characters = 0
        for text in self._all_documents():
            batch.append(text)
            num_characters += len(text)
            if num_characters > 2_000_000:
                yield batch
                batch, num_characters = [], 0
        if batch:
            yield batch

    def _encode(self, texts: list[str]) -> Iterator[list[int]]:
        if self._tokenizer is None:
            for text in texts:
                yield [*text.encode(), _BYTES_END_OF_DOCUMENT]
            return
        end = self._tokenizer.token_to_id(END_OF_DOCUMENT)
        assert end is not None, "every tokenizer here has the separator"
        for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            yield [*encoding.ids, end]

    def _train(self, vocab_size: int) -> Tokenizer:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_DOCUMENT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(self._all_documents(), trainer)
        return tokenizer


def _read_tokenizer(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception for any bad file
        raise DataError(f"tokenizer.path={path} is not a tokenizer.json ({error})") from error
    if tokenizer.token_to_id(END_OF_DOCUMENT) is None:
        tokenizer.add_special_tokens([END_OF_DOCUMENT])
    return tokenizer


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
