"""The config of a replay: the run's own, but for what depends on the number of ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import train.attribution.case
from monitoring.replay_plan import CheckpointFacts, ReplayPlan
from train.attribution.case import Case, config_path, open_corpora, replay_config
from train.attribution.replayer import num_steps_in_all
from train.errors import DataError
from train.recovery.history import RecoveryHistory
from train.settings import EngineKind, RunConfig

Compose = Callable[..., dict[str, Any]]


def facts(step: int, num_ranks: int) -> CheckpointFacts:
    return CheckpointFacts(
        name=f"step-{step:08d}-clock-{step:08d}",
        path=Path("/nowhere"),
        step=step,
        cursor=8 * step,
        clock=step,
        num_ranks=num_ranks,
        format="dcp",
        is_quarantined=False,
    )


def case(folder: Path, *, num_ranks: int = 4) -> Case:
    plan = ReplayPlan(
        incident=1,
        attempt=1,
        num_records_before=0,
        verdict="spike",
        reason="spike",
        onset_step=21,
        detected_step=22,
        clock=23,
        target_name=facts(15, num_ranks).name,
        target_step=15,
        skip_stop=0,
        start=facts(15, num_ranks),
        earlier=facts(10, num_ranks),
    )
    return Case(
        folder=folder,
        plan=plan,
        history=RecoveryHistory(),
        capsule={},
        original=(),
        sequence_length=0,
        attempt=0,
        bad_shards={},
    )


@pytest.mark.parametrize(
    ("kind", "num_ranks", "expected"),
    [
        ("single", 2, EngineKind.AUTO),
        ("ddp", 1, EngineKind.AUTO),
        ("fsdp", 2, EngineKind.FSDP),
        ("fsdp", 1, EngineKind.AUTO),
        ("auto", 1, EngineKind.AUTO),
        ("deepspeed", 4, EngineKind.DEEPSPEED),
    ],
)
def test_engine_suits_the_number_of_ranks(
    kind: str, num_ranks: int, expected: EngineKind, compose_node: Compose, tmp_path: Path
) -> None:
    node = compose_node([f"engine={kind}"])
    assert replay_config(case(tmp_path), node, num_ranks=num_ranks).engine.kind is expected


def test_fewer_ranks_take_their_samples_in_parts_as_large_as_before(
    compose_node: Compose, tmp_path: Path
) -> None:
    node = compose_node(["schedule.batch_samples=64", "schedule.batch_ramp_steps=0"])
    assert replay_config(case(tmp_path), node, num_ranks=1).engine.micro_batch_samples == 16
    assert replay_config(case(tmp_path), node, num_ranks=4).engine.micro_batch_samples is None
    given = compose_node(["engine.micro_batch_samples=2"])
    assert replay_config(case(tmp_path), given, num_ranks=1).engine.micro_batch_samples == 2


def test_fault_of_a_rank_that_is_not_there_is_no_obstacle(
    compose_node: Compose, tmp_path: Path
) -> None:
    node = compose_node(["chaos=nan_on_one_rank"])
    node["chaos"]["rank"] = 3
    assert replay_config(case(tmp_path), node, num_ranks=2).chaos.rank == 0
    assert node["chaos"]["rank"] == 3, "what was read stays as it was"


def test_text_that_has_changed_is_refused(
    compose_config: Callable[..., tuple[RunConfig, dict[str, Any]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Corpus:
        digest = "b" * 64

    monkeypatch.setattr(train.attribution.case, "open_sources", lambda *_: {"text": Corpus})
    (tmp_path / "run.json").write_text(json.dumps({"data_digests": {"text": "a" * 64}}))
    config, _ = compose_config()
    with pytest.raises(DataError, match="the corpus of source text has changed"):
        open_corpora(case(tmp_path), config)
    (tmp_path / "run.json").write_text(json.dumps({"data_digests": {"text": "b" * 64}}))
    assert open_corpora(case(tmp_path), config) == {"text": Corpus}
    longer = replace(case(tmp_path), sequence_length=2 * config.data.sequence_length)
    with pytest.raises(DataError, match="the same batches cannot be fed again"):
        open_corpora(longer, config)


def test_steps_of_all_trials_are_counted(tmp_path: Path) -> None:
    one = case(tmp_path)
    assert num_steps_in_all(one, 4) == 3 * (22 - 15 + 4)
    from_memory = replace(one, plan=replace(one.plan, target_step=18))
    assert num_steps_in_all(from_memory, 4) == 3 * (22 - 18 + 4) + 2 * 3


def test_the_config_of_the_start_that_met_the_incident_is_taken(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    for name in ("until-000002.yaml", "until-000005.yaml"):
        (tmp_path / "configs" / name).write_text("")
    found = [config_path(replace(case(tmp_path), attempt=n)).name for n in (0, 1, 2, 4, 5, 9)]
    assert found == [
        *["until-000002.yaml"] * 2,
        *["until-000005.yaml"] * 2,
        *["config.yaml"] * 2,
    ]
