"""Local copies of remote files: whole or not there, one download a host, bounded, retried."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import http.server
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from train.data import addresses
from train.data.cache import ShardCache
from train.errors import DataError

ROOT = Path(__file__).resolve().parents[4]


class Flaky(MemoryFileSystem):
    """Fails `failures` times, then gives `torn` once each, then what was written."""

    protocol = "flaky"
    failures = 0
    torn: list[bytes] = []  # noqa: RUF012 - set anew by each test
    num_opened = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + str(path).removeprefix("flaky://").lstrip("/")

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        Flaky.num_opened += 1
        if Flaky.failures:
            Flaky.failures -= 1
            raise TimeoutError("the server does not answer")
        if Flaky.torn:
            with fsspec.filesystem("memory").open("/torn", "wb") as file:
                file.write(Flaky.torn.pop(0))
            return fsspec.filesystem("memory").open("/torn", mode)
        return fsspec.filesystem("memory").open(path, mode)


@pytest.fixture(autouse=True)
def _sources(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    Flaky.failures, Flaky.torn, Flaky.num_opened = 0, [], 0
    monkeypatch.setattr(addresses, "_FIRST_PAUSE_SECONDS", 0.001)
    yield
    fsspec.filesystem("memory").store.clear()


def far(name: str, content: bytes, protocol: str = "memory") -> tuple[str, int, str]:
    """Put a file in memory; return its address, size and digest."""
    fsspec.filesystem("memory").pipe(f"/{name}", content)
    return f"{protocol}://{name}", len(content), hashlib.sha256(content).hexdigest()


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file())


def made(folder: Path, max_bytes: int = 1000, **options: int) -> ShardCache:
    return ShardCache(folder / "cache", max_bytes=max_bytes, **options)


# A copy.


def test_copy_is_what_lies_there_and_is_made_once(tmp_path: Path) -> None:
    wanted = far("a.bin", b"tokens", "flaky")
    kept = made(tmp_path)
    path = kept.path(*wanted)
    assert path.read_bytes() == b"tokens"
    assert path.name.endswith("-a.bin")
    assert kept.path(*wanted) == path
    assert made(tmp_path).path(*wanted) == path
    assert Flaky.num_opened == 1
    assert files_in(kept.folder) == [path]


def test_size_and_digest_need_not_be_known(tmp_path: Path) -> None:
    address, num_bytes, sha256 = far("a.bin", b"tokens")
    kept = made(tmp_path)
    assert kept.path(address, None, None).read_bytes() == b"tokens"
    assert kept.path(address, num_bytes, None).read_bytes() == b"tokens"
    assert kept.path(address, None, sha256).read_bytes() == b"tokens"


def test_file_that_was_replaced_at_its_address_is_another_one(tmp_path: Path) -> None:
    kept = made(tmp_path)
    old = kept.path(*far("a.bin", b"tokens"))
    new = kept.path(*far("a.bin", b"others"))
    assert (old.read_bytes(), new.read_bytes()) == (b"tokens", b"others")


def test_local_file_with_a_protocol_is_copied(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"tokens")
    path = made(tmp_path).path(f"file://{tmp_path}/a.bin", 6, None)
    assert path.parent == tmp_path / "cache"
    assert path.read_bytes() == b"tokens"


# A source that fails.


def test_source_that_fails_is_asked_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Flaky.failures = 3
    assert made(tmp_path).path(*far("a.bin", b"tokens", "flaky")).read_bytes() == b"tokens"
    assert Flaky.num_opened == 4
    warnings = [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]
    assert len(warnings) == 3
    assert warnings[0].startswith("flaky://a.bin: TimeoutError: the server does not answer; trying")


def test_pauses_double_are_bounded_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "_FIRST_PAUSE_SECONDS", 0.5)
    for attempt in range(20):
        pauses = [addresses.pause_seconds(attempt) for _ in range(50)]
        longest = min(30.0, 0.5 * 2**attempt)
        assert longest / 2 <= min(pauses) < max(pauses) <= longest


def test_source_that_fails_for_good_is_given_up(tmp_path: Path) -> None:
    Flaky.failures = 99
    with pytest.raises(DataError) as why:
        made(tmp_path, num_attempts=3).path(*far("a.bin", b"tokens", "flaky"))
    assert str(why.value) == (
        "flaky://a.bin could not be read in 3 attempts; the last one failed with TimeoutError: the "
        "server does not answer; check the network and the address"
    )
    assert Flaky.num_opened == 3
    assert files_in(tmp_path / "cache") == []


@pytest.mark.parametrize("torn", [b"toke", b"", b"tokens and more", b"tOkens"])
def test_damaged_download_is_made_again(tmp_path: Path, torn: bytes) -> None:
    Flaky.torn = [torn]
    path = made(tmp_path).path(*far("a.bin", b"tokens", "flaky"))
    assert path.read_bytes() == b"tokens"
    assert files_in(tmp_path / "cache") == [path]


def test_file_that_is_damaged_for_good_is_refused_with_both_digests(tmp_path: Path) -> None:
    address, num_bytes, sha256 = far("a.bin", b"tokens", "flaky")
    other = far("a.bin", b"tOkens")[2]
    with pytest.raises(DataError, match=f"digest {other} came, expected {sha256}") as why:
        made(tmp_path, num_attempts=2).path(address, num_bytes, sha256)
    assert "flaky://a.bin could not be read in 2 attempts" in str(why.value)
    assert Flaky.num_opened == 2
    assert files_in(tmp_path / "cache") == []


def test_file_of_another_size_is_refused_with_both_sizes(tmp_path: Path) -> None:
    address, num_bytes, sha256 = far("a.bin", b"tokens")
    for size, found in ((num_bytes + 1, "6 bytes came, expected 7"), (2, "at least 6 bytes came")):
        with pytest.raises(DataError, match=found):
            made(tmp_path, num_attempts=2).path(address, size, sha256)


def test_file_that_is_not_there_is_asked_for_once(tmp_path: Path) -> None:
    with pytest.raises(DataError) as why:
        made(tmp_path).path("flaky://none.bin", 6, None)
    assert str(why.value) == (
        "flaky://none.bin is missing; bring it back, or set data.on_bad_shard=skip"
    )
    assert Flaky.num_opened == 1


def test_missing_credentials_are_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Flaky, path: str, mode: str = "rb", **options: object) -> None:
        Flaky.num_opened += 1
        raise PermissionError("Access Denied")

    monkeypatch.setattr(Flaky, "open", refuse)
    with pytest.raises(
        DataError, match=r"flaky://a may not be read \(Access Denied\); check the c"
    ):
        made(tmp_path).path("flaky://a", 6, None)
    assert Flaky.num_opened == 1


# A disk that fails.


def test_full_disk_is_said_at_once_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = far("a.bin", b"tokens", "flaky")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"cannot be written \(No space left on device\)") as why:
        made(tmp_path).path(*wanted)
    assert "free some space, lower data.cache_bytes, or set data.cache_dir to anoth" in str(
        why.value
    )
    assert Flaky.num_opened == 1
    assert files_in(tmp_path / "cache") == []


def test_file_that_is_too_large_for_the_disk_is_said_before_it_is_fetched(tmp_path: Path) -> None:
    wanted = far("a.bin", bytes(500_000), "flaky")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        with pytest.raises(DataError, match=r"cannot be written \(File too large\); free some"):
            made(tmp_path, 10**6).path(*wanted)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert Flaky.num_opened == 0
    assert files_in(tmp_path / "cache") == []


def test_folder_that_cannot_be_made_is_refused_with_the_key(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"cannot be written \(.*\); set data\.cache_dir to a fold"):
        made(tmp_path).path(*far("a.bin", b"tokens"))


# The bound.


def test_copies_that_were_not_opened_for_longest_give_way(tmp_path: Path) -> None:
    kept = made(tmp_path, 30)
    wanted = {name: far(name, name.encode() * 10) for name in "abcd"}
    paths = {}
    for age, name in enumerate("abc"):
        paths[name] = kept.path(*wanted[name])
        os.utime(paths[name], (age, age))
    os.close(kept.open(*wanted["a"]))
    paths["d"] = kept.path(*wanted["d"])
    assert files_in(kept.folder) == sorted(paths[name] for name in "acd")
    assert kept.path(*wanted["b"]).read_bytes() == b"b" * 10


def test_files_of_others_are_neither_counted_nor_removed(tmp_path: Path) -> None:
    kept = made(tmp_path, 20)
    kept.folder.mkdir()
    (kept.folder / "memo.json").write_bytes(bytes(100))
    (kept.folder / "corpus").mkdir()
    for name in "abc":
        kept.path(*far(name, name.encode() * 10))
    assert (kept.folder / "memo.json").exists()
    assert len(files_in(kept.folder)) == 3


def test_copy_that_is_open_never_gives_way(tmp_path: Path) -> None:
    kept = made(tmp_path, 30)
    descriptor = kept.open(*far("a", b"a" * 10))
    (path,) = files_in(kept.folder)
    os.utime(path, (0, 0))
    for name in "bcdef":
        kept.path(*far(name, name.encode() * 10))
        assert path.exists()
        assert sum(each.stat().st_size for each in files_in(kept.folder)) <= 30
    os.close(descriptor)
    os.utime(path, (0, 0))
    kept.path(*far("g", b"g" * 10))
    assert not path.exists()


def test_nobody_counts_while_a_copy_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who lists a folder during a rename may see neither name, and take more than there is."""
    kept = made(tmp_path)
    replace, is_held = Path.replace, []

    def watched(self: Path, target: Path) -> Path:
        with (kept.folder / "locks" / "room.lock").open("r+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                is_held.append(True)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    kept.path(*far("a", b"tokens"))
    assert is_held == [True]


def test_owners_are_asked_to_close_before_there_is_no_room(tmp_path: Path) -> None:
    kept = made(tmp_path, 20)

    class Owner:
        def __init__(self) -> None:
            self.held = [kept.open(*far(name, name.encode() * 10)) for name in "ab"]

        def release(self) -> bool:
            if not self.held:
                return False
            os.close(self.held.pop(0))
            return True

    owner = Owner()
    kept.add_release(owner.release)
    assert kept.path(*far("c", b"c" * 10)).read_bytes() == b"c" * 10
    assert len(owner.held) == 1
    owner.release()


def test_cache_that_is_all_in_use_is_said_with_the_keys(tmp_path: Path) -> None:
    kept = made(tmp_path, 20)
    descriptors = [kept.open(*far(name, name.encode() * 10)) for name in "ab"]
    with pytest.raises(DataError, match=r"no room for memory://c \(10 bytes\): .*cache_bytes=20"):
        kept.path(*far("c", b"c" * 10))
    for descriptor in descriptors:
        os.close(descriptor)


def test_cache_that_is_smaller_than_one_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError) as why:
        made(tmp_path, 5).path(*far("a.bin", b"tokens", "flaky"))
    assert str(why.value) == (
        "flaky://a.bin has 6 bytes, data.cache_bytes=5 holds no single file of that size; set it "
        "to several times 6"
    )
    assert Flaky.num_opened == 0


