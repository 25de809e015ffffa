"""Small stand-ins for a run's parts: an engine whose whole model is one number, and a process.

Everything else in a `Process` is real: store, ring, journal, ledger, inbox. A second one over the
same folder is a restart: what lay in memory is gone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from train.actions import Rewind
from train.checkpoint.info import CheckpointInfo, Health
from train.checkpoint.saver import Saver
from train.checkpoint.snapshots import SnapshotRing, snapshot_name
from train.checkpoint.store import CheckpointStore
from train.checkpoint.tiers import Tiers
from train.data.ledger import SkipLedger
from train.data.sequence import Returns
from train.data.stream import SampleStream
from train.data.validation import Validation
from train.distributed import World
from train.engines.snapshot import HostSnapshot, SnapshotCopier
from train.events import Callback, Events
from train.health.integrity import Integrity
from train.loop import Run
from train.recovery.control import Inbox
from train.recovery.history import RecoveryHistory
from train.recovery.journal import Incident, Journal
from train.recovery.rewind import Rewinder
from train.schedule import Schedule
from train.settings import Decay, IntegritySettings, OnMismatch, ScheduleSettings
from train.state import TrainState

WORLD = World(rank=0, size=1, device=torch.device("cpu"))
BATCH_SAMPLES = 16
SEQUENCE_LENGTH = 128


class Killed(BaseException):
    """Stands for a SIGKILL: nothing catches it."""


class NumberWrite:
    """Writes the number that `tensor` holds when it is written."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def write(self, folder: Path, world: World) -> None:
        (folder / "number.bin").write_text(str(int(self._tensor)))

    def is_finite(self) -> bool:
        return True


class NumberEngine:
    """Its whole model is one number, to which each step adds one; files and snapshots are real."""

    name = "number"
    can_veto = True
    can_snapshot = True
    has_replicas = False
    reads_together = True
    writes_staged = True
    checkpoint_format = "number"
    num_parameters = 1
    group_names: tuple[str, ...] = ()
    model: Any = None
    state_bytes = 16

    def __init__(self) -> None:
        self._tensor = torch.zeros(1, dtype=torch.int64)
        self._copier = SnapshotCopier(WORLD.device)
        self.num_loads = 0
        self.num_restores = 0

    @property
    def number(self) -> int:
        return int(self._tensor)

    @number.setter
    def number(self, value: int) -> None:
        self._tensor.fill_(value)

    def step(self, rows: object, *, flag: bool = False, **others: object) -> torch.Tensor:
        self.number += 1
        unknown = float("nan")
        signals = [2.0, 1.0, unknown, unknown, 0.0, 0.0, float(flag), 0.0]
        return torch.tensor(signals, dtype=torch.float64)

    def recent_sample_losses(self) -> list[list[float]]:
        return []

    def evaluate(self, rows: object, layout: object = None) -> float:
        raise NotImplementedError

    def begin_save(self, staged: HostSnapshot | None = None) -> NumberWrite:
        return NumberWrite(self._tensor if staged is None else staged.tensor(staged.slots[0]))

    def load(self, folder: Path) -> None:
        self.num_loads += 1
        self.number = int((folder / "number.bin").read_text())

    def snapshot(self, reuse: HostSnapshot | None = None) -> HostSnapshot:
        return self._copier.take({"number": self._tensor}, {}, reuse)

    def restore(self, snapshot: HostSnapshot) -> None:
        self.num_restores += 1
        self._copier.put_back(snapshot, {"number": self._tensor})

    def undo(self, snapshot: HostSnapshot) -> None:
        self._copier.put_back(snapshot, {"number": self._tensor})

    def state_checksums(self) -> dict[str, int]:
        return {"number": self.number}

    def state_digest(self) -> str:
        return str(self.number)


