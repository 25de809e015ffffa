"""The engines that shard a model recover as the plain one does, from memory and from disk."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import BAD_DATA, TINY, Fault, assert_trained_once, incidents, run, summary

ENGINES = (["engine=fsdp"], ["engine=deepspeed", "engine.zero_stage=2"])


@pytest.mark.parametrize("keep_snapshots", [2, 0])
@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine[0])
def test_sharded_model_comes_back_and_never_trains_on_what_is_skipped(
    engine: list[str], keep_snapshots: int, tmp_path: Path, recovered_ddp: object
) -> None:
    folder, samples = tmp_path / "run", tmp_path / "samples"
    arguments = [*TINY, *BAD_DATA, *engine, f"checkpoint.keep_snapshots={keep_snapshots}"]
    run(arguments, folder, num_ranks=2, fault=Fault(samples=samples)).expect(0)
    (incident,) = incidents(folder)
    (reference,) = incidents(recovered_ddp.folder)  # type: ignore[attr-defined]
    for key in ("onset_step", "target_step", "skip"):
        assert incident[key] == reference[key]
    for rank in range(2):
        assert_trained_once(folder, samples, rank)
    expected = summary(recovered_ddp.folder)["validation_loss_nats"]  # type: ignore[attr-defined]
    assert summary(folder)["validation_loss_nats"] == pytest.approx(expected, rel=1e-4)