def test_copy_that_gave_way_while_it_was_opened_is_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = made(tmp_path)
    wanted = far("a", b"tokens", "flaky")
    found = kept.path
    left = [1, 1]

    def vanishing(*arguments: Any) -> Path:
        path = found(*arguments)
        if left:
            left.pop()
            path.unlink()
        return path

    monkeypatch.setattr(kept, "path", vanishing)
    descriptor = kept.open(*wanted)
    assert os.pread(descriptor, 9, 0) == b"tokens"
    os.close(descriptor)
    assert Flaky.num_opened == 3


# Ahead of time.


def wait_for(condition: Any) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("it did not come to pass")


def test_prefetched_file_is_there_when_it_is_opened(tmp_path: Path) -> None:
    kept = made(tmp_path)
    wanted = [far(name, name.encode() * 10, "flaky") for name in "abcd"]
    for each in wanted * 2:
        kept.prefetch(*each)
    wait_for(lambda: not kept._announced)
    assert Flaky.num_opened == 4
    for each in wanted:
        kept.path(*each)
        kept.prefetch(*each)
    assert Flaky.num_opened == 4


def test_file_that_is_being_prefetched_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = made(tmp_path)
    wanted = far("a", b"tokens", "flaky")
    may_go_on = threading.Event()
    opened = Flaky.open

    def slow(self: Flaky, path: str, mode: str = "rb", **options: object) -> object:
        may_go_on.wait(10)
        return opened(self, path, mode)

    monkeypatch.setattr(Flaky, "open", slow)
    kept.prefetch(*wanted)
    wait_for(lambda: kept.folder.exists() and files_in(kept.folder))
    threading.Timer(0.05, may_go_on.set).start()
    assert kept.path(*wanted).read_bytes() == b"tokens"
    assert Flaky.num_opened == 1


