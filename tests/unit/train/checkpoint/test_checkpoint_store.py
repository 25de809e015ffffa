"""The checkpoints of a run on a real folder, with an engine of one file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from train.checkpoint.info import CheckpointInfo, Health
from train.checkpoint.store import CheckpointStore
from train.distributed import World
from train.errors import CheckpointError, CorruptCheckpointError
from train.state import TrainState

pytestmark = pytest.mark.usefixtures("fast_disk")

WORLD = World(rank=0, size=1, device=torch.device("cpu"))
EXTRA: dict[str, object] = {"ledger": [[0, 5]], "callbacks": {"a": {"b": 1}}}


class FileEngine:
    """Keeps one word in one file; can be told to fail."""

    name = "file"
    can_veto = True
    reads_together = True
    can_snapshot = False
    writes_staged = False
    state_bytes = 0
    model: Any = None
    checkpoint_format = "file"
    num_parameters = 0
    group_names = ()

    def __init__(self) -> None:
        self.word = "fresh"
        self.finite = True
        self.failure: Exception | None = None
        self.load_failure: Exception | None = None

    def step(self, *args: object, **kwargs: object) -> Any:
        raise NotImplementedError

    def recent_sample_losses(self) -> Any:
        raise NotImplementedError

    def evaluate(self, rows: object) -> float:
        raise NotImplementedError

    def snapshot(self, reuse: object = None) -> Any:
        raise NotImplementedError

    def restore(self, snapshot: object) -> None:
        raise NotImplementedError

    def state_digest(self) -> str:
        raise NotImplementedError

    def begin_save(self, staged: object = None) -> FileEngine:
        return self

    def write(self, folder: Path, world: World) -> None:
        (folder / "word.bin").write_text(self.word)
        if self.failure is not None:
            raise self.failure

    def is_finite(self) -> bool:
        return self.finite

    def load(self, folder: Path) -> None:
        if self.load_failure is not None:
            raise self.load_failure
        self.word = (folder / "word.bin").read_text()


@pytest.fixture
def engine() -> FileEngine:
    return FileEngine()


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return opened(tmp_path)


def opened(folder: Path, *, keep_good: int = 2) -> CheckpointStore:
    store = CheckpointStore(folder / "checkpoints", WORLD, keep_good=keep_good)
    store.open()
    return store


def save(
    store: CheckpointStore, engine: FileEngine, step: int, health: Health = Health.CANDIDATE
) -> CheckpointInfo:
    engine.word = f"word of {step}"
    state = TrainState(step=step, cursor=16 * step, clock=step)
    return store.save(engine, state, EXTRA, health=health)


def steps(store: CheckpointStore) -> list[int]:
    return [info.step for info in store.entries()]


def entry(store: CheckpointStore, step: int) -> CheckpointInfo:
    return next(info for info in store.entries() if info.step == step)


def test_checkpoint_comes_back_with_everything_that_was_given(
    store: CheckpointStore, engine: FileEngine
) -> None:
    info = save(store, engine, 3)
    engine.word = "lost"
    extra = store.load(engine, info)
    assert engine.word == "word of 3"
    assert TrainState(**extra["train_state"]) == TrainState(step=3, cursor=48, clock=3)
    assert {key: extra[key] for key in EXTRA} == EXTRA
    assert (info.step, info.cursor, info.clock, info.world_size) == (3, 48, 3, 1)
    assert info.num_bytes > 0


def test_catalogue_is_read_off_the_folder_again(
    store: CheckpointStore, engine: FileEngine, tmp_path: Path
) -> None:
    save(store, engine, 3)
    store.promote(save(store, engine, 5))
    save(store, engine, 4)
    assert opened(tmp_path).entries() == sorted(store.entries(), key=lambda info: info.clock)
    assert [info.step for info in opened(tmp_path).trusted(Health.GOOD)] == [5]


def test_what_a_killed_save_left_is_cleared_and_strangers_are_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    (folder / ".saving-step-00000003-clock-00000003").mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    assert opened(tmp_path).entries() == []
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_folder_without_a_readable_manifest_is_left_alone_with_a_warning(
    store: CheckpointStore, engine: FileEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    info = save(store, engine, 3)
    (info.path / "manifest.json").write_text("{")
    assert opened(tmp_path).entries() == []
    assert "is not a readable checkpoint and is left alone" in caplog.text
    assert info.path.exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("torch")])
def test_save_that_fails_leaves_older_checkpoints_and_nothing_of_its_own(
    store: CheckpointStore, engine: FileEngine, error: Exception
) -> None:
    save(store, engine, 3)
    engine.failure = error
    with pytest.raises(CheckpointError, match="rank 0: "):
        save(store, engine, 4)
    assert steps(store) == [3]
    assert [path.name for path in store.folder.iterdir()] == ["step-00000003-clock-00000003"]


@pytest.mark.parametrize("name", ["word.bin", "state.json"])
@pytest.mark.parametrize("reads_together", [True, False])
def test_flipped_byte_is_found(
    store: CheckpointStore, engine: FileEngine, name: str, reads_together: bool
) -> None:
    """Whoever may hang on a bad file is not even asked to read it."""
    engine.reads_together = reads_together
    info = save(store, engine, 3)
    content = bytearray((info.path / name).read_bytes())
    content[-2] ^= 1
    (info.path / name).write_bytes(content)
    engine.word = "untouched"
    with pytest.raises(CorruptCheckpointError, match=f"{name} does not match its SHA-256"):
        store.load(engine, info)
    assert (engine.word == "untouched") == (not reads_together)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def test_file_of_a_wrong_size_is_found_before_the_engine_is_touched(
    store: CheckpointStore, engine: FileEngine
) -> None:
    info = save(store, engine, 3)
    (info.path / "word.bin").write_text("longer than it was")
    engine.word = "untouched"
    with pytest.raises(CorruptCheckpointError, match="has 18 bytes, its manifest says 9"):
        store.load(engine, info)
    assert engine.word == "untouched"


@pytest.mark.parametrize("error", [CheckpointError("unreadable"), ValueError("7"), EOFError()])
def test_reader_that_fails_on_wrong_bytes_is_a_corrupt_checkpoint(
    error: Exception, store: CheckpointStore, engine: FileEngine
) -> None:
    info = save(store, engine, 3)
    flip_a_bit(info.path / "word.bin")
    engine.load_failure = error
    with pytest.raises(CorruptCheckpointError, match=r"word\.bin does not match"):
        store.load(engine, info)


@pytest.mark.parametrize("error", [CheckpointError("unreadable"), ValueError("7")])
def test_reader_that_fails_on_right_bytes_says_so_itself(
    error: Exception, store: CheckpointStore, engine: FileEngine
) -> None:
    info = save(store, engine, 3)
    engine.load_failure = error
    with pytest.raises(type(error), match=str(error)):
        store.load(engine, info)


def test_truncated_and_missing_files_are_found(store: CheckpointStore, engine: FileEngine) -> None:
    info = save(store, engine, 3)
    (info.path / "word.bin").write_text("w")
    with pytest.raises(CorruptCheckpointError, match="has 1 bytes, its manifest says 9"):
        store.load(engine, info)
    (info.path / "word.bin").unlink()
    with pytest.raises(CorruptCheckpointError, match="cannot be read"):
        store.load(engine, info)


def test_checkpoint_of_another_engine_is_refused(
    store: CheckpointStore, engine: FileEngine
) -> None:
    info = save(store, engine, 3)
    engine.checkpoint_format = "other"
    with pytest.raises(
        CheckpointError, match=r"as file, and engine\.kind=file here(.|\n)*`trimtab convert`"
    ):
        store.load(engine, info)


def test_health_is_durable_and_does_not_touch_the_manifest(
    store: CheckpointStore, engine: FileEngine, tmp_path: Path
) -> None:
    info = save(store, engine, 3)
    store.quarantine(info.name, "made after a spike")
    (again,) = opened(tmp_path).entries()
    assert again.health is Health.QUARANTINED
    assert again.digest == info.digest
    health = json.loads((info.path / "health.json").read_text())
    assert health["reason"] == "made after a spike"


def test_newest_good_checkpoints_and_younger_candidates_are_kept(
    store: CheckpointStore, engine: FileEngine
) -> None:
    for step in (0, 1, 2, 3):
        save(store, engine, step, Health.GOOD)
    save(store, engine, 4)
    save(store, engine, 5)
    assert steps(store) == [2, 3, 4, 5]
    on_disk = sorted(path.name for path in store.folder.iterdir())
    assert on_disk == [info.name for info in store.entries()]


def test_last_good_checkpoint_is_never_deleted(store: CheckpointStore, engine: FileEngine) -> None:
    save(store, engine, 0, Health.GOOD)
    for step in range(1, 30):
        save(store, engine, step)
    assert 0 in steps(store)


def test_quarantined_checkpoints_go_with_the_next_save(
    store: CheckpointStore, engine: FileEngine
) -> None:
    save(store, engine, 0, Health.GOOD)
    store.quarantine(save(store, engine, 1).name, "bad")
    save(store, engine, 2)
    assert steps(store) == [0, 2]


def test_same_state_saved_twice_is_one_checkpoint(
    store: CheckpointStore, engine: FileEngine, tmp_path: Path
) -> None:
    save(store, engine, 3)
    save(store, engine, 3)
    assert steps(store) == [3]
    assert steps(opened(tmp_path)) == [3]


def test_a_rule_that_goes_far_back_finds_its_target_kept(
    tmp_path: Path, engine: FileEngine
) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", WORLD, keep_good=2, keep_steps=4)
    store.open()
    for step in range(10):
        save(store, engine, step, Health.GOOD)
    assert steps(store) == [5, 6, 7, 8, 9], "the newest, back to one that is four steps older"


def test_run_that_has_no_good_checkpoint_yet_keeps_its_candidates(
    store: CheckpointStore, engine: FileEngine
) -> None:
    for step in (1, 2, 3):
        save(store, engine, step)
    assert steps(store) == [1, 2, 3]


REACH_STEPS = 200


def test_trouble_that_is_seen_late_finds_a_checkpoint_about_as_old(
    tmp_path: Path, engine: FileEngine
) -> None:
    """However late: there is a good one that is older, and not more than four times as old."""
    store = CheckpointStore(tmp_path / "checkpoints", WORLD, keep_good=3, reach_steps=REACH_STEPS)
    store.open()
    for step in range(0, 1500, 10):
        save(store, engine, step, Health.GOOD)
        ages = [step - info.step for info in store.entries()]
        assert len(ages) < 16
        for lag in range(20, min(step, REACH_STEPS)):
            assert any(lag <= age <= 4 * lag for age in ages), (step, lag, ages)


def test_checkpoints_that_someone_still_needs_are_kept(tmp_path: Path, engine: FileEngine) -> None:
    needed: set[str] = set()
    store = CheckpointStore(
        tmp_path / "checkpoints", WORLD, keep_good=2, kept=lambda: frozenset(needed)
    )
    store.open()
    needed |= {save(store, engine, step, Health.GOOD).name for step in (1, 2)}
    save(store, engine, 3, Health.GOOD)
    store.quarantine(entry(store, 2).name, "made after the target")
    for step in (4, 5, 6):
        save(store, engine, step, Health.GOOD)
    assert steps(store) == [1, 2, 5, 6], "a quarantined one among them"
    needed.clear()
    save(store, engine, 7, Health.GOOD)
    assert steps(store) == [6, 7]
    assert steps(opened(tmp_path)) == [6, 7]


def test_checkpoint_removed_by_hand_does_not_end_the_run(
    store: CheckpointStore, engine: FileEngine
) -> None:
    for step in (1, 2):
        save(store, engine, step, Health.GOOD)
    shutil.rmtree(entry(store, 1).path)
    save(store, engine, 3, Health.GOOD)
    assert steps(store) == [2, 3]


def test_folders_that_should_be_checkpoints_are_named_and_never_removed(
    store: CheckpointStore, engine: FileEngine, tmp_path: Path
) -> None:
    info = save(store, engine, 1, Health.GOOD)
    (info.path / "health.json").write_text("[]")
    again = opened(tmp_path)
    assert again.unreadable == (info.name,)
    save(again, engine, 1)
    opened(tmp_path)
    assert list(store.folder.glob(f"replaced-{info.name}-*"))


def test_manifest_that_contradicts_its_own_digest_is_left_alone(
    store: CheckpointStore, engine: FileEngine, tmp_path: Path
) -> None:
    info = save(store, engine, 3)
    manifest = info.path / "manifest.json"
    text = manifest.read_text()
    assert '"digest"' in text
    manifest.write_text(text.replace('"cursor": 48', '"cursor": 49'))
    assert opened(tmp_path).unreadable == (info.name,)


def test_manifest_of_an_old_run_has_no_digest_and_is_read(
    store: CheckpointStore, engine: FileEngine, tmp_path: Path
) -> None:
    info = save(store, engine, 3)
    manifest = json.loads((info.path / "manifest.json").read_text())
    del manifest["digest"]
    (info.path / "manifest.json").write_text(json.dumps(manifest))
    assert steps(opened(tmp_path)) == [3]


def test_one_good_checkpoint_of_each_stretch_stays_for_good(
    tmp_path: Path, engine: FileEngine
) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", WORLD, keep_good=1, keep_every_steps=4)
    store.open()
    for step in range(10):
        save(store, engine, step, Health.GOOD)
    assert steps(store) == [0, 4, 8, 9]


def test_disk_budget_takes_the_oldest_and_says_what_it_cannot_do(
    tmp_path: Path, engine: FileEngine, caplog: pytest.LogCaptureFixture
) -> None:
    one = save(opened(tmp_path / "other"), engine, 0).num_bytes
    store = CheckpointStore(tmp_path / "checkpoints", WORLD, keep_good=5, budget_bytes=3 * one + 10)
    store.open()
    for step in range(6):
        save(store, engine, step, Health.GOOD)
    assert steps(store) == [3, 4, 5]
    assert "cannot be met" not in caplog.text
    for step in (6, 7, 8):
        save(store, engine, step)
    assert steps(store) == [5, 6, 7, 8], "the last good one and what may become good"
    assert "checkpoint.disk_budget" in caplog.text
    assert "cannot be met" in caplog.text
