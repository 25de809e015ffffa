"""What the ranks of the agreement tests do: train, go back, serve requests, each on its own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from engine_tasks import base_config, results, with_engine
from fakes import BATCH_SAMPLES, SEQUENCE_LENGTH, Process, corrupt_snapshot, rewind_to
from sources import RowSource

from train.checkpoint.info import Health
from train.checkpoint.snapshots import snapshot_name
from train.distributed import World, join_world, launched_rank
from train.engines.build import build_engine
from train.errors import JournalError
from train.events import Callback
from train.loop import train
from train.recovery import control
from train.recovery.journal import Journal
from train.recovery.policy import Rung
from train.settings import EngineKind
from train.signals import StepReport
from train.state import TrainState

OLDER_STEP, TARGET_STEP, LAST_STEP = 2, 4, 8
DEADLINE_SECONDS = 30


class PatternSource(RowSource):
    """Samples that can be learnt, and differ from each other; remembers this rank's of batches."""

    sample_tokens = SEQUENCE_LENGTH + 1
    dtype = np.dtype(np.uint16)

    def __init__(self) -> None:
        self.taken: list[int] = []

    def layout(self, indices: npt.NDArray[np.int64]) -> None:
        self.taken += indices.tolist()  # asked for once a batch, and for nothing else

    def rows(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.integer]:
        ramp = np.arange(SEQUENCE_LENGTH + 1)[None, :] * (1 + indices[:, None] % 3)
        rows: npt.NDArray[np.integer] = ((indices[:, None] + ramp) % 257).astype(np.uint16)
        return rows


class Diary(Callback):
    """Writes down every report; on rank 0 alone, leaves a request at one step, and waits for it."""

    def __init__(self, *, asks_at: int | None = None) -> None:
        self.losses: dict[int, float] = {}
        self.flagged: list[int] = []
        self.process: Process | None = None
        self._asks_at = asks_at

    def needs_current(self, step: int) -> bool:
        return True

    def after_update(self, report: StepReport) -> None:
        self.losses[report.state.clock] = report.signals.loss_nats
        if report.signals.is_flagged:
            self.flagged.append(report.state.clock)
        process = self.process
        if report.state.clock == self._asks_at and process is not None and process.world.is_main:
            process.ask("live", kind="rewind", to_step=TARGET_STEP, amount="1 batches")
            deadline = time.monotonic() + DEADLINE_SECONDS
            while not process.inbox.is_waiting() and time.monotonic() < deadline:
                time.sleep(0.002)


@contextmanager
def process_of(
    folder: str, name: str, kind: str, *, asks_at: int | None = None
) -> Iterator[tuple[dict[str, Any], Process, Diary]]:
    """Yield where to write results, one rank's process over the folder of all, and its diary."""
    config = with_engine(base_config(), kind=EngineKind(kind))
    with results(Path(folder), name) as found, join_world(config.engine, job_name=name) as world:
        diary = Diary(asks_at=asks_at)
        process = Process(
            _own_folder(Path(folder) / name, world),
            callbacks=[diary],
            engine=build_engine(config, world),
            source=PatternSource(),
            world=world,
        )
        diary.process = process
        yield found, process, diary
        found["records"] = [
            [str(record.rung), str(record.phase), record.skip, record.target_step, record.time]
            for record in process.history.records
        ]


def _own_folder(shared: Path, world: World) -> Path:
    """Return a folder in which checkpoints are shared, and all else is for rank 0 alone to see."""
    (shared / "checkpoints").mkdir(parents=True, exist_ok=True)
    if world.is_main:
        return shared
    own = shared.with_name(f"{shared.name}-rank-{world.rank}")
    own.mkdir()
    (own / "checkpoints").symlink_to(shared / "checkpoints")
    return own


def _train_to(process: Process, state: TrainState, step: int) -> TrainState:
    return train(process.run(last_step=step), state).state


def _state_of(process: Process, state: TrainState) -> dict[str, Any]:
    return {
        "state": state.as_dict(),
        "ledger": process.ledger.ranges(),
        "in_memory": [info.step for info in process.ring.entries()],
        "on_disk": [[info.step, str(info.health)] for info in process.store.entries()],
    }


def fallback(folder: str, name: str, kind: str, bad_rank: int, is_on_disk: bool) -> None:
    """Go back to a state of which one rank's part in memory has changed; replay from there."""
    with process_of(folder, name, kind) as (found, process, diary):
        digests = {}
        state = TrainState()
        for step in (OLDER_STEP, TARGET_STEP):
            state = _train_to(process, state, step)
            digests[step] = process.engine.state_digest()
            is_target = step == TARGET_STEP
            process.keep(
                state,
                Health.GOOD,
                to_disk=is_on_disk or not is_target,
                to_memory=is_target,
            )
        state = _train_to(process, state, LAST_STEP)
        first_losses = dict(diary.losses)
        if process.world.rank == bad_rank:
            corrupt_snapshot(process.ring, snapshot_name(_at(TARGET_STEP)))
        wish = rewind_to(TARGET_STEP, amount=0, rung=Rung.REPLAY)
        state, _ = process.rewinder.rewind(wish, state)
        found["after"] = _state_of(process, state)
        found["is_as_saved"] = process.engine.state_digest() == digests[state.step]
        back_to = state.step
        state = _train_to(process, state, LAST_STEP)
        found["replayed"] = [
            [first_losses[step], diary.losses[LAST_STEP + step - back_to]]
            for step in range(back_to + 1, LAST_STEP + 1)
        ]


def _at(step: int) -> TrainState:
    return TrainState(step=step, cursor=BATCH_SAMPLES * step, clock=step)


def requests(folder: str, name: str, kind: str) -> None:
    """Serve what waits at the start, and one that comes while the run is live; rank 0 sees both."""
    control.POLL_SECONDS = 0.005
    with process_of(folder, name, kind, asks_at=6) as (found, process, diary):
        if process.world.is_main:
            process.ask("a", kind="nonsense")
            process.ask("b", kind="skip", amount="2 batches")
        process.inbox.start()
        state = _train_to(process, TrainState(), TARGET_STEP)
        process.keep(state, Health.GOOD, to_memory=True)
        state = _train_to(process, state, LAST_STEP)
        process.inbox.close()
        found["after"] = _state_of(process, state)
        found["flagged"] = diary.flagged
        found["losses"] = list(diary.losses.items())
        found["taken"] = process.source.taken
        found["answers"] = sorted(path.name for path in process.control.glob("answers/*"))
        found["waiting"] = sorted(path.name for path in process.control.glob("requests/*"))


def unwritable_journal(folder: str, name: str, kind: str) -> None:
    """Let rank 0's journal fail, and report what each rank is told and where it stands."""
    with process_of(folder, name, kind) as (found, process, _):
        state = _train_to(process, TrainState(), TARGET_STEP)
        process.keep(state, Health.GOOD, to_memory=True)
        state = _train_to(process, state, LAST_STEP)
        before = process.engine.state_digest()

        def full(*args: object) -> None:
            raise OSError(28, "No space left on device")

        Journal.append = full  # type: ignore[method-assign,assignment]
        try:
            process.rewinder.rewind(rewind_to(TARGET_STEP), state)
        except JournalError as error:
            found["error"] = str(error)
        found["is_untouched"] = process.engine.state_digest() == before
        found["rank"] = launched_rank()