def test_failure_ahead_of_time_is_met_by_the_one_who_needs_the_file(tmp_path: Path) -> None:
    kept = made(tmp_path, num_attempts=1)
    wanted = far("a", b"tokens", "flaky")
    Flaky.failures = 2
    kept.prefetch(*wanted)
    wait_for(lambda: Flaky.num_opened == 1 and not kept._announced)
    with pytest.raises(DataError, match="could not be read in 1 attempts"):
        kept.path(*wanted)
    kept.prefetch(*wanted)
    wait_for(lambda: not kept._announced)
    assert kept.path(*wanted).read_bytes() == b"tokens"


def test_threads_end_with_the_cache(tmp_path: Path) -> None:
    kept = made(tmp_path)
    for name in "abc":
        kept.prefetch(*far(name, name.encode()))
    threads, announced = kept._threads, kept._announced
    wait_for(lambda: not announced)
    assert 1 <= len(threads) <= 2
    del kept
    wait_for(lambda: not any(thread.is_alive() for thread in threads))


# Several processes.

SLOW = """
import sys, time
import fsspec
from fsspec.implementations.local import LocalFileSystem
from pathlib import Path
from train.data import cache
from train.data.cache import ShardCache

folder, seconds = Path(sys.argv[1]), float(sys.argv[2])
cache._CHUNK_BYTES = 10

class SlowFile:
    def __init__(self, file): self.file = file
    def read(self, count):
        time.sleep(seconds)
        return self.file.read(count)
    def __enter__(self): return self
    def __exit__(self, *error): self.file.close()

class Slow(LocalFileSystem):
    protocol = "slow"
    @classmethod
    def _strip_protocol(cls, path): return str(path).removeprefix("slow://")
    def open(self, path, mode="rb", **options):
        with (folder / "log").open("a") as log: log.write("opened\\n")
        return SlowFile(open(path, mode))

fsspec.register_implementation("slow", Slow)
kept = ShardCache(folder / "cache", max_bytes=1000)
print("ready", flush=True)
sys.stdin.readline()
print(kept.path(f"slow://{folder}/a.bin", 40, None).read_text(), flush=True)
"""


