"""How fast is text turned into tokens, and how close to the tokenizer alone? One JSON line a case.

The limit is a bare loop of the tokenizer over the same texts, already in memory, on the same core;
the pipeline reads JSONL from disk, hashes, splits, removes duplicates and writes. Both alternate;
the best of each counts. `start` is what a run pays to find its prepared corpus again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from train.data.prepare.job import run_job  # noqa: E402
from train.data.prepare.progress import Silence  # noqa: E402
from train.data.prepare.recipe import Recipe  # noqa: E402
from train.data.prepare.sources import list_sources, standard_library  # noqa: E402
from train.data.prepare.tokenizer import (  # noqa: E402
    BytesEncoder,
    FileEncoder,
    TextEncoder,
    TokenizerChoice,
    write_tokenizer,
)
from train.data.prepare.work_folder import Job  # noqa: E402

if TYPE_CHECKING:
    from train.settings import RunConfig

BATCH_CHARACTERS = 2**20


def seconds_of(work: Callable[[], object]) -> tuple[float, float]:
    """Return how long one call takes: by the clock, and of one core."""
    started, cpu_started = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - started, time.process_time() - cpu_started


def batches(texts: Sequence[str]) -> Iterator[list[str]]:
    """Yield as much text at a time as the pipeline does."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    yield batch


def bare_loop(encoder: TextEncoder, texts: Sequence[str], data: Sequence[bytes]) -> None:
    """Tokenise what is in memory, and keep nothing."""
    if isinstance(encoder, FileEncoder):
        tokenizer = encoder._tokenizer
        for batch in batches(texts):
            tokenizer.encode_batch_fast(batch, add_special_tokens=False)
    else:
        encoder.encode(texts, data)


def measure(
    name: str, make_encoder: Callable[[], TextEncoder], choice: TokenizerChoice, repeats: int
) -> None:
    """Print one case."""
    texts = [Path(s.address).read_text(errors="replace") for s in standard_library()]
    texts = [text for text in texts if text]
    data = [text.encode() for text in texts]
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "texts.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        bare: list[tuple[float, float]] = []
        whole: list[tuple[float, float]] = []
        num_tokens = 0
        for repeat in range(repeats):
            job = Job(
                folder=Path(scratch) / f"corpus-{repeat}",
                sources=list_sources([str(source)]),
                recipe=Recipe(),
                tokenizer=choice,
            )
            # A new one, as the pipeline has: a tokenizer remembers words that it has met.
            bare.append(seconds_of(partial(bare_loop, make_encoder(), texts, data)))
            whole.append(seconds_of(partial(run_job, job, Silence())))
            manifest = json.loads((job.folder / "manifest.json").read_text())
            num_tokens = sum(split["num_tokens"] for split in manifest["splits"].values())
    num_bytes = sum(map(len, data))
    seconds, cpu_seconds = map(min, zip(*whole, strict=True))
    bare_seconds, bare_cpu_seconds = map(min, zip(*bare, strict=True))
    record = {
        "case": name,
        "tokens_per_second": round(num_tokens / seconds),
        "megabytes_per_second": round(num_bytes / seconds / 1e6, 2),
        "tokenizer_alone_megabytes_per_second": round(num_bytes / bare_seconds / 1e6, 2),
        "ratio": round(bare_seconds / seconds, 3),
        "ratio_of_cpu_seconds": round(bare_cpu_seconds / cpu_seconds, 3),
    }
    print(json.dumps(record), flush=True)


def measure_start(repeats: int) -> None:
    """Print how long a run looks for its corpus, the first time and later."""
    from dataclasses import replace

    from train.data.corpus import open_sources

    config = _config()
    with tempfile.TemporaryDirectory() as scratch:
        data = replace(config.data, cache_dir=scratch)
        look = partial(open_sources, data, config.tokenizer)
        first, _ = seconds_of(look)
        later, _ = min(seconds_of(look) for _ in range(repeats))
    record = {
        "case": "start, standard library",
        "first_seconds": round(first, 2),
        "later_seconds": round(later, 4),
    }
    print(json.dumps(record), flush=True)


def _config() -> RunConfig:
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from train.config import parse_config

    OmegaConf.register_new_resolver("run_name", lambda: "benchmark", replace=True)
    OmegaConf.register_new_resolver("scratch_dir", lambda: "unused", replace=True)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        node = compose("train", overrides=["+exp=falcon_like"])
    return parse_config(OmegaConf.to_container(node, resolve=True), world_size=1)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "tokenizer.json"
        texts = (Path(s.address).read_text(errors="replace") for s in standard_library())
        choice = TokenizerChoice(kind="bpe", vocab_size=32_000)
        separator = write_tokenizer(choice, path, texts)
        bpe = partial(FileEncoder, path, kind="file", separator=separator)
        measure("bpe", bpe, TokenizerChoice(kind="file", path=str(path)), options.repeats)
    measure("bytes", BytesEncoder, TokenizerChoice(kind="bytes"), options.repeats)
    measure_start(options.repeats)


if __name__ == "__main__":
    main()
