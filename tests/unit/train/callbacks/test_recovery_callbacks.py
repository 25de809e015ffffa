"""From verdicts to rewinds and stops, and from calm steps to checkpoints that are trusted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from train.actions import Rewind, Save, Stop
from train.callbacks.checkpointing import Checkpointing
from train.callbacks.spike_detection import SpikeDetection
from train.callbacks.spike_recovery import SpikeRecovery
from train.checkpoint.info import Health
from train.checkpoint.store import CheckpointStore
from train.distributed import World
from train.recovery.detector import Verdict, VerdictKind
from train.schedule import Schedule
from train.settings import RunConfig
from train.signals import Gate, StepReport, StepSignals
from train.state import TrainState

ComposeConfig = Callable[..., tuple[RunConfig, dict[str, Any]]]


class NoEngine:
    """Saves an empty model."""

    name = checkpoint_format = "none"
    can_veto = True
    num_parameters = 0
    group_names = ()

    def step(self, *args: object, **kwargs: object) -> Any:
        raise NotImplementedError

    def evaluate(self, rows: object) -> float:
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        (folder / "model.bin").touch()

    def load(self, folder: Path) -> None:
        raise NotImplementedError


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    world = World(rank=0, size=1, device=torch.device("cpu"))
    made = CheckpointStore(tmp_path / "checkpoints", world, keep_good=5)
    made.open()
    return made


def save(store: CheckpointStore, step: int, health: Health) -> str:
    state = TrainState(step=step, cursor=16 * step, clock=step)
    return store.save(NoEngine(), state, {}, health=health).name


def report(step: int, kind: VerdictKind, *, onset: int | None = None, rewinds: int = 0) -> Any:
    return StepReport(
        state=TrainState(step=step, cursor=16 * step, clock=step, rewinds=rewinds),
        signals=StepSignals(loss_nats=8.0, grad_norm=1.0, is_vetoed=False),
        lr=1e-3,
        num_samples=16,
        num_tokens=2048,
        step_seconds=0.1,
        data_seconds=0.0,
        finished_unix_seconds=0.0,
        verdict=Verdict(kind=kind, step=step, onset_step=step if onset is None else onset),
    )


def recovery(config: RunConfig, store: CheckpointStore) -> SpikeRecovery:
    schedule = Schedule(config.schedule, peak_lr=1.0, num_steps=config.run.steps)
    return SpikeRecovery(config.recovery, store, schedule, sequence_length=128)


# Recovery.


def test_spike_goes_back_to_a_good_checkpoint_and_skips_from_there(
    compose_config: ComposeConfig, store: CheckpointStore
) -> None:
    config, _ = compose_config(["recovery.token_scale=1e-6"])
    target = save(store, 80, Health.GOOD)
    save(store, 90, Health.CANDIDATE)
    action = recovery(config, store).after_update(report(95, VerdictKind.SPIKE, onset=93))
    assert isinstance(action, Rewind)
    assert (action.target, action.target_step, action.skip_from) == (target, 80, 1280)
    assert action.skip_amount == 8  # 1,000 tokens of 128 a sample
    assert (action.onset_step, action.detected_step, action.verdict) == (93, 95, "spike")
    assert action.rule == "falcon"


def test_palm_skips_batches_of_the_size_at_its_target(
    compose_config: ComposeConfig, store: CheckpointStore
) -> None:
    config, _ = compose_config(
        ["recovery=palm", "recovery.skip=10 batches", "recovery.step_scale=1.0"]
    )
    save(store, 0, Health.GOOD)
    action = recovery(config, store).after_update(report(95, VerdictKind.SPIKE, onset=93))
    assert isinstance(action, Rewind)
    schedule = Schedule(config.schedule, peak_lr=1.0, num_steps=400)
    assert action.skip_amount == schedule.samples_between(0, 10)
    assert action.skip_amount < 10 * config.schedule.batch_samples


@pytest.mark.parametrize("kind", [VerdictKind.OK, VerdictKind.OUTLIER, VerdictKind.LEVEL_SHIFT])
def test_step_that_needs_no_rollback_is_left_alone(
    kind: VerdictKind, compose_config: ComposeConfig, store: CheckpointStore
) -> None:
    config, _ = compose_config()
    save(store, 0, Health.GOOD)
    assert recovery(config, store).after_update(report(95, kind)) is None


def test_used_up_budget_stops_the_run_as_a_failure(
    compose_config: ComposeConfig, store: CheckpointStore
) -> None:
    config, _ = compose_config(["recovery.max_rewinds=2"])
    save(store, 0, Health.GOOD)
    action = recovery(config, store).after_update(report(95, VerdictKind.SPIKE, rewinds=2))
    assert isinstance(action, Stop)
    assert action.is_failure
    assert not action.needs_save


def test_quarantined_checkpoint_is_no_target(
    compose_config: ComposeConfig, store: CheckpointStore
) -> None:
    config, _ = compose_config()
    store.quarantine(save(store, 80, Health.GOOD), "corrupt")
    action = recovery(config, store).after_update(report(95, VerdictKind.SPIKE))
    assert isinstance(action, Stop)
    assert "no good checkpoint" in action.reason


# Detection.


def test_outliers_are_refused_on_the_device_only_where_the_config_says_so(
    compose_config: ComposeConfig,
) -> None:
    plain, _ = compose_config()
    strict, _ = compose_config(["recovery.veto=outlier"])
    assert SpikeDetection(plain.recovery).gate() is None
    detection = SpikeDetection(strict.recovery)
    assert detection.gate() == Gate()
    for step in range(1, 60):
        detection.after_update(report(step, VerdictKind.OK))
    gate = detection.gate()
    assert gate is not None
    assert 8.0 < gate.max_loss_nats < 9.0


# Checkpointing.


@pytest.fixture
def checkpointing(compose_config: ComposeConfig, store: CheckpointStore) -> Checkpointing:
    config, _ = compose_config(["checkpoint.interval_steps=10", "checkpoint.good_after_steps=3"])
    return Checkpointing(config.checkpoint, store)


def test_save_is_asked_for_at_each_interval_and_needs_its_own_report(
    checkpointing: Checkpointing,
) -> None:
    asked = [
        step
        for step in range(1, 31)
        if isinstance(checkpointing.after_update(report(step, VerdictKind.OK)), Save)
    ]
    assert asked == [10, 20, 30]
    assert [step for step in range(1, 31) if checkpointing.needs_current(step)] == asked


def test_checkpoint_is_good_after_enough_calm_steps(
    checkpointing: Checkpointing, store: CheckpointStore
) -> None:
    for step in range(5, 11):
        checkpointing.after_update(report(step, VerdictKind.OK))
    save(store, 10, Health.CANDIDATE)
    for step, expected in [(11, Health.CANDIDATE), (12, Health.CANDIDATE), (13, Health.GOOD)]:
        checkpointing.after_update(report(step, VerdictKind.OK))
        assert store.entries()[0].health is expected, step


def test_step_that_is_not_calm_starts_the_count_again(
    checkpointing: Checkpointing, store: CheckpointStore
) -> None:
    save(store, 10, Health.CANDIDATE)
    kinds = [VerdictKind.OK, VerdictKind.OK, VerdictKind.OUTLIER, VerdictKind.OK, VerdictKind.OK]
    for step, kind in enumerate(kinds, start=11):
        checkpointing.after_update(report(step, kind))
        assert store.entries()[0].health is Health.CANDIDATE, step
    checkpointing.after_update(report(16, VerdictKind.OK))
    assert store.entries()[0].health is Health.GOOD


def test_calm_steps_before_the_save_do_not_count(
    checkpointing: Checkpointing, store: CheckpointStore
) -> None:
    for step in range(1, 11):
        checkpointing.after_update(report(step, VerdictKind.OK))
    save(store, 10, Health.CANDIDATE)
    checkpointing.after_update(report(11, VerdictKind.OK))
    assert store.entries()[0].health is Health.CANDIDATE


def test_quarantined_checkpoint_is_never_promoted(
    checkpointing: Checkpointing, store: CheckpointStore
) -> None:
    store.quarantine(save(store, 1, Health.CANDIDATE), "bad")
    for step in range(2, 20):
        checkpointing.after_update(report(step, VerdictKind.OK))
    assert store.entries()[0].health is Health.QUARANTINED
