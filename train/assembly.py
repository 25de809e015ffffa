"""Puts the parts of a run together: engine, stream of data, checkpoints, callbacks, rewinder.

Everything that one part needs of another is handed over here; no part looks for it by itself.
Called by `build`, on every rank.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from monitoring.clocks import Birth
from monitoring.console import ConsoleProgress
from monitoring.records import EVENTS_FILE, Record, UnreadableRecordsError, read_json_lines
from monitoring.retention import RULES_FILE, Rules
from monitoring.trackers import build_trackers
from train.callbacks.checkpointing import Checkpointing
from train.callbacks.flight_recorder import FlightRecorder
from train.callbacks.spike_detection import SpikeDetection
from train.callbacks.spike_recovery import SpikeRecovery
from train.callbacks.tracking import Telemetry, Tracking
from train.chaos import inject_into_source
from train.checkpoint.interval import FailureRate, count_failures, observed_rate
from train.checkpoint.load_marks import LoadMarks
from train.checkpoint.remote import RemoteCopies
from train.checkpoint.saver import Saver
from train.checkpoint.snapshots import (
    Memory,
    SnapshotRing,
    affordable_size,
    available_memory,
    has_room_to_stage,
)
from train.checkpoint.store import CheckpointStore
from train.checkpoint.tiers import Tiers
from train.config import flatten
from train.data.addresses import join
from train.data.build import BadShards, DataChanges, RunData
from train.data.ledger import SkipLedger
from train.data.read_ahead import ReadAhead
from train.data.sequence import Returns
from train.data.shards import Corpus
from train.data.stream import Batches, SampleStream
from train.distributed import World
from train.durable import write_json
from train.engines.base import Engine
from train.engines.build import build_engine
from train.engines.staging import host_buffer
from train.errors import ConfigError
from train.events import Callback, Events
from train.health.integrity import Integrity
from train.loop import Run
from train.models.decoder import flops_per_token
from train.recovery.capsule import Capsules
from train.recovery.control import Inbox
from train.recovery.history import RecoveryHistory
from train.recovery.journal import Journal
from train.recovery.rewind import Rewinder
from train.run_folder import RunFolder
from train.schedule import Schedule
from train.settings import RunConfig
from train.throughput import peak_flops

logger = logging.getLogger(__name__)

# How long before its verdict a slow divergence can have begun: what the detector looks back on.
_VERDICT_LAG_STEPS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What is known before any part is made.

    `node`: the resolved config as plain containers. `birth`: when this job began.
    """

    config: RunConfig
    node: Mapping[str, Any]
    world: World
    folder: RunFolder
    schedule: Schedule
    corpora: Mapping[str, Corpus]
    data: RunData
    bad_shards: BadShards
    birth: Birth


def assemble(scene: Scene) -> Run:
    """Put all parts together. A collective (engines are)."""
    config, world, folder, schedule = scene.config, scene.world, scene.folder, scene.schedule
    history = RecoveryHistory()
    engine = build_engine(config, world)
    remote = _remote(config, folder, world)
    tiers = _tiers(config, folder, engine, history, world, remote)
    stream = _stream(config, scene.data, scene.bad_shards, schedule, world)
    recorder = FlightRecorder()
    capsules = Capsules(
        folder.incidents,
        engine=engine,
        stream=stream,
        corpora=tuple(scene.corpora.values()),
        world=world,
        log=recorder.log,
    )
    callbacks = _callbacks(
        config,
        recorder,
        tracking=lambda: _tracking(scene, engine),
        tiers=tiers,
        schedule=schedule,
        history=history,
        is_data_change=DataChanges(scene.data.changes, stream, schedule).is_change,
        rate=observed_rate(*count_failures(_events_so_far(scene)), num_ranks=world.size),
        world=world,
    )
    events = Events([*callbacks, capsules], is_main=world.is_main)
    logger.info("callbacks in order: %s", events.describe())
    return Run(
        engine=engine,
        data=_batches(config, stream, world),
        validation=scene.data.validation,
        schedule=schedule,
        events=events,
        tiers=tiers,
        saver=Saver(
            *(engine, tiers, events), max_failures=config.checkpoint.max_failures, remote=remote
        ),
        history=history,
        rewinder=Rewinder(
            tiers=tiers,
            journal=Journal(folder.journal, sequence_length=config.data.sequence_length),
            history=history,
            data=stream,
            engine=engine,
            events=events,
            world=world,
            recorder=capsules,
        ),
        integrity=_integrity(config, engine, tiers, history, events, world),
        inbox=_inbox(config, folder, tiers, schedule, history, world),
        last_step=config.run.steps,
        saves_at_start=config.checkpoint.save_at_start,
        saves_at_end=config.checkpoint.save_at_end,
    )


