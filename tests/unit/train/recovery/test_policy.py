"""The policy as a pure function: verdict and history in, decision out."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest

from train.recovery.detector import ROLLBACK_KINDS, Verdict, VerdictKind
from train.recovery.policy import (
    LISTED_RUNGS,
    Bear,
    Budget,
    Decision,
    GiveUp,
    GoBack,
    History,
    Past,
    Rule,
    Rung,
    Target,
    decide,
    describe,
)

TARGETS = [
    Target(name=f"step-{step}", step=step, cursor=step * 16) for step in (0, 20, 40, 60, 80, 100)
]
SPIKE = Verdict(kind=VerdictKind.SPIKE, step=95, onset_step=93, deviation=14.0)
LADDER = (Rung.REPLAY, Rung.SKIP, Rung.SKIP_FURTHER, Rung.SKIP_FURTHER, Rung.COOL)
BUDGET = Budget(
    max_rewinds=20,
    max_vetoes=10,
    max_vetoes_in_a_row=3,
    steps_before_onset=10,
    cooldown_steps=50,
    ladder=LADDER,
    growth=2.0,
    cool_factor=0.5,
)


def verdict(kind: VerdictKind, *, onset: int = 93, step: int = 95) -> Verdict:
    return replace(SPIKE, kind=kind, step=step, onset_step=onset)


def attempt(rung: Rung, *, incident: int = 1, onset: int = 93, target: int = 80) -> Past:
    return Past(
        incident=incident,
        rung=rung,
        onset_step=onset,
        detected_step=onset + 2,
        target_step=target,
    )


def decision(
    rule: Rule = Rule.LADDER,
    found: Verdict = SPIKE,
    targets: Sequence[Target] = TARGETS,
    *,
    past: Sequence[Past] = (),
    num_rewinds: int = 0,
    num_vetoes: int = 0,
    is_vetoed: bool = False,
    **budget: object,
) -> Decision | None:
    history = History(
        past=past, num_rewinds=num_rewinds, num_vetoes=num_vetoes, is_vetoed=is_vetoed
    )
    return decide(rule, found, targets, history, replace(BUDGET, **budget))


def falcon(found: Verdict = SPIKE, targets: Sequence[Target] = TARGETS) -> Decision | None:
    return decision(Rule.FALCON, found, targets, steps_before_onset=0)


def gone_back(answer: Decision | None) -> GoBack:
    assert isinstance(answer, GoBack), answer
    return answer


def given_up(answer: Decision | None) -> GiveUp:
    assert isinstance(answer, GiveUp), answer
    return answer


def chosen(answer: Decision | None) -> int:
    return gone_back(answer).target.step


def climb(found: Verdict, targets: Sequence[Target] = TARGETS, **budget: object) -> list[Decision]:
    """Meet the same verdict again and again, and return all decisions, the last one a GiveUp."""
    past: list[Past] = []
    decisions: list[Decision] = []
    while True:
        answer = decision(found=found, targets=targets, past=past, **budget)
        assert answer is not None
        decisions.append(answer)
        if not isinstance(answer, GoBack):
            return decisions
        past.append(
            Past(
                incident=answer.incident,
                rung=answer.rung,
                onset_step=found.onset_step,
                detected_step=found.step,
                target_step=answer.target.step,
            )
        )


# What is left alone.


@pytest.mark.parametrize("rule", list(Rule))
@pytest.mark.parametrize("kind", sorted(set(VerdictKind) - ROLLBACK_KINDS))
def test_nothing_is_done_about_an_applied_step_that_needs_no_rollback(
    kind: VerdictKind, rule: Rule
) -> None:
    assert decision(rule, verdict(kind)) is None


@pytest.mark.parametrize("kind", list(VerdictKind))
@pytest.mark.parametrize("is_vetoed", [False, True])
def test_rule_none_never_acts(kind: VerdictKind, is_vetoed: bool) -> None:
    assert decision(Rule.NONE, verdict(kind), is_vetoed=is_vetoed) is None
    assert decision(Rule.NONE, verdict(kind), [], num_rewinds=99, is_vetoed=is_vetoed) is None


# Where a rewind goes.


@pytest.mark.parametrize("rule", [Rule.LADDER, Rule.FALCON])
def test_rewind_goes_to_the_latest_good_checkpoint_before_the_onset(rule: Rule) -> None:
    assert chosen(decision(rule, steps_before_onset=0)) == 80


@pytest.mark.parametrize("rule", [Rule.LADDER, Rule.FALCON])
def test_checkpoint_of_the_step_before_the_onset_is_early_enough(rule: Rule) -> None:
    found = verdict(VerdictKind.SPIKE, onset=81, step=82)
    assert chosen(decision(rule, found, steps_before_onset=0)) == 80


@pytest.mark.parametrize("rule", [Rule.LADDER, Rule.FALCON])
def test_checkpoint_of_the_onset_step_itself_is_not_trusted(rule: Rule) -> None:
    found = verdict(VerdictKind.SPIKE, onset=80, step=82)
    assert chosen(decision(rule, found, steps_before_onset=0)) == 60


@pytest.mark.parametrize("rule", [Rule.LADDER, Rule.FALCON])
def test_onset_decides_and_not_the_step_that_found_it(rule: Rule) -> None:
    found = verdict(VerdictKind.SPIKE, onset=79, step=105)
    assert chosen(decision(rule, found, steps_before_onset=0)) == 60


@pytest.mark.parametrize(
    ("steps_before_onset", "expected"), [(0, 80), (13, 80), (14, 60), (50, 40), (93, 0)]
)
def test_palm_goes_back_the_number_of_steps(steps_before_onset: int, expected: int) -> None:
    answer = decision(Rule.PALM, steps_before_onset=steps_before_onset)
    assert chosen(answer) == expected


@pytest.mark.parametrize("rule", [Rule.FALCON, Rule.PALM])
def test_published_rules_do_the_same_each_time(rule: Rule) -> None:
    once = gone_back(decision(rule))
    past = [attempt(once.rung, target=once.target.step)] * 7
    again = gone_back(decision(rule, past=past))
    assert (once.rung, once.skip_factor, once.lr_scale) == (Rung.SKIP, 1.0, 1.0)
    assert again == replace(once, attempt=8)


def test_oldest_checkpoint_is_taken_when_none_is_old_enough() -> None:
    assert chosen(decision(Rule.PALM, targets=TARGETS[2:], steps_before_onset=70)) == 40


@pytest.mark.parametrize("rule", [Rule.LADDER, Rule.FALCON, Rule.PALM])
def test_oldest_checkpoint_before_the_verdict_is_taken_when_none_is_older_than_the_onset(
    rule: Rule,
) -> None:
    found = verdict(VerdictKind.DIVERGENCE, onset=30, step=95)
    assert chosen(decision(rule, found, TARGETS[2:])) == 40
    assert isinstance(decision(rule, found, TARGETS[5:]), GiveUp)


@pytest.mark.parametrize("rule", [Rule.LADDER, Rule.FALCON, Rule.PALM, Rule.OBSERVE])
def test_no_checkpoint_before_the_onset_gives_up_and_names_the_keys(rule: Rule) -> None:
    for targets in ([], [TARGETS[-1]]):
        answer = given_up(decision(rule, targets=targets))
        assert answer.code == "no_good_checkpoint"
        assert "no good checkpoint before it" in answer.reason
        assert "checkpoint.save_at_start=true" in answer.reason


def test_reason_tells_steps_and_size_of_the_spike() -> None:
    answer = gone_back(falcon())
    assert answer.reason == "spike at step 93, found at step 95, 14.0 sigma over its baseline"


def test_reason_names_the_signal_that_led() -> None:
    led = replace(SPIKE, led_by="grad_norm", lead_steps=4, deviation=0.0)
    assert describe(led) == "spike at step 93, found at step 95, grad_norm led by 4"
    assert describe(replace(led, lead_steps=0)) == "spike at step 93, found at step 95"
    assert describe(replace(led, led_by="loss")) == "spike at step 93, found at step 95"


@pytest.mark.parametrize("deviation", [0.0, -3.0, float("inf"), float("nan")])
def test_reason_has_no_deviation_where_there_is_none(deviation: float) -> None:
    assert describe(replace(SPIKE, deviation=deviation)) == "spike at step 93, found at step 95"


# The ladder.


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (VerdictKind.SPIKE, LADDER),
        (VerdictKind.NONFINITE, LADDER),
        (VerdictKind.DIVERGENCE, LADDER[1:]),
        (VerdictKind.RESUME_DISCONTINUITY, LADDER),
    ],
)
def test_rungs_are_tried_in_order_and_those_that_cannot_help_are_left_out(
    kind: VerdictKind, expected: tuple[Rung, ...]
) -> None:
    *attempts, end = climb(verdict(kind))
    assert tuple(gone_back(answer).rung for answer in attempts) == expected
    assert [gone_back(answer).attempt for answer in attempts] == list(range(1, len(expected) + 1))
    assert {answer.incident for answer in attempts} == {1}
    assert given_up(end).code == "ladder_exhausted"


@pytest.mark.parametrize(
    "ladder", [(Rung.COOL,), (Rung.SKIP, Rung.SKIP), (Rung.SKIP_FURTHER, Rung.REPLAY)]
)
def test_ladder_of_the_config_is_the_one_that_is_climbed(ladder: tuple[Rung, ...]) -> None:
    *attempts, end = climb(SPIKE, ladder=ladder)
    assert tuple(gone_back(answer).rung for answer in attempts) == ladder
    assert isinstance(end, GiveUp)


def test_replay_and_cooling_skip_nothing_and_each_skip_more_than_the_one_before() -> None:
    factors = [gone_back(answer).skip_factor for answer in climb(SPIKE)[:-1]]
    assert factors == [0.0, 1.0, 2.0, 4.0, 0.0]


def test_growth_of_one_skips_the_same_amount_each_time() -> None:
    factors = [gone_back(answer).skip_factor for answer in climb(SPIKE, growth=1.0)[:-1]]
    assert factors == [0.0, 1.0, 1.0, 1.0, 0.0]


def test_each_attempt_to_go_further_goes_further() -> None:
    many = [Target(name=f"step-{step}", step=step, cursor=step) for step in range(0, 101, 5)]
    targets = [gone_back(answer).target.step for answer in climb(SPIKE, many)[:-1]]
    assert targets == [90, 90, 80, 70, 90]


@pytest.mark.parametrize("growth", [1.0, 2.0])
@pytest.mark.parametrize("steps_before_onset", [0, 3, 10])
def test_further_is_further_than_before_whatever_the_distance_in_steps(
    steps_before_onset: int, growth: float
) -> None:
    ladder = (Rung.SKIP, *[Rung.SKIP_FURTHER] * 4)
    answers = climb(SPIKE, ladder=ladder, growth=growth, steps_before_onset=steps_before_onset)
    steps = [gone_back(answer).target.step for answer in answers[:-1]]
    assert steps[0] == 80
    assert all(after < before for before, after in pairwise(steps))


def test_going_further_than_the_oldest_goes_to_the_oldest() -> None:
    ladder = (Rung.SKIP, Rung.SKIP_FURTHER, Rung.SKIP_FURTHER)
    answers = climb(SPIKE, TARGETS[3:5], ladder=ladder)
    assert [gone_back(answer).target.step for answer in answers[:-1]] == [80, 60, 60]


def test_cooling_scales_the_rate_each_time_more_and_only_then() -> None:
    answers = climb(SPIKE, ladder=(Rung.SKIP, Rung.COOL, Rung.SKIP, Rung.COOL), cool_factor=0.4)
    scales = [gone_back(answer).lr_scale for answer in answers[:-1]]
    assert scales == pytest.approx([1.0, 0.4, 1.0, 0.16])
    factors = [gone_back(answer).skip_factor for answer in answers[:-1]]
    assert factors == [1.0, 0.0, 2.0, 0.0]


def test_end_of_the_ladder_says_what_was_tried_and_what_to_do() -> None:
    end = given_up(climb(SPIKE)[-1])
    assert end.incident == 1
    assert "spike at step 93, found at step 95" in end.reason
    assert "tried for incident 1: replay, skip, skip_further, skip_further, cool" in end.reason
    assert "recovery.ladder" in end.reason


def test_verdict_that_no_rung_helps_says_so() -> None:
    (end,) = climb(verdict(VerdictKind.DIVERGENCE), ladder=(Rung.REPLAY,))
    assert "nothing that could help" in given_up(end).reason


def test_divergence_never_replays_even_amid_an_incident() -> None:
    past = [attempt(Rung.REPLAY)]
    assert gone_back(decision(found=verdict(VerdictKind.DIVERGENCE), past=past)).rung is Rung.SKIP


@pytest.mark.parametrize("rule", [Rule.LADDER, Rule.FALCON, Rule.PALM])
def test_state_that_does_not_continue_the_run_is_replaced_by_an_older_one(rule: Rule) -> None:
    """The run was taken up at step 80, so 81 is the first step that could be judged."""
    found = verdict(VerdictKind.RESUME_DISCONTINUITY, onset=81, step=83)
    answer = gone_back(decision(rule, found, steps_before_onset=0))
    assert (answer.rung, answer.skip_factor, answer.lr_scale) == (Rung.REPLAY, 0.0, 1.0)
    assert answer.target.step == 60


def test_state_that_does_not_continue_the_run_and_is_the_only_one_ends_it() -> None:
    found = verdict(VerdictKind.RESUME_DISCONTINUITY, onset=1, step=2)
    assert given_up(decision(found=found, targets=TARGETS[:1])).code == "no_good_checkpoint"


# A new level, which the ladder lets in by itself.


def skipped(onset: int, target: int, rung: Rung = Rung.SKIP) -> Past:
    """Return an attempt at trouble that began at `onset`, and where it went back to."""
    return attempt(rung, onset=onset, target=target)


# At 93 it began; behind other data, from 80 on, at 82 already; from 60 on, at 62.
SAME_AT_ONCE = [
    attempt(Rung.REPLAY),
    skipped(93, 80),
    skipped(82, 60, Rung.SKIP_FURTHER),
]
AGAIN = verdict(VerdictKind.SPIKE, onset=62, step=64)
SHORT = (Rung.REPLAY, Rung.SKIP, Rung.SKIP_FURTHER, Rung.COOL)


@pytest.mark.parametrize("kind", [VerdictKind.SPIKE, VerdictKind.DIVERGENCE])
def test_trouble_that_meets_any_data_at_once_is_a_new_level_and_let_in(kind: VerdictKind) -> None:
    found = replace(AGAIN, kind=kind)
    answer = gone_back(decision(found=found, past=SAME_AT_ONCE, ladder=SHORT))
    assert (answer.rung, answer.attempt, answer.incident) == (Rung.ACCEPT, 4, 1)
    assert (answer.skip_factor, answer.lr_scale) == (0.0, 1.0)
    assert answer.target.step == 60


def test_ladder_goes_on_where_letting_it_in_has_not_helped() -> None:
    past = [*SAME_AT_ONCE, attempt(Rung.ACCEPT, onset=62, target=60)]
    assert gone_back(decision(found=AGAIN, past=past, ladder=SHORT)).rung is Rung.COOL
    past.append(attempt(Rung.COOL, onset=62, target=60))
    end = given_up(decision(found=AGAIN, past=past, ladder=SHORT))
    assert "replay, skip, skip_further, accept, cool" in end.reason
    assert "recovery.announced=[62]" in end.reason


@pytest.mark.parametrize(
    ("found", "past", "ladder"),
    [
        pytest.param(AGAIN, SAME_AT_ONCE, LADDER, id="a skip is left to try"),
        pytest.param(AGAIN, SAME_AT_ONCE[:2], (Rung.REPLAY, Rung.SKIP, Rung.COOL), id="one skip"),
        pytest.param(replace(AGAIN, onset_step=65, step=66), SAME_AT_ONCE, SHORT, id="later"),
        pytest.param(
            AGAIN,
            [SAME_AT_ONCE[0], SAME_AT_ONCE[1], skipped(91, 60, Rung.SKIP_FURTHER)],
            SHORT,
            id="later the time before",
        ),
        pytest.param(
            replace(AGAIN, kind=VerdictKind.NONFINITE), SAME_AT_ONCE, SHORT, id="not a level"
        ),
        pytest.param(
            verdict(VerdictKind.SPIKE, onset=92, step=94),
            [skipped(93, 90), skipped(93, 90)],
            (Rung.SKIP, Rung.SKIP, Rung.COOL),
            id="bound to its step",
        ),
    ],
)
def test_trouble_that_may_pass_is_not_let_in(
    found: Verdict, past: list[Past], ladder: tuple[Rung, ...]
) -> None:
    answer = decision(found=found, past=past, ladder=ladder)
    assert not isinstance(answer, GoBack) or answer.rung is not Rung.ACCEPT


# Which incident a verdict belongs to.


@pytest.mark.parametrize(
    ("onset", "incident", "number"), [(93, 1, 2), (96, 1, 2), (145, 1, 2), (146, 2, 1)]
)
def test_trouble_within_the_cooldown_belongs_to_the_same_incident(
    onset: int, incident: int, number: int
) -> None:
    found = verdict(VerdictKind.SPIKE, onset=onset, step=onset + 2)
    answer = gone_back(decision(found=found, past=[attempt(Rung.REPLAY)]))
    assert (answer.incident, answer.attempt) == (incident, number)


def test_cooldown_counts_from_the_furthest_step_at_which_it_was_seen() -> None:
    past = [attempt(Rung.REPLAY, onset=93), attempt(Rung.SKIP, onset=50)]
    found = verdict(VerdictKind.SPIKE, onset=145, step=147)
    assert gone_back(decision(found=found, past=past)).incident == 1


def test_trouble_that_comes_again_later_goes_back_before_its_first_onset() -> None:
    found = verdict(VerdictKind.SPIKE, onset=101, step=103)
    assert chosen(decision(found=found, past=[attempt(Rung.REPLAY)])) == 80
    assert chosen(decision(found=found)) == 100


def test_next_incident_starts_at_the_first_rung() -> None:
    found = verdict(VerdictKind.SPIKE, onset=500, step=502)
    past = [attempt(rung, incident=3) for rung in LADDER]
    answer = gone_back(decision(found=found, past=past))
    assert (answer.incident, answer.attempt, answer.rung) == (4, 1, Rung.REPLAY)
    assert answer.target.step == 100


def test_stop_is_no_attempt_at_its_incident_and_belongs_to_it() -> None:
    """Whoever starts the run again after it was given up has the rest of the ladder."""
    answer = gone_back(decision(past=[attempt(Rung.STOP, incident=6)]))
    assert (answer.incident, answer.attempt, answer.rung) == (6, 1, Rung.REPLAY)
    tried = [attempt(Rung.REPLAY, incident=6), attempt(Rung.STOP, incident=6, onset=140)]
    later = verdict(VerdictKind.SPIKE, onset=190, step=192)
    answer = gone_back(decision(found=later, past=tried))
    assert (answer.incident, answer.attempt, answer.rung) == (6, 2, Rung.SKIP)


@pytest.mark.parametrize("rung", [Rung.REWIND, Rung.SKIP_AHEAD, Rung.UNSKIP])
def test_what_a_person_did_is_no_attempt(rung: Rung) -> None:
    answer = gone_back(decision(past=[attempt(rung, incident=6)]))
    assert (answer.incident, answer.attempt, answer.rung) == (7, 1, Rung.REPLAY)


# Budgets.


@pytest.mark.parametrize("rule", [Rule.LADDER, Rule.FALCON, Rule.PALM])
def test_used_up_budget_gives_up_and_names_the_key(rule: Rule) -> None:
    answer = given_up(decision(rule, num_rewinds=3, max_rewinds=3))
    assert answer.code == "rewinds_used_up"
    assert "all 3 rewinds of the run are used up (recovery.max_rewinds)" in answer.reason
    assert isinstance(decision(rule, num_rewinds=2, max_rewinds=3), GoBack)


@pytest.mark.parametrize("rule", [Rule.LADDER, Rule.SKIP_STEP])
@pytest.mark.parametrize("kind", [VerdictKind.OUTLIER, VerdictKind.SPIKE, VerdictKind.NONFINITE])
def test_refused_update_is_borne_and_written_down(kind: VerdictKind, rule: Rule) -> None:
    for step in (93, 94, 95):
        answer = decision(rule, verdict(kind, step=step), is_vetoed=True)
        assert isinstance(answer, Bear)
        assert answer.reason == (
            f"{kind} at step 93, found at step {step}, 14.0 sigma over its baseline; "
            "its update was refused"
        )


@pytest.mark.parametrize("rule", [Rule.FALCON, Rule.PALM])
def test_refused_update_is_borne_without_a_word_by_rules_that_do_not_refuse(rule: Rule) -> None:
    for step in (93, 94, 95):
        found = verdict(VerdictKind.NONFINITE, step=step)
        assert decision(rule, found, is_vetoed=True) is None
    found = verdict(VerdictKind.NONFINITE, step=96)
    assert isinstance(decision(rule, found, is_vetoed=True), GoBack)


def test_refused_updates_that_go_on_lead_to_a_rewind() -> None:
    found = verdict(VerdictKind.NONFINITE, step=96)
    assert gone_back(decision(found=found, is_vetoed=True)).rung is Rung.REPLAY


def test_nonfinite_update_that_was_applied_leads_to_a_rewind_at_once() -> None:
    found = verdict(VerdictKind.NONFINITE, onset=95)
    assert chosen(decision(found=found)) == 80


def test_refused_updates_beyond_the_budget_of_the_run_lead_to_a_rewind() -> None:
    found = verdict(VerdictKind.NONFINITE, step=93)
    last = decision(found=found, is_vetoed=True, num_vetoes=9)
    assert isinstance(last, Bear)
    assert isinstance(decision(found=found, is_vetoed=True, num_vetoes=10), GoBack)


def test_outlier_beyond_the_budget_of_the_run_is_left_alone() -> None:
    found = verdict(VerdictKind.OUTLIER, step=93)
    assert decision(found=found, is_vetoed=True, num_vetoes=10) is None


# skip_step.


@pytest.mark.parametrize("kind", list(VerdictKind))
@pytest.mark.parametrize("is_vetoed", [False, True])
@pytest.mark.parametrize("step", [93, 95, 96, 200])
def test_skip_step_never_goes_back(kind: VerdictKind, is_vetoed: bool, step: int) -> None:
    for num_vetoes in (0, 9, 10):
        answer = decision(
            Rule.SKIP_STEP, verdict(kind, step=step), is_vetoed=is_vetoed, num_vetoes=num_vetoes
        )
        assert not isinstance(answer, GoBack)


def test_skip_step_ends_a_run_of_nonfinite_updates() -> None:
    found = verdict(VerdictKind.NONFINITE, step=96)
    answer = given_up(decision(Rule.SKIP_STEP, found, is_vetoed=True))
    assert answer.code == "nonfinite_in_a_row"
    assert "3 updates in a row were not finite" in answer.reason
    assert "use recovery=ladder" in answer.reason


def test_skip_step_leaves_a_finite_level_to_the_detector() -> None:
    found = verdict(VerdictKind.SPIKE, step=150)
    assert decision(Rule.SKIP_STEP, found, is_vetoed=True) is None


def test_skip_step_gives_up_when_its_refusals_are_used_up() -> None:
    found = verdict(VerdictKind.OUTLIER, step=93)
    answer = given_up(decision(Rule.SKIP_STEP, found, is_vetoed=True, num_vetoes=10))
    assert answer.code == "vetoes_used_up"
    assert "all 10 refused updates of the run are used up (recovery.max_vetoes)" in answer.reason


# observe.


@pytest.mark.parametrize("kind", sorted(ROLLBACK_KINDS))
def test_observe_decides_as_the_ladder_begins(kind: VerdictKind) -> None:
    assert decision(Rule.OBSERVE, verdict(kind)) == decision(Rule.LADDER, verdict(kind))
    assert isinstance(decision(Rule.OBSERVE, verdict(kind)), GoBack)


def observed(answer: Decision, found: Verdict) -> Past:
    """Return what is written down of a decision that is not carried out."""
    is_rewind = isinstance(answer, GoBack)
    return Past(
        incident=answer.incident,
        rung=answer.rung if is_rewind else Rung.STOP,
        onset_step=found.onset_step,
        detected_step=found.step,
        target_step=answer.target.step if is_rewind else found.step,
        is_observed=True,
    )


@pytest.mark.parametrize("targets", [TARGETS, []], ids=["good checkpoints", "none"])
def test_observe_decides_once_an_incident(targets: list[Target]) -> None:
    past: list[Past] = []
    for step in range(93, 120):
        found = verdict(VerdictKind.SPIKE, step=step)
        answer = decision(Rule.OBSERVE, found, targets, past=past)
        if answer is not None:
            past.append(observed(answer, found))
    assert [entry.incident for entry in past] == [1]
    found = verdict(VerdictKind.SPIKE, onset=300, step=302)
    answer = decision(Rule.OBSERVE, found, targets, past=past)
    assert answer is not None
    assert answer.incident == 2


def test_what_was_merely_observed_is_not_tried_yet() -> None:
    past = [replace(attempt(Rung.REPLAY), is_observed=True)]
    assert gone_back(decision(past=past)).rung is Rung.REPLAY


# What holds for any history.

RULES_THAT_GO_BACK = (Rule.LADDER, Rule.FALCON, Rule.PALM, Rule.OBSERVE)


def random_case(
    source: random.Random,
) -> tuple[Rule, Verdict, list[Target], History, Budget]:
    onset = source.randrange(1, 400)
    found = Verdict(
        kind=source.choice(list(VerdictKind)),
        step=onset + source.randrange(30),
        onset_step=onset,
        deviation=source.choice([0.0, 7.5, float("inf"), float("nan")]),
        led_by=source.choice(["loss", "grad_norm"]),
        lead_steps=source.randrange(3),
    )
    steps = source.sample(range(500), source.randrange(8))
    targets = [Target(name=f"step-{step}", step=step, cursor=16 * step) for step in steps]
    past = [
        Past(
            incident=source.randrange(1, 6),
            rung=source.choice(list(Rung)),
            onset_step=source.randrange(400),
            detected_step=source.randrange(430),
            target_step=source.randrange(400),
            is_observed=source.random() < 0.2,
        )
        for _ in range(source.randrange(9))
    ]
    history = History(
        past=past,
        num_rewinds=source.randrange(12),
        num_vetoes=source.randrange(12),
        is_vetoed=source.random() < 0.4,
    )
    budget = Budget(
        max_rewinds=source.randrange(12),
        max_vetoes=source.randrange(12),
        max_vetoes_in_a_row=source.randrange(1, 5),
        steps_before_onset=source.randrange(120),
        cooldown_steps=source.randrange(200),
        ladder=source.choices(sorted(LISTED_RUNGS), k=source.randrange(6)),
        growth=source.choice([1.0, 1.7, 3.0]),
        cool_factor=source.choice([0.1, 0.5, 0.9]),
    )
    return source.choice(list(Rule)), found, targets, history, budget


@pytest.mark.parametrize("seed", range(40))
def test_any_history_leads_to_a_decision_that_keeps_the_limits(seed: int) -> None:
    source = random.Random(seed)
    for _ in range(250):
        rule, found, targets, history, budget = random_case(source)
        answer = decide(rule, found, targets, history, budget)
        if isinstance(answer, GoBack):
            assert rule in RULES_THAT_GO_BACK and found.needs_rollback
            assert answer.target in targets
            if any(target.step < found.onset_step for target in targets):
                assert answer.target.step < found.onset_step
            else:
                oldest = min(targets, key=lambda target: target.step)
                assert answer.target == oldest and oldest.step < found.step
            is_listed = rule in (Rule.LADDER, Rule.OBSERVE)
            own = {*budget.ladder, Rung.ACCEPT} if is_listed else {Rung.SKIP}
            if found.kind is VerdictKind.RESUME_DISCONTINUITY:
                own |= {Rung.REPLAY}
            assert answer.rung in own
            assert history.num_rewinds < budget.max_rewinds
            assert answer.skip_factor >= 0.0
            assert (answer.skip_factor > 0.0) == (answer.rung in (Rung.SKIP, Rung.SKIP_FURTHER))
            assert 0.0 < answer.lr_scale <= 1.0
            assert answer.incident >= 1 and answer.attempt >= 1
        if isinstance(answer, GiveUp):
            assert answer.code and answer.code.isidentifier()
            assert answer.reason
        if isinstance(answer, Bear):
            assert history.is_vetoed and rule in (Rule.LADDER, Rule.SKIP_STEP)
            assert history.num_vetoes < budget.max_vetoes


@pytest.mark.parametrize("seed", range(20))
def test_equal_arguments_give_equal_decisions_whatever_the_order_of_the_targets(seed: int) -> None:
    source = random.Random(seed)
    for _ in range(250):
        rule, found, targets, history, budget = random_case(source)
        first = decide(rule, found, targets, history, budget)
        shuffled = source.sample(targets, len(targets))
        assert decide(rule, found, tuple(shuffled), history, budget) == first


@pytest.mark.parametrize("seed", range(40))
def test_rewinds_of_an_incident_are_bounded_by_the_ladder_whatever_comes(seed: int) -> None:
    """A run that meets trouble at random, goes back as it is told, and ends when told to."""
    source = random.Random(seed)
    kinds = sorted(ROLLBACK_KINDS)
    budget = replace(BUDGET, max_rewinds=60, cooldown_steps=source.choice([0, 50, 10**6]))
    targets = [Target(name=f"step-{step}", step=step, cursor=step) for step in range(0, 4000, 10)]
    past: list[Past] = []
    step = 50
    for _ in range(200):
        onset = step + source.randrange(1, 60)
        found = verdict(source.choice(kinds), onset=onset, step=onset + source.randrange(3))
        history = History(past=past, num_rewinds=len(past))
        answer = decide(Rule.LADDER, found, targets, history, budget)
        if isinstance(answer, GiveUp):
            break
        back = gone_back(answer)
        past.append(
            Past(
                incident=back.incident,
                rung=back.rung,
                onset_step=onset,
                detected_step=found.step,
                target_step=back.target.step,
            )
        )
        step = back.target.step
    else:
        pytest.fail("trouble without an end must end the run")
    assert len(past) <= budget.max_rewinds
    for incident in {entry.incident for entry in past}:
        rungs = [entry.rung for entry in past if entry.incident == incident]
        assert len(rungs) <= len(LADDER) + rungs.count(Rung.ACCEPT)
        assert rungs.count(Rung.ACCEPT) <= 1


def test_resume_that_went_wrong_is_replaced_whatever_the_ladder_lists() -> None:
    found = replace(SPIKE, kind=VerdictKind.RESUME_DISCONTINUITY)
    budget = replace(BUDGET, ladder=(Rung.SKIP,))
    answer = decide(Rule.LADDER, found, TARGETS, History(), budget)
    assert isinstance(answer, GoBack)
    assert answer.rung is Rung.REPLAY and answer.skip_factor == 0.0
