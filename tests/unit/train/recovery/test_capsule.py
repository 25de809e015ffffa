"""A capsule holds the evidence, is bounded, and never stops a recovery."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from sources import RowSource

from train.data.ledger import SkipLedger
from train.data.origins import SampleOrigin
from train.data.sequence import Returns
from train.data.shards import Corpus, Split
from train.data.stream import SampleStream
from train.distributed import World
from train.errors import DataError
from train.recovery import capsule as capsule_module
from train.recovery.capsule import Capsules, capsule_path, remove_old
from train.recovery.capsule_json import MAX_BYTES, as_text
from train.recovery.environment import git_revision, ranks_by_value
from train.recovery.flight_log import FlightLog
from train.recovery.journal import Incident, Phase
from train.recovery.verdict import Verdict, VerdictKind
from train.signals import StepReport, StepSignals
from train.state import BatchRange, TrainState

BATCH = 4
WORLD = World(rank=0, size=1, device=torch.device("cpu"))


class Source(RowSource):
    """Sample i is the byte i, nine times."""

    sample_tokens = 9
    dtype = np.dtype(np.uint16)

    def rows(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.integer]:
        return np.repeat(indices.astype(np.uint16)[:, None] % 256, 9, axis=1)

    def origins(self, index: int) -> tuple[SampleOrigin, ...]:
        return (
            SampleOrigin(
                file=f"/text/{index}.txt",
                line=index,
                document=index,
                token_offset_in_document=0,
                num_tokens=9,
            ),
        )


class LostSource(Source):
    """Its index of documents is damaged."""

    def origins(self, index: int) -> tuple[SampleOrigin, ...]:
        raise DataError("the index is damaged")


@dataclass
class LossyEngine:
    """Knows losses and nothing else."""

    losses: list[list[float]]
    name: str = "fake"
    group_names: tuple[str, ...] = ("embedding", "head")

    def recent_sample_losses(self) -> list[list[float]]:
        return self.losses


class BrokenEngine(LossyEngine):
    """Cannot say what it saw."""

    def recent_sample_losses(self) -> list[list[float]]:
        raise RuntimeError("device lost")


@dataclass(frozen=True)
class TwoRanks(World):
    """Rank 0 of two; the other rank's evidence is given."""

    other: dict[str, Any] = field(default_factory=dict)

    def gather(self, value: Any) -> list[Any]:
        return [value, capsule_module._RankEvidence(**self.other)]


def intent(**changes: Any) -> Incident:
    fields: dict[str, Any] = {
        "incident": 3,
        "phase": Phase.INTENT,
        "time": "2026-01-01T00:00:00.000+00:00",
        "rule": "ladder",
        "reason": "spike",
        "verdict": "spike",
        "onset_step": 3,
        "detected_step": 4,
        "clock": 5,
        "target_checkpoint": "step-00000001-clock-00000001",
        "target_step": 1,
        "skip": (4, 20),
        "quarantine": (),
        "kept": ("step-00000001-clock-00000001",),
    }
    return Incident(**{**fields, **changes})


def log_until(step: int, *, bad_rank: int | None = None) -> FlightLog:
    log = FlightLog()
    for number in range(1, step + 1):
        signals = StepSignals(
            loss_nats=3.0,
            grad_norm=1.0,
            is_vetoed=False,
            num_bad_ranks=int(bad_rank is not None),
            bad_rank=bad_rank,
            group_norms=(1.0, 2.0),
        )
        verdict = Verdict(
            kind=VerdictKind.OK, step=number, onset_step=number, baseline_nats=3.0, sigma=0.1
        )
        log.add(
            StepReport(
                state=state_at(number),
                signals=signals,
                lr=1e-3,
                num_samples=BATCH,
                num_tokens=32,
                step_seconds=0.1,
                data_seconds=0.0,
                finished_unix_seconds=0.0,
                verdict=verdict,
            )
        )
    return log


def state_at(step: int) -> TrainState:
    return TrainState(step=step, cursor=BATCH * step, clock=step)


