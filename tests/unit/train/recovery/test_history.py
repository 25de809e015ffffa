"""What is read off the journal: budgets, skips, returns, cooled rates, what is kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from train.recovery.history import Cooling, RecoveryHistory
from train.recovery.journal import Incident, Journal, Phase
from train.recovery.policy import LADDER_RUNGS, Past, Rung
from train.state import BatchRange

DONE = Incident(
    incident=1,
    phase=Phase.DONE,
    time="2026-01-01T00:00:00.000+00:00",
    rule="ladder",
    rung=Rung.SKIP,
    reason="spike",
    verdict="spike",
    onset_step=50,
    detected_step=52,
    clock=53,
    target_checkpoint="step-00000040-clock-00000040",
    target_step=40,
    skip=(640, 900),
    quarantine=(),
)
INTENT = replace(DONE, phase=Phase.INTENT)
OBSERVED = replace(DONE, phase=Phase.OBSERVED, incident=2, clock=99, skip=(0, 0))
SINGLE = replace(DONE, target_checkpoint="", target_step=52, skip=(900, 900))
VETO = replace(SINGLE, rung=Rung.VETO, incident=0, skip=(0, 0))
OPERATORS = replace(DONE, rung=Rung.REWIND, rule="operator", incident=3, request="r-1", clock=80)
SKIP_AHEAD = replace(SINGLE, rung=Rung.SKIP_AHEAD, incident=4, request="r-2", skip=(2000, 3000))
UNSKIP = replace(SINGLE, rung=Rung.UNSKIP, incident=5, request="r-3", returned=(9000, 640, 900))
STOP = replace(SINGLE, rung=Rung.STOP, incident=5, code="ladder_exhausted")
ALL = [VETO, INTENT, DONE, OBSERVED, OPERATORS, SKIP_AHEAD, UNSKIP, STOP]


def cooled(scale: float, start: int, until: int, end: int) -> Incident:
    return replace(
        DONE,
        rung=Rung.COOL,
        lr_scale=scale,
        lr_from_step=start,
        lr_until_step=until,
        lr_return_step=end,
    )


# Budgets and numbers.


def test_empty_history_knows_nothing() -> None:
    history = RecoveryHistory()
    assert history.records == ()
    assert (history.num_rewinds, history.num_vetoes, history.policy_rewinds()) == (0, 0, 0)
    assert (history.last_incident, history.clock, history.lr_factor_at(5)) == (0, 0, 1.0)
    assert (history.past(), history.skips(), history.returns()) == ([], [], [])
    assert history.kept_checkpoints(3) == frozenset()


def test_rewinds_are_those_that_were_finished() -> None:
    history = RecoveryHistory(ALL)
    assert history.num_rewinds == 2
    assert RecoveryHistory([INTENT, OBSERVED, VETO]).num_rewinds == 0


def test_rewinds_of_a_person_do_not_count_against_the_budget() -> None:
    assert RecoveryHistory(ALL).policy_rewinds() == 1
    for rung in LADDER_RUNGS:
        assert RecoveryHistory([replace(DONE, rung=rung)]).policy_rewinds() == 1


def test_refused_updates_are_counted_and_known_by_clock_and_step() -> None:
    history = RecoveryHistory([VETO, replace(VETO, clock=54, detected_step=53), DONE])
    assert history.num_vetoes == 2
    assert history.is_veto_known(53, step=52)
    assert history.is_veto_known(54, step=53)
    assert not history.is_veto_known(54, step=52)
    assert not history.is_veto_known(55, step=54)
    assert not RecoveryHistory([DONE]).is_veto_known(53, step=52)


def test_last_incident_is_the_highest_number_even_of_what_is_not_finished() -> None:
    assert RecoveryHistory(ALL).last_incident == 5
    assert RecoveryHistory([DONE, OBSERVED]).last_incident == 2
    assert RecoveryHistory([VETO, INTENT]).last_incident == 1
    assert RecoveryHistory([VETO]).last_incident == 0


def test_clock_is_where_the_last_rewind_began() -> None:
    assert RecoveryHistory(ALL).clock == 80
    assert RecoveryHistory([DONE, SKIP_AHEAD, replace(VETO, clock=500)]).clock == 53
    assert RecoveryHistory([INTENT, OBSERVED]).clock == 0


def test_request_is_known_once_it_is_done() -> None:
    history = RecoveryHistory(ALL)
    assert all(history.is_request_known(name) for name in ("r-1", "r-2", "r-3"))
    assert not history.is_request_known("r-4")
    assert not RecoveryHistory([replace(OPERATORS, phase=Phase.INTENT)]).is_request_known("r-1")


def test_policy_sees_attempts_and_what_was_observed_but_no_intent_and_no_refusal() -> None:
    past = RecoveryHistory(ALL).past()
    assert past[0] == Past(
        incident=1, rung=Rung.SKIP, onset_step=50, detected_step=52, target_step=40
    )
    assert [(entry.rung, entry.is_observed) for entry in past] == [
        (Rung.SKIP, False),
        (Rung.SKIP, True),
        (Rung.REWIND, False),
        (Rung.SKIP_AHEAD, False),
        (Rung.UNSKIP, False),
        (Rung.STOP, False),
    ]


# Data.


def test_skips_include_those_of_an_unfinished_rewind_and_not_what_was_observed() -> None:
    history = RecoveryHistory([INTENT, replace(OBSERVED, skip=(1, 2)), SKIP_AHEAD])
    assert history.skips() == [BatchRange(start=640, stop=900), BatchRange(start=2000, stop=3000)]


def test_returns_are_those_that_were_done_in_order() -> None:
    second = replace(UNSKIP, returned=(9500, 2000, 2100))
    assert RecoveryHistory([*ALL, second]).returns() == [(9000, 640, 900), (9500, 2000, 2100)]


def test_kept_checkpoints_are_those_of_the_last_incidents() -> None:
    records = [
        replace(DONE, incident=1, kept=("a", "b")),
        replace(DONE, incident=2, kept=("b", "c")),
        replace(DONE, incident=2, attempt=2, kept=("d",)),
        replace(VETO, incident=9),
        replace(INTENT, incident=3, kept=("e",)),
    ]
    history = RecoveryHistory(records)
    assert history.kept_checkpoints(0) == frozenset()
    assert history.kept_checkpoints(1) == {"e"}
    assert history.kept_checkpoints(2) == {"b", "c", "d", "e"}
    assert history.kept_checkpoints(9) == {"a", "b", "c", "d", "e"}


# Cooled learning rates.


@pytest.mark.parametrize(
    ("step", "factor"),
    [
        (0, 1.0),
        (39, 1.0),
        (40, 0.5),
        (99, 0.5),
        (100, 0.5),
        (125, 0.625),
        (150, 0.75),
        (199, 0.995),
        (200, 1.0),
        (10**6, 1.0),
    ],
)
def test_rate_is_held_and_comes_back_linearly(step: int, factor: float) -> None:
    cooling = Cooling(scale=0.5, from_step=40, until_step=100, return_step=200)
    assert cooling.factor_at(step) == pytest.approx(factor)
    assert RecoveryHistory([cooled(0.5, 40, 100, 200)]).lr_factor_at(step) == pytest.approx(factor)


def test_rate_that_comes_back_at_once_does_not_divide_by_zero() -> None:
    cooling = Cooling(scale=0.5, from_step=40, until_step=100, return_step=100)
    assert [cooling.factor_at(step) for step in (99, 100)] == [0.5, 1.0]


def test_of_several_coolings_the_lowest_holds() -> None:
    history = RecoveryHistory([cooled(0.5, 0, 100, 200), cooled(0.25, 50, 60, 100)])
    factors = [history.lr_factor_at(step) for step in (0, 49, 50, 60, 80, 100, 150)]
    assert factors == pytest.approx([0.5, 0.5, 0.25, 0.25, 0.5, 0.5, 0.75])


def test_only_what_was_done_cools() -> None:
    cooling = cooled(0.5, 0, 100, 200)
    assert RecoveryHistory([replace(cooling, phase=Phase.INTENT)]).lr_factor_at(50) == 1.0
    assert RecoveryHistory([replace(cooling, phase=Phase.OBSERVED)]).lr_factor_at(50) == 1.0
    assert RecoveryHistory([DONE]).coolings == []


def test_level_is_let_in_where_the_run_went_back_to() -> None:
    accepted = replace(DONE, rung=Rung.ACCEPT, lr_from_step=40)
    assert RecoveryHistory([*ALL, accepted]).accepted_steps == {40}
    assert RecoveryHistory([replace(accepted, phase=Phase.OBSERVED)]).accepted_steps == set()
    assert RecoveryHistory([replace(accepted, phase=Phase.INTENT)]).accepted_steps == set()
    assert RecoveryHistory([accepted]).policy_rewinds() == 1


# Growing and surviving.


def test_adding_one_by_one_is_taking_up_the_whole_journal() -> None:
    records = [*ALL, cooled(0.5, 40, 100, 200)]
    grown = RecoveryHistory()
    for record in records:
        grown.add(record)
    whole = RecoveryHistory(records)
    assert grown.records == whole.records
    assert grown.coolings == whole.coolings
    assert grown.past() == whole.past()


def test_everything_survives_the_journal(tmp_path: Path) -> None:
    records = [*ALL, replace(cooled(0.3, 40, 100, 200), kept=("a",))]
    journal = Journal(tmp_path / "journal.jsonl")
    for record in records:
        journal.append(record)
    before, after = RecoveryHistory(records), RecoveryHistory(journal.read())
    assert after.records == before.records
    assert after.past() == before.past()
    assert (after.num_rewinds, after.policy_rewinds(), after.num_vetoes) == (3, 2, 1)
    assert [after.lr_factor_at(s) for s in range(0, 220, 7)] == [
        before.lr_factor_at(s) for s in range(0, 220, 7)
    ]