def start(folder: Path, seconds: float) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(folder), str(seconds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_processes_that_ask_together_download_once(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_text("tokens and" * 4)
    processes = [start(tmp_path, 0.02) for _ in range(3)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.communicate()[0].strip() for process in processes] == ["tokens and" * 4] * 3
    assert (tmp_path / "log").read_text() == "opened\n"


def test_kill_in_the_midst_of_a_download_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_text("tokens and" * 4)
    process = start(tmp_path, 0.2)
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    folder = tmp_path / "cache"
    wait_for(lambda: folder.exists() and any(files_in(folder)))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (left,) = files_in(folder)
    assert left.name.startswith(".")
    assert left.name.endswith(".tmp")
    # Another file needs the room that was taken.
    kept = ShardCache(folder, max_bytes=50)
    other = kept.path(*far("b", b"b" * 20))
    assert files_in(folder) == [other]
    again = start(tmp_path, 0.0)
    assert again.communicate("go\n")[0].strip() == "tokens and" * 4


def test_room_that_another_download_has_taken_is_not_free(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_text("tokens and" * 4)
    process = start(tmp_path, 0.2)
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    folder = tmp_path / "cache"
    wait_for(lambda: folder.exists() and any(files_in(folder)))
    with pytest.raises(DataError, match="there is no room for memory://b"):
        ShardCache(folder, max_bytes=50).path(*far("b", b"b" * 20))
    assert process.communicate()[0].strip() == "tokens and" * 4


# A real server.


class Handler(http.server.SimpleHTTPRequestHandler):
    num_requests = 0

    def do_GET(self) -> None:
        Handler.num_requests += 1
        if Handler.num_requests == 1:  # breaks off in the midst
            self.send_response(200)
            self.send_header("Content-Length", "60000")
            self.end_headers()
            self.wfile.write(bytes(100))
            self.close_connection = True
            return
        super().do_GET()

    def log_message(self, *arguments: object) -> None:
        pass


def test_files_of_a_web_server_are_copied_though_it_breaks_off_once(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp", reason="fsspec reads http:// with aiohttp")
    content = os.urandom(60_000)
    (tmp_path / "a.bin").write_bytes(content)

    def handler(*arguments: Any) -> Handler:
        return Handler(*arguments, directory=str(tmp_path))

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        address = f"http://127.0.0.1:{server.server_port}/a.bin"
        digest = hashlib.sha256(content).hexdigest()
        assert addresses.num_bytes(address) == 60_000
        path = made(tmp_path, 10**6).path(address, 60_000, digest)
        assert path.read_bytes() == content
        assert Handler.num_requests >= 2
        assert addresses.num_bytes(f"{address}.none") is None
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_fsspec_is_imported_by_the_first_remote_address_alone() -> None:
    program = (
        "import sys\n"
        "from train.data import cache, formats, samples\n"
        "assert 'fsspec' not in sys.modules\n"
        "assert 'torch' not in sys.modules\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, cwd=ROOT)