@dataclass
class Setup:
    """What a capsule is made of, all fakes but the capsule."""

    folder: Path
    losses: list[list[float]] = field(default_factory=list)
    engine: Any = None
    source: Any = field(default_factory=Source)
    ledger: SkipLedger = field(default_factory=SkipLedger)
    returns: Returns = field(default_factory=Returns)
    world: World = WORLD
    log: FlightLog = field(default_factory=lambda: log_until(4))

    def make(self) -> Capsules:
        stream = SampleStream(
            self.source,
            self.ledger,
            rank=0,
            num_ranks=self.world.size,
            returns=self.returns,
        )
        return Capsules(
            self.folder / "incidents",
            engine=self.engine or LossyEngine(self.losses),
            stream=stream,
            corpora=[
                Corpus(
                    address=str(self.folder),
                    digest="d",
                    dtype="uint16",
                    vocab_size=257,
                    tokenizer_path=path
                    if (path := self.folder / "tokenizer.json").exists()
                    else None,
                    tokenizer_fingerprint="of bytes",
                    separator_id=256,
                    train=Split(shards=()),
                    validation=None,
                    files=(),
                )
            ],
            world=self.world,
            log=self.log,
        )

    def capture(self, record: Incident | None = None) -> dict[str, Any]:
        record = record or intent()
        capsules = self.make()
        capsules.capture(record, state_at(5))
        capsules.close()
        return read(capsule_path(self.folder / "incidents", record.incident, record.attempt))


