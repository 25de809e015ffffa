"""What a run folder says about one incident: what a replay starts from.

Reads the run's config, journal, checkpoints, metrics and capsule; writes nothing. Refuses a corpus
that has changed since. Called by `replayer` and its command.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from monitoring.attribution import curve_before
from monitoring.records import (
    CONFIG_FILE,
    EVENTS_FILE,
    METRICS_FILE,
    RUN_FILE,
    integer,
    number,
    read_json_lines,
)
from monitoring.replay_plan import INCIDENTS_FOLDER, ReplayPlan, checkpoints_of, make_plan
from train.config import parse_config
from train.data.corpus import open_sources
from train.data.shards import Corpus
from train.errors import DataError
from train.recovery.capsule import CAPSULE_FILE
from train.recovery.history import RecoveryHistory
from train.recovery.journal import Incident, Journal
from train.run_folder import CONFIGS
from train.settings import EngineKind, RunConfig

JOURNAL_FILE = "journal.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """An incident and all that the run folder says about it. Equal on all ranks."""

    folder: Path
    plan: ReplayPlan
    history: RecoveryHistory
    capsule: Mapping[str, Any]
    original: Sequence[Mapping[str, Any]]
    sequence_length: int
    attempt: int
    """Which start of the run met the incident, from 0."""
    bad_shards: Mapping[str, Mapping[int, str]]
    """The files of tokens that this start could not use."""

    def losses(self) -> dict[int, float | None]:
        """Return the run's losses by step, None where they were not finite."""
        return {int(point["step"]): number(point, "loss_nats") for point in self.original}

    @property
    def run_ranks(self) -> int:
        """How many ranks the run had."""
        return self.plan.start.num_ranks


def read_case(folder: Path, incident: int) -> Case:
    """Return what a run folder says about an incident. Reads alone.

    Raises: NoReplayError; JournalError if the journal was changed.
    """
    records: list[Incident] = Journal(folder / JOURNAL_FILE).read()
    plan = make_plan([asdict(r) for r in records], checkpoints_of(folder), incident)
    length = next(r.sequence_length for r in records if r.incident == incident)
    records = Journal(folder / JOURNAL_FILE, sequence_length=length).read()  # skips of others, too
    metrics = read_json_lines(folder / METRICS_FILE).records
    before = [r for r in metrics if (integer(r, "clock") or 0) <= plan.clock]
    attempt = (integer(before[-1], "attempt") or 0) if before else 0
    return Case(
        folder=folder,
        attempt=attempt,
        bad_shards=_bad_shards(folder, attempt),
        sequence_length=length,
        plan=plan,
        history=RecoveryHistory(records[: plan.num_records_before]),
        capsule=_read_object(folder / INCIDENTS_FOLDER / plan.folder_name / CAPSULE_FILE),
        original=curve_before(
            metrics,
            clock=plan.clock,
            steps=range(plan.start.step + 1, plan.detected_step + 2),
        ),
    )


def config_path(case: Case) -> Path:
    """Return where the config lies that the run had when it met the incident."""
    kept = sorted((case.folder / CONFIGS).glob("until-*.yaml"))
    later = [path for path in kept if int(path.stem.removeprefix("until-")) > case.attempt]
    return later[0] if later else case.folder / CONFIG_FILE


def _bad_shards(folder: Path, attempt: int) -> dict[str, dict[int, str]]:
    found: dict[str, dict[int, str]] = {}
    for event in read_json_lines(folder / EVENTS_FILE).records:
        numbers = event.get("numbers")
        is_it = event.get("kind") == "bad_shards" and event.get("attempt") == attempt
        if is_it and isinstance(numbers, Mapping):
            found = {str(name): dict.fromkeys(each, "") for name, each in numbers.items()}
    return found


def replay_config(case: Case, node: Mapping[str, Any], *, num_ranks: int) -> RunConfig:
    """Return the run's config for a replay on `num_ranks`.

    Engines other than DeepSpeed share one checkpoint format, so the number of ranks may differ. On
    fewer ranks each has more samples: they are taken in parts as large as a rank of the run had.
    """
    changed: dict[str, Any] = copy.deepcopy(dict(node))
    engine = changed["engine"]
    is_bound_to_ranks = engine["kind"] in (EngineKind.SINGLE, EngineKind.DDP)
    if is_bound_to_ranks or (engine["kind"] == EngineKind.FSDP and num_ranks == 1):
        engine["kind"] = str(EngineKind.AUTO)
    if engine["micro_batch_samples"] is None and num_ranks < case.run_ranks:
        engine["micro_batch_samples"] = changed["schedule"]["batch_samples"] // case.run_ranks
    if changed["chaos"]["rank"] >= num_ranks:
        changed["chaos"]["rank"] = 0  # what struck one rank strikes once, and not in a replay
    return parse_config(changed, world_size=num_ranks)


def open_corpora(case: Case, config: RunConfig) -> dict[str, Corpus]:
    """Return the corpora of the run. Raises: DataError if text or length of samples are others."""
    length, then = config.data.sequence_length, case.sequence_length
    if then not in (0, length):
        raise DataError(
            f"incident {case.plan.incident} happened at data.sequence_length={then}, and the run "
            f"has gone on with {length}: the same batches cannot be fed again"
        )
    corpora = open_sources(config.data, config.tokenizer)
    known = _read_object(case.folder / RUN_FILE).get("data_digests") or {}
    for name, corpus in corpora.items():
        if known.get(name) != corpus.digest:
            raise DataError(
                f"the corpus of source {name} has changed since {case.folder} was begun (digest "
                f"{str(known.get(name))[:12]}, now {corpus.digest[:12]}): the same batches cannot "
                "be fed again; bring the text back"
            )
    return corpora


def _read_object(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