def _stream(
    config: RunConfig, data: RunData, bad_shards: BadShards, schedule: Schedule, world: World
) -> SampleStream:
    """Return the samples in order, with the fault that the config puts in, if any."""
    vocab_size = config.model.vocab_size
    return SampleStream(
        inject_into_source(data.source, config, data.vocab_size or vocab_size, schedule),
        SkipLedger(),
        rank=world.rank,
        num_ranks=world.size,
        returns=Returns(),
        vocab_size=vocab_size,
        skips_damaged=any(bad_shards.values()),
    )


def _batches(config: RunConfig, stream: SampleStream, world: World) -> Batches:
    """Return the stream, read ahead if the config says so."""
    if config.data.read_ahead_batches == 0:
        return stream
    return ReadAhead(
        stream,
        num_batches=config.data.read_ahead_batches,
        make_buffer=lambda shape, dtype: host_buffer(shape, dtype, world.device),
    )


def _events_so_far(scene: Scene) -> tuple[Record, ...]:
    """Return the timeline of the starts before this one; rank 0 alone goes by it."""
    try:
        return read_json_lines(scene.folder.path / EVENTS_FILE).records
    except UnreadableRecordsError as error:
        logger.warning("%s: past failures are not counted", error)
        return ()


def _inbox(
    config: RunConfig,
    folder: RunFolder,
    tiers: Tiers,
    schedule: Schedule,
    history: RecoveryHistory,
    world: World,
) -> Inbox:
    return Inbox(
        folder.control,
        tiers=tiers,
        schedule=schedule,
        history=history,
        sequence_length=config.data.sequence_length,
        near_steps=2 * config.checkpoint.longest_interval_steps,
        world=world,
    )


def _integrity(
    config: RunConfig,
    engine: Engine,
    tiers: Tiers,
    history: RecoveryHistory,
    events: Events,
    world: World,
) -> Integrity:
    interval = config.integrity.reexecution_interval_steps
    if interval is not None and not engine.can_snapshot:
        raise ConfigError(
            [
                f"integrity.reexecution_interval_steps={interval} takes a step back by a snapshot "
                "in host memory, which the settings of engine.deepspeed rule out; set it to null"
            ]
        )
    return Integrity(
        config.integrity,
        world=world,
        tiers=tiers,
        history=history,
        events=events,
        last_step=config.run.steps,
        max_rewinds=config.recovery.max_rewinds,
    )


def _callbacks(
    config: RunConfig,
    recorder: FlightRecorder,
    *,
    tracking: Callable[[], Callback],
    tiers: Tiers,
    schedule: Schedule,
    history: RecoveryHistory,
    is_data_change: Callable[[int, int], bool],
    rate: FailureRate,
    world: World,
) -> list[Callback]:
    """Return the callbacks that the config names; only rank 0 tracks."""
    length = config.data.sequence_length
    makers: dict[str, Callable[[], Callback]] = {
        "spike_detection": lambda: SpikeDetection(
            config.recovery, schedule, history, is_data_change
        ),
        "spike_recovery": lambda: SpikeRecovery(config.recovery, tiers, schedule, history, length),
        "checkpointing": lambda: Checkpointing(
            config.checkpoint, tiers, agree=world.broadcast, rate=rate
        ),
        "flight_recorder": lambda: recorder,
        "tracking": tracking,
    }
    names = [name for name in config.callbacks.names if name != "tracking" or world.is_main]
    return [makers[name]() for name in names]