def read(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


# Steps 2 to 5; the last one was in flight. Its sample 2 is the worst.
LOSSES = [[3.0] * 4, [3.0, 3.0, 8.0, 3.0], [4.0] * 4, [3.0, 3.0, 9.0, 3.0]]


def test_capsule_names_the_worst_samples_with_source_text_and_loss(tmp_path: Path) -> None:
    capsule = Setup(tmp_path, losses=LOSSES).capture()
    worst, second = capsule["suspects"][:2]
    assert (worst["step"], worst["order_index"], worst["loss_nats"]) == (5, 18, 9.0)
    assert (second["step"], second["order_index"], second["excess_nats"]) == (3, 10, 5.0)
    assert worst["position"] == 18 and worst["rank"] == 0 and worst["host"]
    assert worst["origins"][0]["file"] == "/text/18.txt" and worst["origins"][0]["line"] == 18
    assert worst["text"] == chr(18) * 9
    assert capsule["has_texts"] and capsule["left_out"] == []


def test_capsule_has_the_decision_the_reports_and_the_environment(tmp_path: Path) -> None:
    capsule = Setup(tmp_path, losses=LOSSES).capture()
    assert capsule["incident"]["skip"] == [4, 20] and "phase" not in capsule["incident"]
    assert capsule["state"]["step"] == 5
    assert [report["step"] for report in capsule["reports"]] == [1, 2, 3, 4]
    assert capsule["reports"][0]["group_norms"] == [1.0, 2.0]
    assert capsule["group_names"] == ["embedding", "head"]
    assert capsule["environment"]["versions"]["torch"] == str(torch.__version__)
    assert list(capsule["environment"]["hosts"].values()) == ["0"]


def test_indices_follow_the_ledger_and_the_returns(tmp_path: Path) -> None:
    ledger, returns = SkipLedger(), Returns()
    ledger.add(BatchRange(start=4, stop=6))
    returns.insert(16, 4, 6)  # the batch of the step in flight begins with what was skipped
    capsule = Setup(
        tmp_path, losses=[[9.0, 8.0, 7.0, 6.0]], ledger=ledger, returns=returns
    ).capture()
    found = [(s["position"], s["order_index"]) for s in capsule["suspects"]]
    assert found == [(16, 4), (17, 5), (18, 16), (19, 17)]


def test_each_rank_sends_its_block_and_is_named(tmp_path: Path) -> None:
    other = {
        "host": "node-2",
        "device": "cpu",
        "losses": [np.array(step) for step in ([3.0, 3.0], [3.0, 12.0])],
    }
    world = TwoRanks(rank=0, size=2, device=torch.device("cpu"), other=other)
    setup = Setup(tmp_path, losses=[[3.0, 3.0], [3.0, 3.0]], world=world)
    setup.log = log_until(4, bad_rank=1)
    capsule = setup.capture()
    worst = capsule["suspects"][0]
    assert (worst["rank"], worst["host"], worst["order_index"]) == (1, "node-2", 19)
    ranks = capsule["ranks"]
    assert (ranks["bad_rank"], ranks["bad_rank_host"], ranks["bad_rank_step"]) == (1, "node-2", 3)
    assert ranks["odd"]["ranks"] == [1] and ranks["odd"]["hosts"] == ["node-2"]
    assert ranks["losses"][-1]["by_rank"] == [3.0, 7.5]
    assert capsule["environment"]["hosts"]["node-2"] == "1"


def test_losses_that_are_no_numbers_read_as_null(tmp_path: Path) -> None:
    capsule = Setup(tmp_path, losses=[[3.0, math.nan, math.inf, 3.0]]).capture()
    assert [s["loss_nats"] for s in capsule["suspects"][:2]] == [None, None]


def test_nothing_known_still_makes_a_capsule(tmp_path: Path) -> None:
    capsule = Setup(tmp_path, log=FlightLog()).capture()
    assert capsule["suspects"] == [] and capsule["reports"] == []
    assert capsule["incident"]["incident"] == 3


def test_damaged_index_of_documents_costs_the_origins_alone(tmp_path: Path) -> None:
    capsule = Setup(tmp_path, losses=LOSSES, source=LostSource()).capture()
    assert capsule["suspects"][0]["problem"] == "the index is damaged"
    assert capsule["suspects"][0]["text"]


def test_rank_that_cannot_say_what_it_saw_does_not_keep_the_others_waiting(tmp_path: Path) -> None:
    capsule = Setup(tmp_path, engine=BrokenEngine([])).capture()
    assert capsule["ranks"]["problems"] == {"0": "RuntimeError: device lost"}
    assert capsule["suspects"] == []


def test_full_disk_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, content: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(capsule_module, "write_atomically", full)
    capsules = Setup(tmp_path, losses=LOSSES).make()
    with caplog.at_level(logging.WARNING):
        capsules.capture(intent(), state_at(5))
    capsules.close()
    assert "No space left on device" in caplog.text
    assert not capsule_path(tmp_path / "incidents", 3, 1).exists()


def test_folder_that_cannot_be_made_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "incidents").write_text("a file where a folder should be")
    capsules = Setup(tmp_path, losses=LOSSES).make()
    with caplog.at_level(logging.WARNING):
        capsules.capture(intent(), state_at(5))
    capsules.close()
    assert "capsule of incident 3" in caplog.text


def test_error_of_our_own_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> str:
        raise ZeroDivisionError

    monkeypatch.setattr(capsule_module, "worst_samples", broken)
    capsules = Setup(tmp_path, losses=LOSSES).make()
    with caplog.at_level(logging.WARNING):
        capsules.capture(intent(), state_at(5))
    assert "ZeroDivisionError" in caplog.text


def test_kill_before_the_texts_leaves_a_whole_capsule_without_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Capsules, "_complete", lambda *_: None)  # it never came to that
    capsule = Setup(tmp_path, losses=LOSSES).capture()
    assert not capsule["has_texts"]
    assert capsule["suspects"] and "text" not in capsule["suspects"][0]


