"""The evidence of each incident, kept before the state that shows it is replaced.

A capsule is one JSON file, `incidents/<incident>-<attempt>/capsule.json`: what was decided, the
worst samples and where their text comes from, the last reports with all norms, which ranks stood
out, and the environment. Owns its gathering and its place; refuses to hold up or to stop a
recovery: what cannot be written is a warning, and texts are decoded when the run is on its way
again. Called by the rewinder on all ranks.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from train.data.shards import Corpus
from train.data.stream import SampleStream
from train.data.text import TokenDecoder
from train.distributed import World
from train.durable import write_atomically
from train.engines.base import Engine
from train.errors import DataError
from train.events import Callback, CallbackPhase
from train.recovery.capsule_json import Capsule, as_text
from train.recovery.environment import (
    device_name,
    git_revision,
    host_name,
    ranks_by_value,
    versions,
)
from train.recovery.flight_log import FlightLog
from train.recovery.journal import Incident
from train.recovery.suspects import (
    Losses,
    SampledStep,
    Suspect,
    last_steps,
    odd_ranks,
    pair,
    worst_samples,
)
from train.state import TrainState

logger = logging.getLogger(__name__)

CAPSULE_FILE = "capsule.json"
NUM_INCIDENTS_KEPT = 50
MAX_TEXT_CHARACTERS = 600
_MAX_ORIGINS = 16
_MAX_RANKS_LISTED = 256
_FOLDER_NAME = re.compile(r"^(\d+)-(\d+)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class _RankEvidence:
    """What one rank knows alone; `losses` of its samples in the last steps, oldest first."""

    host: str
    device: str
    losses: list[Losses]
    problem: str | None = None


class Capsules(Callback):
    """Writes a capsule when a rewind is decided. As a callback it only waits for the last one."""

    phase = CallbackPhase.REPORT

    def __init__(
        self,
        folder: Path,
        *,
        engine: Engine,
        stream: SampleStream,
        corpora: Sequence[Corpus],
        world: World,
        log: FlightLog,
    ) -> None:
        self._folder = folder
        self._engine = engine
        self._stream = stream
        # All sources have one tokenizer, though not all files say so.
        self._corpus = next((c for c in corpora if c.tokenizer_fingerprint), corpora[0])
        self._world = world
        self._log = log
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="capsule")

    def close(self) -> None:
        """Return when the last capsule is complete."""
        self._writer.shutdown()

    def capture(self, intent: Incident, state: TrainState) -> None:
        """Keep what is known now. A collective, and a host sync; it raises nothing of its own.

        `state`: where the run stands, the step in flight included. Called before the state and the
        skip ledger are changed.
        """
        answers: list[_RankEvidence] = self._world.gather(self._own_evidence(intent, state))
        if not self._world.is_main:
            return
        path = capsule_path(self._folder, intent.incident, intent.attempt)
        try:
            capsule = self._assemble(intent, state, answers)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, as_text(capsule))
        except OSError as error:
            logger.warning("the capsule of incident %d is not written: %s", intent.incident, error)
            return
        except Exception:  # evidence is not worth a recovery, let alone one rank alone failing
            logger.warning("the capsule of incident %d failed", intent.incident, exc_info=True)
            return
        self._writer.submit(self._complete, path, capsule)

    def _own_evidence(self, intent: Incident, state: TrainState) -> _RankEvidence:
        losses: list[Losses] = []
        device = "unknown"
        problem = None
        try:
            device = device_name(self._world.device)
            recent = self._engine.recent_sample_losses()  # host sync
            count = last_steps(recent, state, intent.onset_step)
            losses = [np.array(step, dtype=np.float64) for step in recent[len(recent) - count :]]
        except Exception as error:  # noqa: BLE001 - the other ranks wait for an answer
            problem = f"{type(error).__name__}: {error}"[:300]
        return _RankEvidence(host=host_name(), device=device, losses=losses, problem=problem)

    def _assemble(
        self, intent: Incident, state: TrainState, answers: Sequence[_RankEvidence]
    ) -> Capsule:
        steps = pair([answer.losses for answer in answers], self._log, state)
        hosts = [answer.host for answer in answers]
        incident = {key: value for key, value in asdict(intent).items() if key != "phase"}
        return {
            "format": 1,
            "incident": incident,
            "state": state.as_dict(),
            "suspects": [
                self._describe(suspect, hosts)
                for suspect in worst_samples(steps, intent.onset_step)
            ],
            "ranks": self._ranks(steps, intent.onset_step, answers),
            "group_names": list(self._engine.group_names),
            "reports": [_rounded(step.as_record()) for step in self._log.steps],
            "environment": {
                "versions": versions(),
                "revision": git_revision(),
                "engine": self._engine.name,
                "num_ranks": self._world.size,
                "hosts": ranks_by_value(hosts),
                "devices": ranks_by_value([answer.device for answer in answers]),
            },
            "has_texts": False,
        }

    def _describe(self, suspect: Suspect, hosts: Sequence[str]) -> dict[str, object]:
        plan = self._stream.plan(suspect.cursor_before, suspect.num_samples)
        position, index = int(plan.positions[suspect.place]), int(plan.indices[suspect.place])
        record: dict[str, object] = {
            "order_index": index,
            "position": position,
            "step": suspect.step,
            "clock": suspect.clock,
            "rank": suspect.rank,
            "host": hosts[suspect.rank],
            "loss_nats": suspect.loss_nats,
            "excess_nats": suspect.excess_nats,
        }
        try:
            origins = self._stream.origins_of(index)
        except DataError as error:
            return {**record, "num_origins": 0, "origins": [], "problem": str(error)}
        return {
            **record,
            "num_origins": len(origins),
            "origins": [asdict(origin) for origin in origins[:_MAX_ORIGINS]],
        }

    def _ranks(
        self, steps: Sequence[SampledStep], onset_step: int, answers: Sequence[_RankEvidence]
    ) -> dict[str, object]:
        """Return which ranks stood out, by their reports and by their own samples' losses."""
        hosts = [answer.host for answer in answers]
        bad = next(
            (
                step.report
                for step in self._log.steps
                if step.report.signals.bad_rank is not None and step.report.state.step >= onset_step
            ),
            None,
        )
        bad_rank = None if bad is None else bad.signals.bad_rank
        odd = odd_ranks(steps, onset_step)
        is_short = len(answers) <= _MAX_RANKS_LISTED
        return {
            "bad_rank": bad_rank,
            "bad_rank_host": None if bad_rank is None else hosts[bad_rank],
            "bad_rank_step": None if bad is None else bad.state.step,
            "odd": None
            if odd is None
            else {**asdict(odd), "hosts": [hosts[rank] for rank in odd.ranks]},
            "losses": [
                {
                    "step": step.step,
                    "is_reported": step.is_reported,
                    "loss_nats": float(step.losses.mean()),
                    "by_rank": [float(f"{mean:.6g}") for mean in step.by_rank()]
                    if is_short
                    else [],
                }
                for step in steps
            ],
            "problems": {
                str(rank): answer.problem
                for rank, answer in enumerate(answers)
                if answer.problem is not None
            },
        }

    def _complete(self, path: Path, capsule: Capsule) -> None:
        """Add the texts and make room. Runs in a thread: no collective, no engine, no exception."""
        try:
            suspects = capsule["suspects"]
            if suspects:
                decoder = TokenDecoder.open(self._corpus)
                indices = np.array([one["order_index"] for one in suspects], dtype=np.int64)
                for suspect, row in zip(suspects, self._stream.rows_of(indices), strict=True):
                    suspect["text"] = decoder.decode(row.tolist(), MAX_TEXT_CHARACTERS)
            write_atomically(path, as_text({**capsule, "has_texts": True}))
            remove_old(self._folder, num_kept=NUM_INCIDENTS_KEPT)
        except (OSError, DataError) as error:
            logger.warning("%s is left without the texts of its samples: %s", path, error)
        except Exception:  # a thread's exception would be seen by no one
            logger.warning("%s is left without the texts of its samples", path, exc_info=True)


def capsule_path(folder: Path, incident: int, attempt: int) -> Path:
    """Return where the capsule of one attempt lies; `folder` is the run's `incidents`."""
    return folder / f"{incident:04d}-{attempt}" / CAPSULE_FILE


def remove_old(folder: Path, *, num_kept: int) -> None:
    """Remove what is kept of all but the last `num_kept` incidents."""
    found = [(path, match) for path in folder.iterdir() if (match := _FOLDER_NAME.match(path.name))]
    numbers = sorted({int(match[1]) for _, match in found})
    for path, match in found:
        if int(match[1]) not in numbers[-num_kept:]:
            shutil.rmtree(path, ignore_errors=True)


def _rounded(report: Mapping[str, object]) -> dict[str, object]:
    """Return a report whose group norms, of which there are many, have six digits."""
    norms = report["group_norms"]
    assert isinstance(norms, list)
    return {**report, "group_norms": [float(f"{norm:.6g}") for norm in norms]}
