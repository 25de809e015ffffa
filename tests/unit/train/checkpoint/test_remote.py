"""Copies behind an address: whole or not there, kept as the rules say, fetched by a start."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]
import pytest
from fakes import WORLD, Process, at

import train.checkpoint.remote as remote_module
from train.actions import Save
from train.checkpoint.info import Health
from train.checkpoint.remote import RemoteCopies
from train.checkpoint.saver import Saver
from train.checkpoint.snapshots import snapshot_name
from train.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("fast_disk")

ADDRESS = "memory://bucket/run"
WAIT_SECONDS = 10.0


@pytest.fixture(autouse=True)
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An empty object store in this process."""
    monkeypatch.setattr(remote_module, "_POLL_SECONDS", 0.01)
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield files
    files.store.clear()


class Copied:
    """A process whose checkpoints are copied to `address`."""

    def __init__(self, folder: Path, address: str = ADDRESS) -> None:
        self.process = Process(folder)
        self.copies = RemoteCopies(
            address, self.process.store.folder, WORLD, retry_seconds=(0.01, 0.01)
        )
        self.saver = Saver(
            self.process.engine, self.process.tiers, self.process.events, remote=self.copies
        )

    def save(self, step: int, health: Health = Health.GOOD) -> str:
        self.process.engine.number = step
        self.saver.save(at(step), {"ledger": [], "callbacks": {}}, Save(reason=""), health)
        assert self.copies.finish(WAIT_SECONDS)
        return snapshot_name(at(step))


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Copied]]:
    made: list[Copied] = []

    def make_it(name: str = "one", **settings: Any) -> Copied:
        made.append(Copied(tmp_path / name, **settings))
        return made[-1]

    yield make_it
    for copied in made:
        copied.saver.close()


def names(bucket: Any) -> set[str]:
    return {path.split("/")[3] for path in bucket.store}


def test_copy_holds_the_same_bytes(make: Callable[..., Copied], bucket: Any) -> None:
    copied = make()
    name = copied.save(3)
    folder = copied.process.store.folder / name
    for path in folder.iterdir():
        content = bucket.cat_file(f"/bucket/run/{name}/{path.name}")
        if path.name != "health.json":
            assert content == path.read_bytes()
    assert json.loads(bucket.cat_file(f"/bucket/run/{name}/health.json"))["health"] == "good"


@pytest.mark.parametrize("protocol", ["memory", "file"])
def test_start_without_checkpoints_fetches_the_newest(
    make: Callable[..., Copied], tmp_path: Path, protocol: str
) -> None:
    address = ADDRESS if protocol == "memory" else f"file://{tmp_path}/bucket/run"
    copied = make(address=address)
    for step in (3, 5):
        copied.save(step)
    again = make("two", address=address)
    assert again.copies.fetch() == snapshot_name(at(5))
    again.process.store.open()
    resumed = again.process.rewinder.resume()
    assert resumed is not None
    assert (resumed.state.step, again.process.engine.number) == (5, 5)
    assert not list(again.process.store.folder.glob(".*"))


def test_nothing_there_is_a_fresh_start(make: Callable[..., Copied]) -> None:
    assert make().copies.fetch() is None


def test_copy_without_a_manifest_is_not_whole(make: Callable[..., Copied], bucket: Any) -> None:
    copied = make()
    copied.save(3)
    newest = copied.save(5)
    bucket.rm_file(f"/bucket/run/{newest}/manifest.json")
    assert make("two").copies.fetch() == snapshot_name(at(3))