class EmptySource:
    """Samples of zeros; remembers which batches were planned of, in order."""

    sample_tokens = SEQUENCE_LENGTH + 1
    num_indices: int | None = None
    num_samples = 10**6
    dtype = np.dtype(np.uint16)

    def __init__(self) -> None:
        self.taken: list[int] = []

    def read(self, indices: npt.NDArray[np.int64], out: npt.NDArray[np.integer]) -> None:
        out[:] = 0

    def announce(self, indices: npt.NDArray[np.int64]) -> None:
        pass

    def look_ahead(self, index: int) -> None:
        pass

    def layout(self, indices: npt.NDArray[np.int64]) -> None:
        return None

    def num_predictions(self, indices: npt.NDArray[np.int64]) -> int:
        self.taken += indices.tolist()
        return len(indices) * SEQUENCE_LENGTH

    def given_before(self, index: int) -> dict[str, int]:
        return {}

    def bad(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        return np.zeros(len(indices), dtype=np.bool_)

    def origins(self, index: int) -> Any:
        raise NotImplementedError


class Counter(Callback):
    """A callback with state."""

    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, object]:
        return {"count": self.count}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        self.count = int(str(state["count"]))


class Evidence:
    """Keeps in mind what was captured, and at which number the model was then."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.captured: list[tuple[Incident, TrainState, int]] = []

    def capture(self, intent: Incident, state: TrainState) -> None:
        self.captured.append((intent, state, getattr(self._engine, "number", 0)))


class Process:
    """All that one process of a run holds."""

    def __init__(
        self,
        folder: Path,
        *,
        keep_snapshots: int = 3,
        callbacks: Sequence[Callback] = (),
        engine: Any = None,
        source: Any = None,
        world: World = WORLD,
        is_async: bool = False,
        retry_seconds: Sequence[float] = (),
        max_failures: int | None = None,
    ) -> None:
        self.engine: Any = engine or NumberEngine()
        self.source: Any = source or EmptySource()
        self.counter = Counter()
        self.world = world
        self.ledger, self.returns = SkipLedger(), Returns()
        self.stream = SampleStream(
            self.source,
            self.ledger,
            rank=world.rank,
            num_ranks=world.size,
            returns=self.returns,
        )
        self.history = RecoveryHistory()
        self.evidence = Evidence(self.engine)
        self.events = Events([self.counter, *callbacks], is_main=world.is_main)
        self.schedule = constant_schedule()
        self.store = CheckpointStore(
            folder / "checkpoints",
            world,
            keep_good=5,
            kept=lambda: self.history.kept_checkpoints(2),
            beside=world.aside() if is_async else None,
            retry_seconds=retry_seconds,
        )
        self.store.open()
        self.ring = SnapshotRing(self.engine, world, size=keep_snapshots)
        self.tiers = Tiers(self.store, self.ring)
        self.saver = Saver(self.engine, self.tiers, self.events, max_failures=max_failures)
        self.journal = Journal(folder / "journal.jsonl")
        self.rewinder = Rewinder(
            tiers=self.tiers,
            journal=self.journal,
            history=self.history,
            data=self.stream,
            engine=self.engine,
            events=self.events,
            world=world,
            recorder=self.evidence,
        )
        self.control = folder / "control"
        self.inbox = Inbox(
            self.control,
            tiers=self.tiers,
            schedule=self.schedule,
            history=self.history,
            sequence_length=SEQUENCE_LENGTH,
            near_steps=10**9,
            world=world,
        )

    def save(
        self,
        state: TrainState | int,
        health: Health,
        *,
        to_disk: bool = True,
        to_memory: bool = False,
    ) -> str:
        """Keep a state whose model is the number of its step."""
        state = at(state) if isinstance(state, int) else state
        self.engine.number = self.counter.count = state.step
        return self.keep(state, health, to_disk=to_disk, to_memory=to_memory)

    def keep(
        self, state: TrainState, health: Health, *, to_disk: bool = True, to_memory: bool = False
    ) -> str:
        """Keep a state with the model as it is."""
        extra = {"ledger": self.ledger.ranges(), "callbacks": self.events.state_dict()}
        if to_memory:
            self.ring.take(state, extra, health=health)
        if to_disk:
            self.store.save(self.engine, state, extra, health=health)
        return snapshot_name(state)

    def run(self, *, last_step: int) -> Run:
        """Return what `train.loop.train` takes."""
        return Run(
            engine=self.engine,
            data=self.stream,
            validation=Validation({}, interval_steps=None),
            schedule=self.schedule,
            events=self.events,
            tiers=self.tiers,
            saver=self.saver,
            history=self.history,
            rewinder=self.rewinder,
            integrity=self.integrity(last_step=last_step),
            inbox=self.inbox,
            last_step=last_step,
            saves_at_start=False,
            saves_at_end=False,
        )

    def integrity(self, *, last_step: int, max_rewinds: int = 5, **settings: Any) -> Integrity:
        """Return the checks of the run, none of which is made unless `settings` say so."""
        chosen: dict[str, Any] = {
            "replica_check_interval_steps": None,
            "reexecution_interval_steps": None,
            "on_mismatch": OnMismatch.REWIND,
        }
        return Integrity(
            IntegritySettings(**{**chosen, **settings}),
            world=self.world,
            tiers=self.tiers,
            history=self.history,
            events=self.events,
            last_step=last_step,
            max_rewinds=max_rewinds,
        )

    def ask(self, name: str, **fields: object) -> Path:
        """Leave a request, as `trimtab rewind`, `skip` and `unskip` do."""
        folder = self.control / "requests"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.json"
        path.write_text(json.dumps(fields))
        return path

    def answer(self, name: str) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads((self.control / "answers" / f"{name}.json").read_text())
        return answer

    def entry(self, step: int) -> CheckpointInfo:
        return next(info for info in self.store.entries() if info.step == step)

    def samples(self, state: TrainState, *, up_to_step: int) -> list[int]:
        """Return the indices of the order that a run from `state` trains on."""
        trained: list[int] = []
        cursor = state.cursor
        for _ in range(state.step, up_to_step):
            positions, cursor = self.ledger.take(cursor, BATCH_SAMPLES)
            trained += self.returns.resolve(positions).tolist()
        return trained


def at(step: int, *, clock: int | None = None, rewinds: int = 0) -> TrainState:
    """Return the state after `step` steps, none of whose samples were skipped."""
    return TrainState(
        step=step,
        cursor=BATCH_SAMPLES * step,
        clock=step if clock is None else clock,
        tokens_seen=step,
        rewinds=rewinds,
    )


def constant_schedule(num_steps: int = 1000) -> Schedule:
    """Return a schedule whose batch is always of the same size."""
    settings = ScheduleSettings(
        decay=Decay.COSINE,
        warmup_steps=1,
        final_lr_ratio=0.1,
        batch_samples=BATCH_SAMPLES,
        batch_ramp_start_samples=BATCH_SAMPLES,
        batch_ramp_steps=0,
        batch_ramp_increment_samples=1,
    )
    return Schedule(settings, peak_lr=1.0, num_steps=num_steps)


def rewind_to(step: int, *, amount: int = 100, **fields: Any) -> Rewind:
    """Return what a rule asks for that wants to go back to `step`."""
    wish: dict[str, Any] = {
        "target": snapshot_name(at(step)),
        "target_step": step,
        "skip_from": BATCH_SAMPLES * step,
        "skip_amount": amount,
        "rule": "ladder",
        "verdict": "spike",
        "onset_step": 58,
        "detected_step": 60,
        "reason": "spike",
        "incident": 1,
    }
    return Rewind(**{**wish, **fields})


def corrupt_snapshot(ring: SnapshotRing, name: str) -> None:
    """Flip one bit of a snapshot behind its checksum's back."""
    slot = next(slot for slot in ring._slots if slot.info.name == name)
    slot.tensors.wait()
    slot.tensors.slabs[0][0] ^= 1
