"""Whole runs on mixtures, foreign files, remote and damaged shards; and what may change between."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import (
    ROOT,
    TINY,
    Fault,
    checkpoints,
    command,
    incidents,
    lineage,
    losses_by_step,
    metrics,
    records,
    run,
    summary,
)

STDLIB = sysconfig.get_paths()["stdlib"]
NO_RECOVERY = (*TINY, "recovery=none")
MIXTURE = (
    *TINY,
    "data.paths=[]",
    f"data.sources.tasks.paths=[{STDLIB}/asyncio]",
    f"data.sources.mail.paths=[{STDLIB}/email]",
    "data.sources.tasks.weight=0.75",
    "data.sources.mail.weight=0.25",
    "data.validation_share=0.1",
    "data.validation_samples=8",
)


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in records(folder / "events.jsonl") if record["kind"] == kind]


def state(checkpoint: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
    return loaded


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a corpus in several shards, made by the real command."""
    folder = tmp_path_factory.mktemp("prepared") / "corpus"
    options = ["--tokenizer=bytes", "--validation-share=0.1", "--shard-tokens=100000"]
    sources = [f"{STDLIB}/asyncio", f"{STDLIB}/email", f"--output={folder}"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "train" / "prepare.py"), *sources, *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


# Mixtures and validation.


