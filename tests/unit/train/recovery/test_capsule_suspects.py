"""Which samples and ranks are named, and that each loss is paired with its own step."""

from __future__ import annotations

import math

import numpy as np
import pytest

from train.callbacks.flight_recorder import FlightRecorder
from train.events import RunStart
from train.recovery.flight_log import NUM_STEPS_KEPT, FlightLog
from train.recovery.suspects import (
    NUM_SUSPECTS,
    Losses,
    SampledStep,
    last_steps,
    odd_ranks,
    pair,
    worst_samples,
)
from train.recovery.verdict import Verdict, VerdictKind
from train.signals import StepReport, StepSignals
from train.state import TrainState

BATCH = 4


def at(step: int, *, cursor: int | None = None, clock: int | None = None) -> TrainState:
    return TrainState(
        step=step,
        cursor=BATCH * step if cursor is None else cursor,
        clock=step if clock is None else clock,
    )


def report(state: TrainState, *, baseline: float | None = 3.0) -> StepReport:
    return StepReport(
        state=state,
        signals=StepSignals(loss_nats=3.0, grad_norm=1.0, is_vetoed=False, group_norms=(1.0, 2.0)),
        lr=1e-3,
        num_samples=BATCH,
        num_tokens=BATCH * 8,
        step_seconds=0.1,
        data_seconds=0.0,
        finished_unix_seconds=0.0,
        verdict=Verdict(
            kind=VerdictKind.OK, step=state.step, onset_step=state.step, baseline_nats=baseline
        ),
    )


def log_of(*states: TrainState) -> FlightLog:
    log = FlightLog()
    for state in states:
        log.add(report(state))
    return log


def batch(*losses: float) -> Losses:
    return np.array(losses)


def sampled(
    step: int, *losses: float, num_ranks: int = 1, baseline: float | None = 3.0
) -> SampledStep:
    return SampledStep(
        step=step,
        clock=step,
        cursor_before=BATCH * (step - 1),
        baseline_nats=baseline,
        is_reported=True,
        losses=batch(*losses),
        num_ranks=num_ranks,
    )


def test_recorder_keeps_the_last_steps_and_where_each_began() -> None:
    recorder = FlightRecorder()
    start = at(10, cursor=500)
    recorder.on_run_start(
        RunStart(name="r", state=start, last_step=99, num_parameters=1, is_resumed=True)
    )
    for step in range(11, 11 + NUM_STEPS_KEPT + 5):
        recorder.after_update(report(at(step, cursor=500 + BATCH * (step - 10))))
    steps = recorder.log.steps
    assert len(steps) == NUM_STEPS_KEPT
    assert steps[-1].as_record()["step"] == 10 + NUM_STEPS_KEPT + 5
    assert all(
        record["cursor"] == record["cursor_before"] + BATCH  # type: ignore[operator]
        for record in (step.as_record() for step in steps)
    )
    assert recorder.state_dict() == {}


def test_rewind_leaves_the_record_and_moves_where_the_next_step_begins() -> None:
    recorder = FlightRecorder()
    recorder.after_update(report(at(1)))
    back = at(0, cursor=100, clock=2)
    recorder.on_rewind(None, back, 0.0)  # type: ignore[arg-type]  # it does not look at it
    recorder.after_update(report(at(1, cursor=104, clock=3)))
    cursors = [(s.before.cursor, s.report.state.cursor) for s in recorder.log.steps]
    assert cursors == [(0, 4), (100, 104)]


def test_each_loss_is_paired_with_its_step_and_the_one_in_flight_comes_last() -> None:
    log = log_of(at(1), at(2), at(3))
    losses = [batch(2, 2), batch(3, 3), batch(4, 4)]  # of steps 2, 3 and of 4, not yet reported
    steps = pair([losses, losses], log, at(4))
    assert [(s.step, s.cursor_before, s.is_reported) for s in steps] == [
        (2, 4, True),
        (3, 8, True),
        (4, 12, False),
    ]
    assert [s.losses.tolist() for s in steps] == [[2] * 4, [3] * 4, [4] * 4]
    assert steps[-1].baseline_nats == 3.0, "the last known one holds for the step in flight"


def test_pairing_needs_no_step_in_flight() -> None:
    steps = pair([[batch(1, 1), batch(2, 2)]], log_of(at(1), at(2)), at(2))
    assert [(s.step, s.is_reported) for s in steps] == [(1, True), (2, True)]


