"""The operator's hand on a run that lives, and on one that does not: each wish is done once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness import (
    BAD_DATA,
    TINY,
    Fault,
    answer,
    ask,
    assert_same_tensors,
    assert_trained_once,
    checkpoints,
    journal,
    lineage,
    losses_by_step,
    metrics,
    run,
    rungs,
    start,
    summary,
    wait_for_step,
)

SLOW_SECONDS = 0.03
# In the order in which the restarts meet them.
PLACES = (
    "request_taken",
    "before_request_record",
    "torn_request_record",
    "after_request_record",
    "before_answer",
    "in_answer",
    "after_answer",
)


def requested(folder: Path, name: str) -> dict[str, Any]:
    """Return the one record that fulfils a request."""
    done = [r for r in journal(folder) if r["request"] == name and r["phase"] == "done"]
    assert len(done) == 1, "once and not again"
    return done[0]


def run_and_ask(
    folder: Path,
    wishes: dict[str, tuple[int, dict[str, object]]],
    *,
    arguments: tuple[str, ...] = TINY,
    num_ranks: int = 1,
) -> None:
    """Run slowly to the end, and ask for each wish when the run has come to its step."""
    samples = folder.parent / "samples"
    fault = Fault(samples=samples, seconds_a_batch=SLOW_SECONDS)
    launch = start(arguments, folder, num_ranks=num_ranks, fault=fault)
    for name, (step, fields) in wishes.items():
        wait_for_step(launch, folder, step, attempt=0)
        ask(folder, name, **fields)
    assert launch.wait() == (0,) * num_ranks, launch.output()
    for rank in range(num_ranks):
        assert_trained_once(folder, samples, rank)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_rewind_of_a_live_run_goes_back_once_and_changes_nothing_that_is_learnt(
    num_ranks: int, tmp_path: Path, clean_single: Any, clean_ddp: Any
) -> None:
    folder, clean = tmp_path / "run", clean_single if num_ranks == 1 else clean_ddp
    run_and_ask(folder, {"r": (18, {"kind": "rewind", "to_step": 12})}, num_ranks=num_ranks)
    record = requested(folder, "r")
    assert (record["rung"], record["rule"], record["target_step"]) == ("rewind", "operator", 10)
    said = answer(folder, "r")
    assert said is not None and said["is_accepted"] is True
    assert "incident 1: rewind to step 12 asked for by a test" in said["message"]
    assert rungs(folder) == ["rewind"]
    assert losses_by_step(folder) == losses_by_step(clean.folder)
    assert_same_tensors(checkpoints(folder)[-1], checkpoints(clean.folder)[-1])


@pytest.mark.parametrize("amount", ["seen", pytest.param("3 batches", marks=pytest.mark.slow)])
def test_rewind_with_a_skip_never_trains_on_it_again(
    amount: str, tmp_path: Path, oracle: Any
) -> None:
    folder = tmp_path / "run"
    run_and_ask(folder, {"r": (18, {"kind": "rewind", "to_step": 15, "amount": amount})})
    record = requested(folder, "r")
    first, stop = record["skip"]
    assert first == 104, "the cursor of step 15"
    assert stop >= 128 if amount == "seen" else stop == 128
    never_met = oracle(TINY, ((first, stop),))
    assert losses_by_step(folder) == losses_by_step(never_met.folder)
    assert_same_tensors(checkpoints(folder)[-1], checkpoints(never_met.folder)[-1])


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_skip_on_a_live_run_leaves_out_what_comes_next(
    num_ranks: int, tmp_path: Path, oracle: Any
) -> None:
    folder = tmp_path / "run"
    wishes = {"s": (12, {"kind": "skip", "amount": "5 batches"})}
    run_and_ask(folder, wishes, num_ranks=num_ranks)
    record = requested(folder, "s")
    first, stop = record["skip"]
    assert stop - first == 5 * 8
    assert rungs(folder) == ["skip_ahead"]
    assert summary(folder)["skipped_samples"] == 40
    assert summary(folder)["rewinds"] == 0
    assert [r["step"] for r in metrics(folder)] == list(range(1, 41)), "without going back"
    never_met = oracle(TINY, ((first, stop),), num_ranks=num_ranks)
    assert_same_tensors(checkpoints(folder)[-1], checkpoints(never_met.folder)[-1])


@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_what_is_put_back_is_trained_on_once_as_the_last_data_of_the_run(
    num_ranks: int, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    wishes: dict[str, tuple[int, dict[str, object]]] = {
        "1-skip": (8, {"kind": "skip", "amount": "3 batches"}),
        "2-unskip": (14, {"kind": "unskip", "incident": 1}),
    }
    run_and_ask(folder, wishes, num_ranks=num_ranks)
    skipped = list(range(*requested(folder, "1-skip")["skip"]))
    assert requested(folder, "2-unskip")["returned"][1:] == [skipped[0], skipped[-1] + 1]
    for rank in range(num_ranks):
        trained = lineage(tmp_path / "samples", rank)
        assert trained[-len(skipped) :] == skipped
        assert sorted(trained) == list(range(len(trained))), "all of it once, and nothing else"
    assert summary(folder)["skipped_samples"] == 0


def test_two_ranges_of_two_incidents_are_both_put_back(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run_and_ask(
        folder,
        {
            "1-skip": (6, {"kind": "skip", "amount": "3 batches"}),
            "2-skip": (10, {"kind": "skip", "amount": "2 batches"}),
            "3-unskip": (14, {"kind": "unskip", "incident": 1}),
            "4-unskip": (18, {"kind": "unskip", "incident": 2}),
        },
    )
    trained = lineage(tmp_path / "samples")
    one, two = (list(range(*requested(folder, name)["skip"])) for name in ("1-skip", "2-skip"))
    assert trained[-40:] == two + one
    assert sorted(trained) == list(range(len(trained)))
    again = answer(folder, "4-unskip")
    assert again is not None and again["is_accepted"]


def test_bad_samples_that_were_put_back_are_found_and_skipped_again(tmp_path: Path) -> None:
    """What is put back is watched like any other data."""
    folder = tmp_path / "run"
    run_and_ask(
        folder,
        {"u": (24, {"kind": "unskip", "incident": 1})},
        arguments=(*TINY, *BAD_DATA, "run.steps=60", "recovery.cooldown_steps=10"),
    )
    position, *skipped = requested(folder, "u")["returned"]
    assert skipped == [104, 184]
    assert rungs(folder) == ["skip", "unskip", "skip"]
    first, stop = journal(folder)[-1]["skip"]
    # Samples 144 to 175 are the bad ones, and stand 40 behind the first that was put back.
    assert first <= position + 40 < position + 72 <= stop


def test_wishes_of_one_moment_are_done_in_their_order_each_once(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run_and_ask(
        folder,
        {
            "1": (18, {"kind": "skip", "amount": "2 batches"}),
            "2": (18, {"kind": "rewind", "to_step": 10}),
            "3": (18, {"kind": "skip", "amount": "1 batches"}),
        },
    )
    assert rungs(folder) == ["skip_ahead", "rewind", "skip_ahead"]
    assert [requested(folder, name)["incident"] for name in "123"] == [1, 2, 3]


def test_wishes_that_cannot_be_are_answered_and_nothing_is_done(
    tmp_path: Path, clean_single: Any
) -> None:
    folder, samples = tmp_path / "run", tmp_path / "samples"
    run(TINY, folder, fault=Fault(kill_at="in_save_of_step_20", samples=samples)).expect(-9)
    wishes: dict[str, tuple[dict[str, object], str]] = {
        "1": ({"kind": "rewind", "to_step": 39}, "step 39 lies ahead: the run is at step"),
        "2": ({"kind": "unskip", "incident": 7}, "incident 7 skipped nothing"),
        "3": ({"kind": "skip", "amount": "lots"}, 'such as "1B tokens"'),
        "4": ({"kind": "stop"}, "unknown request 'stop'; use rewind, skip or unskip"),
    }
    for name, (fields, _) in wishes.items():
        ask(folder, name, **fields)
    run(TINY, folder, fault=Fault(samples=samples)).expect(0)
    for name, (_, expected) in wishes.items():
        said = answer(folder, name)
        assert said is not None and said["is_accepted"] is False
        assert expected in said["message"]
    assert journal(folder) == []
    assert_same_tensors(checkpoints(folder)[-1], checkpoints(clean_single.folder)[-1])


def test_stopped_run_does_at_its_next_start_what_it_was_asked_for(
    tmp_path: Path, clean_single: Any
) -> None:
    """A finished run too: it goes back, and ends where it was."""
    folder, samples = tmp_path / "run", tmp_path / "samples"
    run(TINY, folder, fault=Fault(samples=samples)).expect(0)
    ask(folder, "r", kind="rewind", to_step=30)
    result = run(TINY, folder, fault=Fault(samples=samples)).expect(0)
    assert "resumed at step 40" in result.output
    assert requested(folder, "r")["target_step"] == 30
    assert answer(folder, "r") is not None
    assert [r["step"] for r in metrics(folder)] == [*range(1, 41), *range(31, 41)]
    assert_same_tensors(checkpoints(folder)[-1], checkpoints(clean_single.folder)[-1])
    assert_trained_once(folder, samples)


def kill_and_finish(folder: Path, places: tuple[str, ...], *, num_ranks: int = 1) -> None:
    """Kill a new process at each of `places` in turn, then let one run to the end."""
    samples = folder.parent / "samples"
    for place in places:
        fault = Fault(samples=samples, kill_at=place)
        assert -9 in run(TINY, folder, num_ranks=num_ranks, fault=fault).exit_codes, place
    run(TINY, folder, num_ranks=num_ranks, fault=Fault(samples=samples)).expect(0)
    for rank in range(num_ranks):
        assert_trained_once(folder, samples, rank)


@pytest.mark.parametrize("kind", ["skip", "rewind", "unskip"])
def test_wish_is_done_once_whenever_the_run_is_killed(
    kind: str, tmp_path: Path, clean_single: Any
) -> None:
    folder, samples = tmp_path / "run", tmp_path / "samples"
    if kind == "unskip":
        ask(folder, "0", kind="skip", amount="3 batches")
    run(TINY, folder, fault=Fault(samples=samples, kill_at="in_save_of_step_20")).expect(-9)
    fields: dict[str, dict[str, object]] = {
        "skip": {"kind": "skip", "amount": "3 batches"},
        "rewind": {"kind": "rewind", "to_step": 12, "amount": "2 batches"},
        "unskip": {"kind": "unskip", "incident": 1},
    }
    ask(folder, "w", **fields[kind])
    kill_and_finish(folder, PLACES)
    record = requested(folder, "w")
    said = answer(folder, "w")
    assert said is not None and said["is_accepted"] is True
    others = [r for r in journal(folder) if r["request"] not in ("w", "0")]
    assert others == []
    if kind == "unskip":
        trained = lineage(samples)
        assert sorted(trained) == list(range(len(trained)))
        skipped = list(range(*record["returned"][1:]))
        assert trained[-len(skipped) :] == skipped
    else:
        assert record["skip"][1] > record["skip"][0]


@pytest.mark.parametrize(
    ("place", "kill_rank"),
    [
        ("request_taken", 1),
        ("after_request_record", 0),
        pytest.param("request_taken", 0, marks=pytest.mark.slow),
        pytest.param("before_answer", 0, marks=pytest.mark.slow),
    ],
)
def test_wish_on_two_ranks_is_done_once_whichever_rank_is_killed(
    place: str, kill_rank: int, tmp_path: Path
) -> None:
    """Asked for while the run lives."""
    folder, samples = tmp_path / "run", tmp_path / "samples"
    fault = Fault(samples=samples, seconds_a_batch=SLOW_SECONDS, kill_at=place, kill_rank=kill_rank)
    # The state that is asked for is to be whole when the rank dies.
    at_once = [*TINY, "checkpoint.is_async=false"]
    launch = start(at_once, folder, num_ranks=2, fault=fault)
    wait_for_step(launch, folder, 12, attempt=0)
    ask(folder, "w", kind="rewind", to_step=10, amount="2 batches")
    assert launch.wait()[kill_rank] == -9
    kill_and_finish(folder, (), num_ranks=2)
    assert requested(folder, "w")["target_step"] == 10
    assert answer(folder, "w") is not None
    assert rungs(folder) == ["rewind"]
