"""One measurement of one loader, in a process of its own. Started by `benchmarks/loaders.py`.

Prints one JSON object as its last line: loaders write to stdout too. Refuses nothing: what a loader
raises is what was measured, and is told in a word.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pickle
import resource
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from loader_peers import peer_of
from loader_peers.contract import Loader
from loader_peers.workload import (
    BATCH_SAMPLES,
    NUM_SAMPLES,
    SEQUENCE_LENGTH,
    Workload,
    identities,
)

_WARM_UP_BATCHES = 20
_COMPARED_BATCHES = 4
_SAVED_AFTER_BATCHES = 3
_BLOCK_BYTES = 1 << 20


class Clock:
    """Seconds that passed, and seconds of processor time of this process and its children."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), _cpu_seconds()

    def wall(self) -> float:
        """Seconds since."""
        return time.perf_counter() - self._wall

    def cpu(self) -> float:
        """Processor seconds since, of all threads."""
        return _cpu_seconds() - self._cpu


def _cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def private_bytes() -> int:
    """Memory of this process alone: pages of mapped files, which the kernel takes back, are not."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines["RssAnon"].split()[0])


def peak_bytes() -> int:
    """The most memory that this process had, with pages of mapped files."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def files_of(*folders: Path) -> Iterator[Path]:
    """Yield files that are no holes."""
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.stat().st_blocks * 512 >= path.stat().st_size // 2:
                yield path


def drop_pages(*folders: Path) -> None:
    """Have the kernel forget the files, as after a start of the machine."""
    for path in files_of(*folders):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def warm_pages(*folders: Path) -> None:
    """Read the files once."""
    for path in files_of(*folders):
        with path.open("rb", buffering=0) as file:
            while file.read(_BLOCK_BYTES):
                pass