def test_a_mixture_trains_in_its_proportions_and_is_evaluated_by_source(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    stage = "data.stages=[{start: 5k tokens, weights: {tasks: 0.2, mail: 0.8}}]"
    arguments = (*MIXTURE, stage, "data.validation_interval_steps=10")
    run(arguments, folder).expect(0)
    assert summary(folder)["finished"] and incidents(folder) == []
    evaluations = events(folder, "evaluation")
    assert [record["step"] for record in evaluations] == [10, 20, 30, 40]
    for record in evaluations:
        assert set(record["by_source"]) == {"tasks", "mail"}
    first, last = evaluations[0]["by_source"], evaluations[-1]["by_source"]
    assert all(last[name] < first[name] for name in first)
    assert summary(folder)["validation_by_source"] == last


def test_evaluating_on_the_way_changes_no_bit_of_the_training(tmp_path: Path) -> None:
    without, with_them = tmp_path / "without", tmp_path / "with"
    run(MIXTURE, without).expect(0)
    run((*MIXTURE, "data.validation_interval_steps=3"), with_them).expect(0)
    assert losses_by_step(without) == losses_by_step(with_them)


def test_a_mixture_that_ends_before_the_run_is_refused(tmp_path: Path) -> None:
    limits = ("data.sources.tasks.max_epochs=0.01", "data.sources.mail.max_epochs=0.01")
    result = run((*MIXTURE, *limits), tmp_path / "run").expect(2)
    assert "data.sources: with their max_epochs they give" in result.output
    assert not (tmp_path / "run").exists()


def test_a_mixture_that_ends_in_the_midst_of_a_run_saves_and_says_so(tmp_path: Path) -> None:
    """It was long enough when the run began; then the batches were made larger."""
    folder = tmp_path / "run"
    limits = ("data.sources.tasks.max_epochs=0.05", "data.sources.mail.max_epochs=0.05")
    run((*MIXTURE, *limits, "run.steps=10"), folder).expect(0)
    larger = ("run.steps=200", "schedule.batch_samples=64", "data.isolates_documents=false")
    result = run((*MIXTURE, *limits, *larger), folder, num_ranks=2).expect(3)
    assert "the sources have given all of their" in result.output
    assert "Traceback" not in result.output
    assert summary(folder)["reason_code"] == "data_exhausted"
    last = state(checkpoints(folder)[-1])["train_state"]
    assert last["step"] == summary(folder)["step"] > 10


# What may change when a run is taken up again.


def test_batch_size_length_and_ranks_change_and_every_sample_is_trained_on_once(
    tmp_path: Path,
) -> None:
    folder, samples = tmp_path / "run", tmp_path / "samples"
    run((*NO_RECOVERY, "run.steps=12"), folder, fault=Fault(samples=samples)).expect(0)
    longer = ("run.steps=20", "schedule.batch_samples=12", "schedule.batch_ramp_start_samples=12")
    result = run(
        (*NO_RECOVERY, *longer, "schedule.batch_ramp_steps=0", "data.read_ahead_batches=0"),
        folder,
        num_ranks=2,
        fault=Fault(samples=samples),
    ).expect(0)
    assert "run.steps: the folder has 12, now 20" in result.output
    trained = lineage(samples)
    assert trained == list(range(len(trained)))
    assert len(trained) == 4 * 4 + 8 * 8 + 8 * 12


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_micro_batches_and_read_ahead_change_no_sample(micro_batch: int, tmp_path: Path) -> None:
    seen = []
    for number, extra in enumerate(
        [(), (f"engine.micro_batch_samples={micro_batch}", "data.read_ahead_batches=3")]
    ):
        samples = tmp_path / f"samples{number}"
        run(
            (*NO_RECOVERY, "run.steps=8", *extra),
            tmp_path / f"run{number}",
            fault=Fault(samples=samples),
        ).expect(0)
        seen.append(lineage(samples))
    assert seen[0] == seen[1]


def test_another_sequence_length_maps_cursor_and_ledger_by_tokens(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = (*TINY, "chaos=bad_data", "chaos.start=20 batches", "chaos.length=4 batches")
    run((*arguments, "run.steps=40"), folder).expect(0)
    before = state(checkpoints(folder)[-1])
    assert before["ledger"], "something was skipped"
    longer = ("run.steps=44", "data.sequence_length=48")
    result = run((*arguments, *longer), folder).expect(0)
    after = state(checkpoints(folder)[-1])
    assert "data.sequence_length is 48 now and was 32" in result.output
    (old_start, old_stop), (start, stop) = before["ledger"][0], after["ledger"][0]
    assert start * 48 <= old_start * 32 and stop * 48 >= old_stop * 32
    resumed_at = -(-before["train_state"]["cursor"] * 32 // 48)
    assert after["train_state"]["cursor"] == resumed_at + 4 * 8


def test_other_samples_behind_a_checkpoint_are_found_out(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run((*MIXTURE, "run.steps=10"), folder).expect(0)
    weights = ("data.sources.tasks.weight=0.25", "data.sources.mail.weight=0.75")
    result = run((*MIXTURE, *weights, "run.steps=12"), folder).expect(2)
    assert "by the mixture of now it would be" in result.output
    run((*MIXTURE, "run.steps=12"), folder).expect(0)


def test_a_source_for_a_later_stage_can_be_added_on_the_way(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run((*MIXTURE, "run.steps=10"), folder).expect(0)
    added = (
        f"data.sources.logs.paths=[{STDLIB}/logging]",
        "data.sources.logs.weight=0",
        "data.stages=[{start: 4k tokens, weights: {tasks: 1, logs: 1}}]",
    )
    run((*MIXTURE, *added, "run.steps=20"), folder).expect(0)
    assert len(losses_by_step(folder)) == 20


# Files of tokens.


def of(corpus: object) -> tuple[str, ...]:
    return (*NO_RECOVERY, "run.steps=8", f"data.paths=[{corpus}]", "data.validation_samples=4")


def test_a_prepared_corpus_gives_the_same_run_locally_and_from_a_remote_address(
    prepared: Path, tmp_path: Path
) -> None:
    run(of(prepared), tmp_path / "local").expect(0)
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    run((*of(f"file://{prepared}"), cache), tmp_path / "remote").expect(0)
    assert losses_by_step(tmp_path / "local") == losses_by_step(tmp_path / "remote")
    assert list((tmp_path / "cache").rglob("*.bin*")), "the shards came through the cache"


def test_a_missing_shard_stops_the_run_or_is_skipped_into_the_ledger(
    prepared: Path, tmp_path: Path
) -> None:
    corpus = tmp_path / "corpus"
    shutil.copytree(prepared, corpus)
    gone = sorted(corpus.glob("train-*.bin"))[1]
    whole = gone.read_bytes()
    gone.unlink()
    result = run(of(corpus), tmp_path / "stopped").expect(2)
    assert gone.name in result.output and "data.on_bad_shard=skip" in result.output
    folder, samples = tmp_path / "skipped", tmp_path / "samples"
    skipping = (*of(corpus), "data.on_bad_shard=skip")
    run(skipping, folder, num_ranks=2, fault=Fault(samples=samples)).expect(0)
    ledger = state(checkpoints(folder)[-1])["ledger"]
    skipped = {sample for start, stop in ledger for sample in range(start, stop)}
    trained = lineage(samples)
    assert skipped and not skipped & set(trained)
    assert sorted([*skipped, *trained])[: len(trained)] == list(range(len(trained)))
    assert summary(folder)["skipped_samples"] == len(skipped)
    (event,) = events(folder, "bad_shards")
    assert gone.name in event["lines"][0]
    # The file is back: what was skipped stays skipped, the rest is read again.
    gone.write_bytes(whole)
    run((*skipping, "run.steps=10"), folder, fault=Fault(samples=samples)).expect(0)
    assert state(checkpoints(folder)[-1])["ledger"] == ledger


@pytest.mark.parametrize(
    "extra",
    [
        ("data.isolates_documents=true",),
        ("data.packing=best_fit",),
        ("data.packing=best_fit", "data.isolates_documents=true", "engine.micro_batch_samples=1"),
        ("data.block_samples=8", "data.window_blocks=4"),
    ],
)
def test_packing_isolation_and_local_order_train(extra: tuple[str, ...], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run((*NO_RECOVERY, *extra, "data.validation_share=0.1"), folder, num_ranks=2).expect(0)
    losses = list(losses_by_step(folder).values())
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.5
    assert summary(folder)["validation_loss_nats"] < np.mean(losses[:5])


def test_tokens_of_another_tokenizer_are_refused_before_the_model_sees_them(
    tmp_path: Path,
) -> None:
    tokens = tmp_path / "tokens.bin"
    np.arange(40_000, dtype=np.uint16).tofile(tokens)
    result = run((*of(tokens), "data.token_dtype=uint16"), tmp_path / "run").expect(2)
    assert "is not in the vocabulary, which has 257" in result.output
    assert metrics(tmp_path / "run") == []


def test_plain_token_files_train(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.bin"
    generator = np.random.default_rng(0)
    generator.integers(0, 257, 40_000, dtype=np.uint16).tofile(tokens)
    run((*of(tokens), "data.token_dtype=uint16"), tmp_path / "run").expect(0)
    assert summary(tmp_path / "run")["validation_loss_nats"] is not None


def test_bad_settings_of_the_data_come_in_one_message(tmp_path: Path) -> None:
    result = command(
        (
            *TINY,
            "data.sources.a.paths=[]",
            "data.sources.b.paths=[/no/such/place]",
            "data.stages=[{start: 5 steps, weights: {c: 1}}, {start: 1k tokens, weights: {a: 0}}]",
            "data.token_dtype=float32",
        ),
        tmp_path / "run",
    ).expect(2)
    for part in (
        "data.paths and data.sources are both set",
        "data.sources.a.paths is empty",
        "data.sources.b.paths: /no/such/place does not exist",
        "data.stages[0].start=5 steps: a mixture is scheduled over tokens",
        "data.stages[0].weights.c: there is no such source",
        "data.stages[1].weights: every weight is 0",
        "data.token_dtype=float32",
    ):
        assert part in result.output
