"""The sole composition root: from a config to a running run.

Called by `main.py` on every rank of a job. Everything that one part needs of another is handed
over here; no part looks for it by itself.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch

from monitoring.console import ConsoleProgress
from monitoring.trackers import build_trackers
from train.callbacks.checkpointing import Checkpointing
from train.callbacks.flight_recorder import FlightRecorder
from train.callbacks.spike_detection import SpikeDetection
from train.callbacks.spike_recovery import SpikeRecovery
from train.callbacks.tracking import Telemetry, Tracking
from train.chaos import inject_into_engine, inject_into_source, schedule_of
from train.checkpoint.snapshots import SnapshotRing, affordable_size, available_memory
from train.checkpoint.store import CheckpointStore
from train.checkpoint.tiers import Tiers
from train.config import flatten
from train.data.corpus import prepare
from train.data.ledger import SkipLedger
from train.data.order import SampleOrder
from train.data.sequence import Returns
from train.data.store import CorpusInfo, TokenStore
from train.data.stream import OrderedSource, SampleSource, SampleStream
from train.distributed import World, join_world
from train.engines.base import Engine
from train.engines.build import build_engine
from train.errors import CheckpointError, ConfigError, RunFolderError, StoppedByPolicyError
from train.events import Callback, Events, RunStart
from train.logs import log_to_folder
from train.loop import Ending, Run, train
from train.models.decoder import flops_per_token
from train.recovery.capsule import Capsules
from train.recovery.control import Inbox
from train.recovery.history import RecoveryHistory
from train.recovery.journal import Journal
from train.recovery.rewind import Rewinder
from train.reports import was_calm_after
from train.run_folder import FolderLock, RunFolder, open_folder
from train.schedule import Schedule
from train.settings import RunConfig
from train.state import TrainState
from train.throughput import peak_flops

logger = logging.getLogger(__name__)

# How long before its verdict a slow divergence can have begun: what the detector looks back on.
_VERDICT_LAG_STEPS = 512


def execute(
    config: RunConfig, node: Mapping[str, Any], *, job_name: str, process_start_time: float
) -> None:
    """Run one job from its first to its last step, or from where it was left.

    `node`: the resolved config as plain containers, for the run folder. Called on all ranks.
    Raises: TrimtabError; StoppedByPolicyError if recovery gave up.
    """
    corpus = prepare(config.data, config.tokenizer)
    if corpus.vocab_size > config.model.vocab_size:
        raise ConfigError(
            [
                f"model.vocab_size={config.model.vocab_size} is smaller than the tokenizer's "
                f"{corpus.vocab_size}; set model.vocab_size={corpus.vocab_size}"
            ]
        )
    _token_store(config, corpus)  # too little text is refused before any process group is made
    if torch.cuda.is_available():  # CPUs give the same bits by themselves, and it costs 0.8 s there
        # cuBLAS needs this, before its first use, to give the same bits each time.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(config.run.is_deterministic)
    with join_world(config.engine, job_name=job_name) as world:
        # The run lives in the frame of this call alone: it must be gone before the group is.
        _execute_in(world, config, node, corpus, process_start_time)


def _execute_in(
    world: World,
    config: RunConfig,
    node: Mapping[str, Any],
    corpus: CorpusInfo,
    process_start_time: float,
) -> None:
    """Open the folder, build the run, and see it through. A collective."""
    store = _token_store(config, corpus)
    with closing(FolderLock(config.run.folder)) as lock:
        folder = _open_folder(config, node, corpus, world, lock)
        log_to_folder(folder.path)
        run = _assemble(config, node, world, folder, corpus, store, process_start_time)
        try:
            _start_and_train(config, world, folder, run, store)
        finally:
            run.events.close()


def _token_store(config: RunConfig, corpus: CorpusInfo) -> TokenStore:
    return TokenStore(
        corpus,
        sequence_length=config.data.sequence_length,
        validation_samples=config.data.validation_samples,
    )


def _open_folder(
    config: RunConfig,
    node: Mapping[str, Any],
    corpus: CorpusInfo,
    world: World,
    lock: FolderLock,
) -> RunFolder:
    """Lock and open the run folder on rank 0, and tell the others. A collective."""
    answer: RunFolder | RunFolderError | None = None
    if world.is_main:
        try:
            lock.acquire()
            answer = open_folder(
                config.run.folder,
                config.run.name,
                node,
                overwrite=config.run.overwrite,
                data_digest=corpus.digest,
            )
        except RunFolderError as error:
            answer = error
        except OSError as error:
            path = config.run.folder
            answer = RunFolderError([f"run.dir: {path} cannot be written ({error.strerror})"])
    problems = world.broadcast(answer.problems if isinstance(answer, RunFolderError) else None)
    if problems:
        raise RunFolderError(problems)
    folder = world.broadcast(answer)
    assert isinstance(folder, RunFolder)
    return folder


def _assemble(
    config: RunConfig,
    node: Mapping[str, Any],
    world: World,
    folder: RunFolder,
    corpus: CorpusInfo,
    store: TokenStore,
    process_start_time: float,
) -> Run:
    """Put all parts together. A collective (engines are)."""
    schedule = schedule_of(config)
    history = RecoveryHistory()
    engine = build_engine(config, world)
    tiers = _tiers(config, folder, engine, history, world)
    ledger, returns = SkipLedger(), Returns()
    stream = SampleStream(
        _source(config, store, schedule),
        ledger,
        rank=world.rank,
        num_ranks=world.size,
        returns=returns,
    )
    recorder = FlightRecorder()
    capsules = Capsules(
        folder.incidents, engine=engine, stream=stream, corpus=corpus, world=world, log=recorder.log
    )
    callbacks = _callbacks(
        config,
        recorder,
        tracking=lambda: _tracking(config, node, world, folder, engine, process_start_time),
        tiers=tiers,
        schedule=schedule,
        history=history,
        world=world,
    )
    events = Events([*callbacks, capsules], is_main=world.is_main)
    logger.info("callbacks in order: %s", events.describe())
    return Run(
        engine=engine,
        data=stream,
        schedule=schedule,
        events=events,
        tiers=tiers,
        history=history,
        rewinder=Rewinder(
            tiers=tiers,
            journal=Journal(folder.journal),
            history=history,
            ledger=ledger,
            returns=returns,
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
    world: World,
) -> list[Callback]:
    """Return the callbacks that the config names; only rank 0 tracks."""
    length = config.data.sequence_length
    makers: dict[str, Callable[[], Callback]] = {
        "spike_detection": lambda: SpikeDetection(config.recovery, schedule, history),
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
    return Tiers(store, SnapshotRing(engine, world, size=min(world.gather(size))))


def _source(config: RunConfig, store: TokenStore, schedule: Schedule) -> SampleSource:
    """Return the samples in order, with the fault that the config puts in, if any."""
    order = SampleOrder(num_samples=store.num_samples, seed=config.run.seed)
    return inject_into_source(OrderedSource(store, order), config, store.vocab_size, schedule)


def _tracking(
    config: RunConfig,
    node: Mapping[str, Any],
    world: World,
    folder: RunFolder,
    engine: Engine,
    process_start_time: float,
) -> Tracking:
    telemetry = Telemetry(
        folder=folder.path,
        run_id=folder.run_id,
        attempt=folder.attempt,
        process_start_time=process_start_time,
        world_size=world.size,
        engine=engine.name,
        host=socket.gethostname(),
        config=flatten(node),
        flops_per_token=flops_per_token(
            config.model, config.data.sequence_length, engine.num_parameters
        ),
        peak_flops=peak_flops(world.device, config.engine.peak_tflops),
        group_names=engine.group_names,
    )
    console = ConsoleProgress(config.run.steps, config.run.name)
    return Tracking(telemetry, build_trackers(config.tracker), config.tracker, console)


def _start_and_train(
    config: RunConfig, world: World, folder: RunFolder, run: Run, store: TokenStore
) -> None:
    resumed = run.rewinder.resume()
    state = TrainState() if resumed is None else resumed.state
    # The loop alone sees the fault: what saves and restores is the real engine.
    engine = inject_into_engine(run.engine, config, world, clock=state.clock)
    run = replace(run, engine=engine)
    is_calm = world.broadcast(
        was_calm_after(state.clock, folder.metrics) if world.is_main else None
    )
    run.events.run_start(
        RunStart(
            name=config.run.name,
            state=state,
            last_step=config.run.steps,
            num_parameters=run.engine.num_parameters,
            is_resumed=resumed is not None,
            # Right behind a rewind, what comes next may be the trouble that it was made for.
            is_sound=is_calm and state.clock > run.history.clock,
        )
    )
    if resumed is not None and resumed.finished_incident is not None:
        run.events.rewound(resumed.finished_incident, state, 0.0)
    with closing(run.inbox):
        run.inbox.start()
        ending = train(run, state)
    run.events.run_end(_summary(config, run, ending, store))
    world.barrier()
    if ending.stop is not None and ending.stop.is_failure:
        raise StoppedByPolicyError(ending.stop.reason)
    if not ending.is_saved:
        raise CheckpointError(
            f"the run is complete, but its last checkpoint could not be written to "
            f"{run.tiers.store.folder}; make room and run the same command again"
        )


def _summary(config: RunConfig, run: Run, ending: Ending, store: TokenStore) -> dict[str, object]:
    """Return how the run ended; evaluates the held-out samples. A collective."""
    started = time.perf_counter()
    loss = None
    if config.data.validation_samples and ending.stop is None:
        loss = run.engine.evaluate(store.validation_rows())
    skipped = run.data.ledger.num_samples() - run.data.returns.num_samples()
    return {
        "name": config.run.name,
        "finished": ending.stop is None,
        "reason": "completed" if ending.stop is None else ending.stop.reason,
        "reason_code": "completed" if ending.stop is None else ending.stop.code,
        **ending.state.as_dict(),
        "validation_loss_nats": loss,
        "evaluation_seconds": time.perf_counter() - started,
        "skipped_samples": skipped,
        "skipped_tokens": skipped * config.data.sequence_length,
    }