def test_steps_after_a_rewind_are_told_from_those_before_it_by_the_clock() -> None:
    log = log_of(at(1), at(2), at(3))
    log.state = at(1, cursor=100, clock=4)  # one step was in flight when the rewind came
    log.add(report(at(2, cursor=104, clock=5)))
    (first, second) = pair([[batch(1), batch(2)]], log, at(3, cursor=108, clock=6))
    assert (first.step, first.cursor_before) == (2, 100)
    assert (second.step, second.cursor_before, second.is_reported) == (3, 104, False)


def test_losses_of_steps_that_no_one_logged_are_left_out() -> None:
    assert pair([[batch(1), batch(2)]], FlightLog(), at(9)) == []
    assert pair([], log_of(at(1)), at(1)) == []
    assert pair([[], []], log_of(at(1)), at(1)) == []


def test_ranks_whose_blocks_differ_in_size_are_left_out() -> None:
    assert pair([[batch(1, 1)], [batch(1)]], log_of(at(1)), at(1)) == []


@pytest.mark.parametrize(
    ("num_known", "onset", "expected"), [(32, 20, 6), (32, 1, 25), (3, 20, 3), (0, 20, 0)]
)
def test_only_the_steps_from_shortly_before_the_onset_are_asked_for(
    num_known: int, onset: int, expected: int
) -> None:
    assert last_steps([[1.0]] * num_known, at(23), onset) == expected


def test_worst_samples_are_named_with_their_place_and_rank() -> None:
    steps = [sampled(5, 3, 3, 3, 3, num_ranks=2), sampled(6, 3, 9, 3, 7, num_ranks=2)]
    worst = worst_samples(steps, onset_step=6)[:2]
    assert [(s.step, s.place, s.rank, s.loss_nats) for s in worst] == [
        (6, 1, 0, 9.0),
        (6, 3, 1, 7.0),
    ]
    assert worst[0].excess_nats == 6.0


def test_a_batch_that_is_bad_as_a_whole_does_not_hide_behind_its_own_median() -> None:
    worst = worst_samples([sampled(6, 8, 8, 8, 8), sampled(5, 3, 3, 4, 3)], onset_step=6)
    assert [s.step for s in worst[:4]] == [6] * 4
    assert worst[0].excess_nats == 5.0


def test_half_of_the_places_are_for_the_steps_up_to_the_onset() -> None:
    early = [sampled(6, *([5.0] * 20))]
    late = [sampled(7, *([50.0] * 20)), sampled(8, *([60.0] * 20))]
    worst = worst_samples([*early, *late], onset_step=6)
    assert len(worst) == NUM_SUSPECTS
    assert sum(s.step == 6 for s in worst) == NUM_SUSPECTS // 2
    assert worst[0].loss_nats == 60.0
    assert sum(s.step == 6 for s in worst_samples(early, onset_step=6)) == NUM_SUSPECTS
    assert sum(s.step > 6 for s in worst_samples(late, onset_step=6)) == NUM_SUSPECTS


def test_a_loss_that_is_not_finite_is_the_worst() -> None:
    worst = worst_samples([sampled(6, 3, math.nan, 99, 3)], onset_step=6)
    assert math.isnan(worst[0].loss_nats) and math.isinf(worst[0].excess_nats)
    assert worst[1].loss_nats == 99
    everything = worst_samples([sampled(6, *[math.nan] * 4, baseline=None)], onset_step=6)
    assert [s.place for s in everything] == [0, 1, 2, 3]


def test_rank_whose_loss_alone_is_not_finite_is_odd_even_before_the_onset() -> None:
    odd = odd_ranks([sampled(5, 3, 3, 3, math.inf, num_ranks=2)], onset_step=6)
    assert odd is not None
    assert (odd.step, odd.ranks) == (5, (1,))


def test_rank_that_alone_is_high_is_odd() -> None:
    steps = [sampled(5, 3, 3, 3, 3.4, num_ranks=2), sampled(6, 3.1, 3.1, 9, 9, num_ranks=2)]
    odd = odd_ranks(steps, onset_step=6)
    assert odd is not None
    assert (odd.step, odd.ranks) == (6, (1,))
    assert "9.000" in odd.reason and "3.100" in odd.reason


@pytest.mark.parametrize(
    "losses", [(8, 8, 9, 9), (math.nan, 3, math.nan, 3), (3, 3, 3, 3), (2, 2, 2.5, 2.5)]
)
def test_no_rank_is_odd_if_all_suffer_alike_or_none_does(losses: tuple[float, ...]) -> None:
    assert odd_ranks([sampled(6, *losses, num_ranks=2)], onset_step=6) is None


def test_a_lone_rank_is_never_odd() -> None:
    assert odd_ranks([sampled(6, 3, 3, 9, 9)], onset_step=6) is None
