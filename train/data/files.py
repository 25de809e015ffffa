"""What text a corpus has: which files `data.paths` means, and the documents inside them.

Owns the order of files and documents, on which token offsets depend. Refuses what is not text
rather than train on it. Called by preparation.
"""

from __future__ import annotations

import glob
import json
import logging
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from train.errors import DataError
from train.settings import DataSettings

logger = logging.getLogger(__name__)

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
    return (text for _, text in numbered_documents(path, text_key))


def numbered_documents(path: Path, text_key: str) -> Iterator[tuple[int | None, str]]:
    """Yield the documents of one file with their line, from 1; a file that is one has None.

    Raises: DataError naming the file and line.
    """
    try:
        if path.suffix != ".jsonl":
            text = path.read_text(encoding="utf-8-sig", errors="replace")
            if "\0" in text:
                raise DataError(f"{path} is not text (it has NUL bytes); take it out of data.paths")
            yield None, text
            return
        with path.open(encoding="utf-8-sig", errors="replace") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, _text_of(json.loads(line), text_key, path, number)
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
