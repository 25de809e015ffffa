"""Puts the parts of a run together: engine, stream of data, checkpoints, callbacks, rewinder.

Everything that one part needs of another is handed over here; no part looks for it by itself.
Called by `build`, on every rank.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from monitoring.console import ConsoleProgress
from monitoring.trackers import build_trackers
from train.callbacks.checkpointing import Checkpointing
from train.callbacks.flight_recorder import FlightRecorder
from train.callbacks.spike_detection import SpikeDetection
from train.callbacks.spike_recovery import SpikeRecovery
from train.callbacks.tracking import Telemetry, Tracking
from train.chaos import inject_into_source
from train.checkpoint.load_marks import LoadMarks
from train.checkpoint.snapshots import SnapshotRing, affordable_size, available_memory
from train.checkpoint.store import CheckpointStore
from train.checkpoint.tiers import Tiers
from train.config import flatten
from train.data.build import BadShards, DataChanges, RunData
from train.data.ledger import SkipLedger
from train.data.read_ahead import ReadAhead
from train.data.sequence import Returns
from train.data.shards import Corpus
from train.data.stream import Batches, SampleStream
from train.distributed import World
from train.engines.base import Engine
from train.engines.build import build_engine
from train.engines.staging import host_buffer
from train.events import Callback, Events
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

    `node`: the resolved config as plain containers. `process_start_time`: Unix seconds.
    """

    config: RunConfig
    node: Mapping[str, Any]
    world: World
    folder: RunFolder
    schedule: Schedule
    corpora: Mapping[str, Corpus]
    data: RunData
    bad_shards: BadShards
    process_start_time: float


def assemble(scene: Scene) -> Run:
    """Put all parts together. A collective (engines are)."""
    config, world, folder, schedule = scene.config, scene.world, scene.folder, scene.schedule
    history = RecoveryHistory()
    engine = build_engine(config, world)
    tiers = _tiers(config, folder, engine, history, world)
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
        near_steps=2 * config.checkpoint.interval_steps,
        world=world,
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
    world: World,
) -> list[Callback]:
    """Return the callbacks that the config names; only rank 0 tracks."""
    length = config.data.sequence_length
    makers: dict[str, Callable[[], Callback]] = {
        "spike_detection": lambda: SpikeDetection(
            config.recovery, schedule, history, is_data_change
        ),
        "spike_recovery": lambda: SpikeRecovery(config.recovery, tiers, schedule, history, length),
        "checkpointing": lambda: Checkpointing(config.checkpoint, tiers),
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
) -> Tiers:
    """Open the checkpoints on disk and the ring in memory. A collective."""
    checkpoint = config.checkpoint
    rewind_steps = config.recovery.furthest_rewind_steps()
    store = CheckpointStore(
        folder.checkpoints,
        world,
        keep_good=checkpoint.keep_good,
        # An onset is seen up to an interval late; the target must still be there.
        keep_steps=rewind_steps + checkpoint.interval_steps if rewind_steps else 0,
        reach_steps=_VERDICT_LAG_STEPS + rewind_steps,
        kept=lambda: history.kept_checkpoints(checkpoint.keep_incidents),
        sequence_length=config.data.sequence_length,
    )
    store.open()
    size = checkpoint.keep_snapshots
    if size and not engine.can_snapshot:
        logger.info("%s keeps no snapshots in memory: rewinds go to disk", engine.name)
        size = 0
    if size:
        size = affordable_size(
            size,
            state_bytes=engine.state_bytes,
            ranks_on_host=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
            available_bytes=available_memory(),
        )
    ring = SnapshotRing(engine, world, size=min(world.gather(size)))
    return Tiers(store, ring, LoadMarks(folder.checkpoints, world))


def _tracking(scene: Scene, engine: Engine) -> Tracking:
    config, folder = scene.config, scene.folder
    telemetry = Telemetry(
        folder=folder.path,
        run_id=folder.run_id,
        attempt=folder.attempt,
        process_start_time=scene.process_start_time,
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