def test_texts_that_cannot_be_had_leave_the_capsule_as_it_was(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        capsule = Setup(tmp_path, losses=LOSSES).capture()
    assert "without the texts" in caplog.text
    assert not capsule["has_texts"] and capsule["suspects"]


def test_same_attempt_captured_again_after_a_crash_replaces_its_capsule(tmp_path: Path) -> None:
    Setup(tmp_path, losses=LOSSES).capture()
    capsule = Setup(tmp_path, losses=LOSSES).capture(intent(reason="again"))
    assert capsule["incident"]["reason"] == "again"
    assert [p.name for p in (tmp_path / "incidents").iterdir()] == ["0003-1"]


def test_environment_variables_never_get_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("API_TOKEN", "hunter2-hunter2")
    Setup(tmp_path, losses=LOSSES).capture()
    assert "hunter2" not in capsule_path(tmp_path / "incidents", 3, 1).read_text()


def test_capsules_of_the_last_incidents_are_kept(tmp_path: Path) -> None:
    for incident in range(1, 8):
        for attempt in (1, 2):
            capsule_path(tmp_path, incident, attempt).parent.mkdir(parents=True)
    (tmp_path / "notes").mkdir()
    remove_old(tmp_path, num_kept=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("0006-1", "0006-2", "0007-1", "0007-2"),
        "notes",
    ]


def huge() -> dict[str, Any]:
    origin = {"file": "/" + "x" * 4000, "line": 1, "document": 1, "num_tokens": 1}
    return {
        "format": 1,
        "incident": {"reason": "r" * 100_000, "quarantine": ["q" * 40] * 10_000},
        "suspects": [
            {"order_index": n, "origins": [dict(origin)] * 16, "text": "\U0001f600" * 600}
            for n in range(16)
        ],
        "ranks": {"losses": [{"step": n, "by_rank": [1.0] * 4096} for n in range(32)]},
        "group_names": [f"blocks.{n}" for n in range(2000)],
        "reports": [{"step": n, "group_norms": [1.23456] * 2000} for n in range(64)],
        "environment": {
            "hosts": {f"node-{n:05d}.cluster.example": str(n) for n in range(20_000)},
            "devices": {"GPU": "0-19999"},
        },
        "has_texts": True,
    }


@pytest.mark.parametrize("max_bytes", [MAX_BYTES, 200_000, 120_000])
def test_capsule_is_bounded_whatever_is_put_in(max_bytes: int) -> None:
    text = as_text(huge(), max_bytes)
    assert len(text.encode()) <= max_bytes
    capsule = json.loads(text)
    assert capsule["left_out"], "it says what had to go"
    assert [suspect["order_index"] for suspect in capsule["suspects"]] == list(range(16))
    assert capsule["reports"][-1]["step"] == 63


def test_bounding_leaves_what_it_was_given_as_it_was() -> None:
    capsule = huge()
    as_text(capsule)
    assert capsule == huge()


def test_each_suspect_and_each_report_is_one_line(tmp_path: Path) -> None:
    Setup(tmp_path, losses=LOSSES).capture()
    lines = capsule_path(tmp_path / "incidents", 3, 1).read_text().splitlines()
    assert sum('"order_index"' in line for line in lines) == 16
    assert sum('"grad_norm"' in line for line in lines) == 4


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["a"], {"a": "0"}),
        (["a", "a", "b", "a", "b"], {"a": "0-1,3", "b": "2,4"}),
        (["a"] * 4, {"a": "0-3"}),
    ],
)
def test_ranks_are_written_as_ranges(values: list[str], expected: Mapping[str, str]) -> None:
    assert ranks_by_value(values) == expected


def test_git_revision_is_read_without_git(tmp_path: Path) -> None:
    assert git_revision(tmp_path) is None
    git = tmp_path / ".git"
    (git / "refs/heads").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    (git / "packed-refs").write_text("# pack-refs\nabc refs/heads/main\n")
    assert git_revision(tmp_path) == "abc"
    (git / "refs/heads/main").write_text("def\n")
    assert git_revision(tmp_path) == "def"
    second = tmp_path / "second"
    (git / "worktrees/second").mkdir(parents=True)
    (git / "worktrees/second/HEAD").write_text("ref: refs/heads/main\n")
    (git / "worktrees/second/commondir").write_text("../..\n")
    second.mkdir()
    (second / ".git").write_text(f"gitdir: {git}/worktrees/second\n")
    assert git_revision(second) == "def"
    (git / "HEAD").write_text("0123\n")
    assert git_revision(tmp_path) == "0123"