class Case:
    """A loader to be measured, and where its files are."""

    def __init__(self, module: str, folder: Path, num_samples: int, seconds: float) -> None:
        clock = Clock()
        self._adapter = importlib.import_module(f"loader_peers.{module}")
        self._import_seconds = clock.wall()
        self._tokens_folder = folder / "tokens"
        self._folder = folder / module
        self._state_path = folder / "states" / f"{module}.pickle"
        self._workload = Workload(num_samples=num_samples // peer_of(module).divisor)
        self._seconds = seconds

    def _open(self, rank: int = 0, num_ranks: int = 1) -> Loader:
        loader: Loader = self._adapter.Loader(
            self._folder, self._tokens_folder, self._workload, rank=rank, num_ranks=num_ranks
        )
        return loader

    def prepare(self) -> dict[str, Any]:
        """Write the loader's own format; then read 90% of an epoch, and save where it is."""
        self._folder.mkdir(parents=True)
        clock = Clock()
        self._adapter.prepare(self._folder, self._tokens_folder, self._workload)
        result: dict[str, Any] = {"prepare_seconds": clock.wall(), "bytes": self._disk_bytes()}
        if peer_of(self._folder.name).measures != "all":
            return result
        loader = self._open()
        batches = loader.batches()
        for _ in islice(batches, self._workload.num_batches * 9 // 10):
            pass
        state = loader.state()
        if state is not None:
            following = identities(loader.rows(next(batches)))
            self._state_path.parent.mkdir(exist_ok=True)
            self._state_path.write_bytes(pickle.dumps((state, following)))
            result["state_bytes"] = _state_bytes(state)
        return result

    def _disk_bytes(self) -> int:
        own = [path.stat() for path in files_of(self._folder)]
        if any(status.st_size >= 2 * self._workload.num_tokens for status in own):
            return sum(status.st_size for status in own)
        shared = (self._tokens_folder / "tokens.bin").stat().st_size
        is_reading_shared = sum(status.st_size for status in own) < self._workload.num_tokens
        return sum(status.st_size for status in own) + (shared if is_reading_shared else 0)

    def rate(self) -> dict[str, Any]:
        """Time the first batch from a cold disk, then tokens a second from memory."""
        drop_pages(self._folder, self._tokens_folder)
        private, peak, clock = private_bytes(), peak_bytes(), Clock()
        loader = self._open()
        batches = loader.batches()
        next(batches)
        result: dict[str, Any] = {
            "import_seconds": self._import_seconds,
            "cold_seconds": clock.wall(),
            "cold_cpu_seconds": clock.cpu(),
        }
        warm_pages(self._folder, self._tokens_folder)
        result["world_1"] = self._tokens_per_second(batches, 1)
        result["private_bytes"] = private_bytes() - private
        result["peak_bytes"] = peak_bytes() - peak
        del batches, loader
        result["world_8"] = self._tokens_per_second(self._open(0, 8).batches(), 8)
        return result

    def _tokens_per_second(self, batches: Iterator[Any], num_ranks: int) -> dict[str, float]:
        num_batches = 0
        for _ in islice(batches, _WARM_UP_BATCHES if self._workload.num_batches > 100 else 2):
            pass
        clock = Clock()
        for _ in batches:
            num_batches += 1
            if num_batches % 8 == 0 and clock.wall() > self._seconds:
                break
        num_tokens = num_batches * BATCH_SAMPLES // num_ranks * SEQUENCE_LENGTH
        return {"per_cpu_second": num_tokens / clock.cpu(), "per_second": num_tokens / clock.wall()}

    def resume(self) -> dict[str, Any]:
        """Load the state at 90% and read a batch; then, in the same process, skip 80%."""
        result: dict[str, Any] = {}
        if self._state_path.exists():
            state, following = pickle.loads(self._state_path.read_bytes())
            clock = Clock()
            loader = self._open()
            batch = next(loader.batches(state))
            result |= {"resume_seconds": clock.wall(), "resume_cpu_seconds": clock.cpu()}
            found = identities(loader.rows(batch))
            result["resume"] = "same samples" if found == following else "other samples"
        else:
            result["resume"] = "impossible"
        try:
            loader = self._open()
            next(loader.batches())
            clock = Clock()
            next(loader.skipping(self._workload.num_batches * 8 // 10))
            result |= {"skip_seconds": clock.wall(), "skip_cpu_seconds": clock.cpu()}
        except NotImplementedError:
            result["skip"] = "impossible"
        return result

    def order(self) -> dict[str, Any]:
        """Compare the samples of each global batch on 1, 2 and 8 ranks."""
        loader = self._open()
        batches = loader.batches()
        before = [identities(loader.rows(next(batches))) for _ in range(_SAVED_AFTER_BATCHES)]
        state = loader.state()
        count = _COMPARED_BATCHES
        after = [identities(loader.rows(next(batches))) for _ in range(count)]
        start = (before + after)[:count]
        result = {"from_start": self._compare(start, None)}
        if state is not None:
            result["after_checkpoint"] = self._compare(after, pickle.dumps(state))
        return result

    def _compare(self, expected: list[list[str]], state: bytes | None) -> str:
        found = [self._global_batches(num_ranks, len(expected), state) for num_ranks in (2, 8)]
        for batches in found:
            if isinstance(batches, str):
                return batches
        if all(batches == expected for batches in found):
            return "yes, rows too"
        as_sets = [[set(batch) for batch in batches] for batches in (*found, expected)]
        return "yes" if all(batches == as_sets[-1] for batches in as_sets) else "no"

    def _global_batches(
        self, num_ranks: int, count: int, state: bytes | None
    ) -> list[list[str]] | str:
        """Return the samples of each batch, rank by rank; a word if it does not get that far."""
        found: list[list[str]] = [[] for _ in range(count)]
        for rank in range(num_ranks):
            try:
                loader = self._open(rank, num_ranks)
                batches = loader.batches(None if state is None else pickle.loads(state))
                for batch, samples in zip(islice(batches, count), found, strict=False):
                    samples += identities(loader.rows(batch))
            except Exception as error:  # noqa: BLE001 - what a peer raises is the result
                return f"refused ({type(error).__name__})"
        return found


def _state_bytes(state: Any) -> int:
    try:
        return len(json.dumps(state))
    except TypeError:
        return len(pickle.dumps(state))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", choices=["prepare", "rate", "resume", "order"])
    parser.add_argument("module")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=NUM_SAMPLES)
    parser.add_argument("--seconds", type=float, default=1.0)
    options = parser.parse_args()
    case = Case(options.module, options.folder, options.samples, options.seconds)
    result = getattr(case, options.case)()
    print(f"\n{json.dumps(result)}", flush=True)
    # Some loaders leave threads and shared memory behind that wait for one another at the end.
    os._exit(0)


if __name__ == "__main__":
    main()
