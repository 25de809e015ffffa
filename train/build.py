"""The sole composition root: from a config to a running run, and what it leaves behind.

Called by `main.py` on every rank of a job; `assembly` puts the parts together.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Any

import torch

from monitoring.clocks import Birth
from train.assembly import Scene, assemble
from train.chaos import inject_into_engine, schedule_of
from train.data.build import (
    RunData,
    build_data,
    find_bad_shards,
    refuse_short_mixture,
    warn_of_late_stages,
)
from train.data.corpus import open_sources
from train.data.read_ahead import ReadAhead
from train.data.shards import Corpus
from train.distributed import World, join_world
from train.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    RunFolderError,
    StoppedByPolicyError,
)
from train.events import RunStart
from train.health.guard import ended_by_signal, guarded
from train.health.interruption import Interruption
from train.health.pulse import Phase
from train.logs import log_to_folder
from train.loop import Ending, Run, train
from train.reports import was_calm_after
from train.run_folder import FolderLock, RunFolder, open_folder
from train.settings import RunConfig
from train.state import TrainState

logger = logging.getLogger(__name__)


def execute(
    config: RunConfig,
    node: Mapping[str, Any],
    *,
    job_name: str,
    birth: Birth,
    interruption: Interruption,
) -> None:
    """Run one job from its first to its last step, or from where it was left.

    `node`: the resolved config as plain containers, for the run folder. Called on all ranks.
    Raises: TrimtabError; StoppedByPolicyError if recovery gave up, RunEndedError after a signal.
    """
    corpora = open_sources(config.data, config.tokenizer)
    vocab_size = max((corpus.vocab_size or 0 for corpus in corpora.values()), default=0)
    if vocab_size > config.model.vocab_size:
        raise ConfigError(
            [
                f"model.vocab_size={config.model.vocab_size} is smaller than the tokenizer's "
                f"{vocab_size}; set model.vocab_size={vocab_size}"
            ]
        )
    # Too little text is refused before any process group is made.
    data = build_data(corpora, config.data, seed=config.run.seed)
    if config.run.overwrite or not config.run.folder.exists():
        refuse_short_mixture(data, config.data, schedule_of(config))
    if torch.cuda.is_available():  # CPUs give the same bits by themselves, and it costs 0.8 s there
        # cuBLAS needs this, before its first use, to give the same bits each time.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(config.run.is_deterministic)
    with join_world(config.engine, job_name=job_name) as world:
        # The run lives in the frame of this call alone: it must be gone before the group is.
        _execute_in(world, config, node, corpora, data, birth, interruption)


def _execute_in(
    world: World,
    config: RunConfig,
    node: Mapping[str, Any],
    corpora: Mapping[str, Corpus],
    data: RunData,
    birth: Birth,
    interruption: Interruption,
) -> None:
    """Open the folder, build the run, and see it through. A collective."""
    _agree_on_corpora(world, corpora)
    with closing(FolderLock(config.run.folder)) as lock, ExitStack() as stack:
        folder = _open_folder(config, node, corpora, world, lock)
        log_to_folder(folder.path)
        guard = stack.enter_context(guarded(config, node, world, folder, interruption))
        bad_shards = find_bad_shards(corpora, config.data, world)
        schedule = schedule_of(config)
        if any(bad_shards.values()):
            data = build_data(corpora, config.data, seed=config.run.seed, bad_shards=bad_shards)
        data.validation.check(config.model.vocab_size)
        if world.is_main:
            warn_of_late_stages(config.data, schedule)
        run = assemble(
            Scene(
                config=config,
                node=node,
                world=world,
                folder=folder,
                schedule=schedule,
                corpora=corpora,
                data=data,
                bad_shards=bad_shards,
                birth=birth,
            )
        )
        guard.compare_speeds_of(run.engine.model, config.health)
        run = replace(run, guard=guard)
        try:
            _start_and_train(config, world, folder, run, node)
        finally:
            run.events.close()
            run.saver.close()
            if isinstance(run.data, ReadAhead):
                run.data.close()


def _agree_on_corpora(world: World, corpora: Mapping[str, Corpus]) -> None:
    """Refuse ranks that see other data than rank 0. A collective. Raises: DataError on all."""
    seen = world.gather({name: corpus.digest for name, corpus in corpora.items()})
    others = [rank for rank, digests in enumerate(seen) if digests != seen[0]]
    if others:
        raise DataError(
            f"the corpora of rank {others[0]} are not those of rank 0 ({len(others)} ranks "
            "differ): give all hosts the same files behind data.paths and data.sources"
        )


def _open_folder(
    config: RunConfig,
    node: Mapping[str, Any],
    corpora: Mapping[str, Corpus],
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
                data_digests={name: corpus.digest for name, corpus in corpora.items()},
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


def _start_and_train(
    config: RunConfig, world: World, folder: RunFolder, run: Run, node: Mapping[str, Any]
) -> None:
    resumed = run.rewinder.resume()
    if world.is_main:
        # Not before the resume has found the data to be the ones that it knows.
        _take_up(folder, node)
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
            is_sound=is_calm and state.clock > run.history.clock and not folder.changes,
            is_changed=bool(folder.changes),
        )
    )
    if resumed is not None and resumed.finished_incident is not None:
        run.events.rewound(resumed.finished_incident, state, 0.0)
    with closing(run.inbox):
        run.inbox.start()
        ending = train(run, state)
    run.guard.enter(Phase.END, ending.state.step)
    run.saver.finish()
    run.events.run_end(_summary(config, run, ending))
    world.barrier()
    if ending.stop is not None and ending.stop.is_failure:
        raise StoppedByPolicyError(ending.stop.reason, ending.stop.code)
    if ending.stop is not None:
        raise ended_by_signal(ending.stop)
    if not ending.is_saved:
        raise CheckpointError(
            f"the run is complete, but its last checkpoint could not be written to "
            f"{run.tiers.store.folder}; make room and run the same command again"
        )


def _take_up(folder: RunFolder, node: Mapping[str, Any]) -> None:
    try:
        folder.take_up(node)
    except OSError as error:
        logger.warning(
            "%s cannot be written (%s): it still has the settings of the start before",
            folder.path / "config.yaml",
            error.strerror,
        )


def _summary(config: RunConfig, run: Run, ending: Ending) -> dict[str, object]:
    """Return how the run ended."""
    evaluation = ending.evaluation
    run.data.skipped()  # what was passed over is counted too
    skipped = run.data.ledger.num_samples() - run.data.returns.num_samples()
    return {
        "name": config.run.name,
        "finished": ending.stop is None,
        "reason": "completed" if ending.stop is None else ending.stop.reason,
        "reason_code": "completed" if ending.stop is None else ending.stop.code,
        **ending.state.as_dict(),
        "validation_loss_nats": None if evaluation is None else evaluation.loss_nats,
        "validation_by_source": {} if evaluation is None else dict(evaluation.by_source),
        "skipped_samples": skipped,
        "skipped_tokens": skipped * config.data.sequence_length,
    }