def _tiers(
    config: RunConfig,
    folder: RunFolder,
    engine: Engine,
    history: RecoveryHistory,
    world: World,
    remote: RemoteCopies | None,
) -> Tiers:
    """Open the checkpoints on disk, fetched if there are none, and the ring. A collective."""
    checkpoint = config.checkpoint
    rewind_steps = config.recovery.furthest_rewind_steps()
    size, is_async = _affordable(config, engine, world)
    store = CheckpointStore(
        folder.checkpoints,
        world,
        keep_good=checkpoint.keep_good,
        # An onset is seen up to an interval late; the target must still be there.
        keep_steps=rewind_steps + checkpoint.longest_interval_steps if rewind_steps else 0,
        reach_steps=_VERDICT_LAG_STEPS + rewind_steps,
        keep_every_steps=checkpoint.keep_every_steps,
        budget_bytes=checkpoint.disk_budget,
        kept=lambda: history.kept_checkpoints(checkpoint.keep_incidents),
        sequence_length=config.data.sequence_length,
        beside=world.aside() if is_async else None,
        retry_seconds=checkpoint.retry_seconds,
    )
    store.open()
    if world.is_main:
        _tell_rules(store.folder, replace(store.rules, keep_incidents=checkpoint.keep_incidents))
    is_empty = not store.entries() and not store.unreadable
    if remote is not None and is_empty and remote.fetch() is not None:
        store.open()
    ring = SnapshotRing(engine, world, size=size)
    return Tiers(store, ring, LoadMarks(folder.checkpoints, world))


def _remote(config: RunConfig, folder: RunFolder, world: World) -> RemoteCopies | None:
    """Return the copies behind `checkpoint.remote`, without those of a run that starts over."""
    checkpoint = config.checkpoint
    if checkpoint.remote is None:
        return None
    remote = RemoteCopies(
        join(checkpoint.remote, config.run.name),
        folder.checkpoints,
        world,
        retry_seconds=checkpoint.retry_seconds,
    )
    if config.run.overwrite:
        remote.clear()
    return remote


def _affordable(config: RunConfig, engine: Engine, world: World) -> tuple[int, bool]:
    """Return how many snapshots the ring keeps, and whether saves go on beside training.

    A collective: the host that has the least memory decides.
    """
    checkpoint = config.checkpoint
    size, is_async = checkpoint.keep_snapshots, checkpoint.is_async
    if size and not engine.can_snapshot:
        logger.info("%s keeps no snapshots in memory: rewinds go to disk", engine.name)
        size = 0
    if is_async and not engine.writes_staged:
        logger.info("%s writes its checkpoints itself: training waits for them", engine.name)
        is_async = False
    memory: Memory = {
        "state_bytes": engine.state_bytes,
        "ranks_on_host": int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        "available_bytes": available_memory(),
    }
    if size:
        size = affordable_size(size, **memory)
    is_async = is_async and has_room_to_stage(size, **memory)
    answers = world.gather((size, is_async))
    return min(size for size, _ in answers), all(is_async for _, is_async in answers)


def _tell_rules(folder: Path, rules: Rules) -> None:
    """Leave the rules of retention where `trimtab checkpoints` and `trimtab prune` read them."""
    try:
        write_json(folder / RULES_FILE, asdict(rules))
    except OSError as error:
        logger.warning("%s cannot be written (%s)", folder / RULES_FILE, error.strerror)


def _tracking(scene: Scene, engine: Engine) -> Tracking:
    config, folder = scene.config, scene.folder
    telemetry = Telemetry(
        folder=folder.path,
        run_id=folder.run_id,
        attempt=folder.attempt,
        birth=scene.birth,
        world_size=scene.world.size,
        engine=engine.name,
        host=socket.gethostname(),
        config=flatten(scene.node),
        flops_per_token=flops_per_token(
            config.model, config.data.sequence_length, engine.num_parameters
        ),
        peak_flops=peak_flops(scene.world.device, config.engine.peak_tflops),
        group_names=engine.group_names,
        data=scene.data.description(),
        bad_shards=scene.bad_shards,
        changed_settings=folder.changes,
    )
    console = ConsoleProgress(config.run.steps, config.run.name)
    return Tracking(telemetry, build_trackers(config.tracker), config.tracker, console)