def test_manifest_comes_last(
    make: Callable[..., Copied], bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = make()
    put, order = bucket.put_file, []

    def noted(local: str, path: str) -> None:
        order.append(path.rpartition("/")[2])
        put(local, path)

    monkeypatch.setattr(copied.copies._files, "put_file", noted)
    copied.save(3)
    assert order[-1] == "manifest.json"
    assert set(order) == {"manifest.json", "state.json", "number.bin"}


def test_spoilt_copy_is_passed_over(
    make: Callable[..., Copied], bucket: Any, caplog: pytest.LogCaptureFixture
) -> None:
    copied = make()
    copied.save(3)
    newest = copied.save(5)
    bucket.pipe_file(f"/bucket/run/{newest}/number.bin", b"7")
    again = make("two")
    assert again.copies.fetch() == snapshot_name(at(3))
    assert "number.bin does not match its SHA-256" in caplog.text


def test_quarantined_copy_is_never_fetched(make: Callable[..., Copied]) -> None:
    copied = make()
    copied.save(3)
    newest = copied.save(5)
    copied.process.store.quarantine(newest, "made after the target of incident 1")
    copied.saver.copy_away()
    assert copied.copies.finish(WAIT_SECONDS)
    assert make("two").copies.fetch() == snapshot_name(at(3))


def test_what_retention_lets_go_of_goes_here_too(make: Callable[..., Copied], bucket: Any) -> None:
    copied = make()
    for step in range(1, 12):
        copied.save(step)
        kept = {info.name for info in copied.process.store.entries()}
        assert names(bucket) == kept
    assert len(kept) < 11


def test_nothing_is_deleted_before_a_younger_good_one_is_whole_here(
    make: Callable[..., Copied], bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = make()
    for step in (1, 2):
        copied.save(step)

    def down(local: str, path: str) -> None:
        raise OSError("the network is down")

    monkeypatch.setattr(copied.copies._files, "put_file", down)
    for step in range(3, 12):
        copied.save(step)
    assert names(bucket) == {snapshot_name(at(1)), snapshot_name(at(2))}
    monkeypatch.undo()
    copied.save(12)
    assert names(bucket) == {info.name for info in copied.process.store.entries()}


def test_address_that_fails_is_a_warning_and_is_tried_again(
    make: Callable[..., Copied],
    bucket: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    copied = make()
    put, failures = bucket.put_file, [1, 2]

    def flaky(local: str, path: str) -> None:
        if failures:
            failures.pop()
            raise OSError("the network is down")
        put(local, path)

    monkeypatch.setattr(copied.copies._files, "put_file", flaky)
    name = copied.save(3)
    assert names(bucket) == {name}
    assert caplog.text.count("the network is down") == 2


def test_step_does_not_wait_for_the_address(
    make: Callable[..., Copied], bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = make()
    may_go = threading.Event()
    put = bucket.put_file

    def slow(local: str, path: str) -> None:
        assert may_go.wait(WAIT_SECONDS)
        put(local, path)

    monkeypatch.setattr(copied.copies._files, "put_file", slow)
    for step in (1, 2):
        copied.process.engine.number = step
        extra = {"ledger": [], "callbacks": {}}
        copied.saver.save(at(step), extra, Save(reason=""), Health.GOOD)
    assert not copied.copies.finish(0.05)
    assert names(bucket) == set()
    may_go.set()
    assert copied.copies.finish(WAIT_SECONDS)
    assert len(names(bucket)) == 2


def test_run_that_starts_over_leaves_no_copy_of_the_one_before(
    make: Callable[..., Copied], bucket: Any
) -> None:
    make().save(3)
    again = make("two")
    again.copies.clear()
    assert names(bucket) == set()
    assert again.copies.fetch() is None


def test_address_that_cannot_be_read_at_a_start_says_what_to_do(
    make: Callable[..., Copied], monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = make()

    def down(*arguments: object, **keywords: object) -> None:
        raise OSError("the network is down")

    monkeypatch.setattr(copied.copies._files, "ls", down)
    with pytest.raises(CheckpointError, match=r"the network is down.*set it to null"):
        copied.copies.fetch()


def test_copy_of_what_is_gone_is_no_error(
    make: Callable[..., Copied], caplog: pytest.LogCaptureFixture
) -> None:
    copied = make()
    copied.save(3)
    shutil.rmtree(copied.process.entry(3).path)
    again = RemoteCopies("memory://bucket/other", copied.process.store.folder, WORLD)
    again.update(copied.process.store.entries())
    assert again.finish(WAIT_SECONDS)
    again.close()
    assert "could not be made" not in caplog.text
