"""The policy as a pure function: verdict and history in, decision out."""

from __future__ import annotations

import pytest

from train.recovery.detector import Verdict, VerdictKind
from train.recovery.policy import Budget, GiveUp, GoBack, History, Rule, Target, decide

TARGETS = [
    Target(name=f"step-{step}", step=step, cursor=step * 16) for step in (0, 20, 40, 60, 80, 100)
]
SPIKE = Verdict(kind=VerdictKind.SPIKE, step=95, onset_step=93, deviation=14.0)


def decision(
    rule: Rule = Rule.FALCON,
    verdict: Verdict = SPIKE,
    targets: list[Target] = TARGETS,
    *,
    num_rewinds: int = 0,
    is_vetoed: bool = False,
    max_rewinds: int = 3,
    steps_before_onset: int = 0,
) -> GoBack | GiveUp | None:
    return decide(
        rule,
        verdict,
        targets,
        History(num_rewinds=num_rewinds, is_vetoed=is_vetoed),
        Budget(max_rewinds=max_rewinds, steps_before_onset=steps_before_onset, max_vetoes=2),
    )


def chosen(answer: GoBack | GiveUp | None) -> str:
    assert isinstance(answer, GoBack)
    return answer.target.name


def test_falcon_goes_to_the_latest_good_checkpoint_before_the_onset() -> None:
    assert chosen(decision()) == "step-80"


def test_checkpoint_of_the_onset_step_itself_is_not_trusted() -> None:
    verdict = Verdict(kind=VerdictKind.SPIKE, step=82, onset_step=80)
    assert chosen(decision(verdict=verdict)) == "step-60"


def test_onset_decides_and_not_the_step_that_found_it() -> None:
    verdict = Verdict(kind=VerdictKind.SPIKE, step=105, onset_step=79)
    assert chosen(decision(verdict=verdict)) == "step-60"


def test_order_of_the_targets_does_not_matter() -> None:
    assert chosen(decision(targets=TARGETS[::-1])) == "step-80"


@pytest.mark.parametrize(
    ("steps_before_onset", "expected"),
    [(0, "step-80"), (13, "step-80"), (14, "step-60"), (50, "step-40"), (93, "step-0")],
)
def test_palm_goes_back_the_number_of_steps(steps_before_onset: int, expected: str) -> None:
    assert chosen(decision(Rule.PALM, steps_before_onset=steps_before_onset)) == expected


def test_oldest_checkpoint_is_taken_when_none_is_old_enough() -> None:
    answer = decision(Rule.PALM, targets=TARGETS[2:], steps_before_onset=70)
    assert chosen(answer) == "step-40"


def test_nonfinite_step_is_rolled_back_too() -> None:
    verdict = Verdict(kind=VerdictKind.NONFINITE, step=95, onset_step=95)
    assert chosen(decision(verdict=verdict)) == "step-80"


@pytest.mark.parametrize(
    "kind", [VerdictKind.OK, VerdictKind.WARMUP, VerdictKind.OUTLIER, VerdictKind.LEVEL_SHIFT]
)
def test_nothing_is_done_about_a_step_that_needs_no_rollback(kind: VerdictKind) -> None:
    assert decision(verdict=Verdict(kind=kind, step=95, onset_step=93)) is None


def test_rule_none_never_acts() -> None:
    assert decision(Rule.NONE) is None
    assert decision(Rule.NONE, targets=[], num_rewinds=99) is None


def test_used_up_budget_gives_up_and_names_the_key() -> None:
    answer = decision(num_rewinds=3, max_rewinds=3)
    assert isinstance(answer, GiveUp)
    assert "all 3 rewinds of the run are used up (recovery.max_rewinds)" in answer.reason
    assert isinstance(decision(num_rewinds=2, max_rewinds=3), GoBack)


def test_no_checkpoint_before_the_onset_gives_up_and_names_the_keys() -> None:
    for targets in ([], [TARGETS[-1]]):
        answer = decision(targets=targets)
        assert isinstance(answer, GiveUp)
        assert "no good checkpoint before it" in answer.reason
        assert "checkpoint.save_at_start=true" in answer.reason


def test_reason_tells_steps_and_size_of_the_spike() -> None:
    answer = decision()
    assert isinstance(answer, GoBack)
    assert answer.reason == "spike at step 93, found at step 95, 14.0 sigma over its baseline"


def nonfinite(*, step: int) -> Verdict:
    return Verdict(kind=VerdictKind.NONFINITE, step=step, onset_step=95)


def test_one_refused_update_is_borne_without_a_rewind() -> None:
    assert decision(verdict=nonfinite(step=95), is_vetoed=True) is None


def test_refused_updates_that_go_on_lead_to_a_rewind() -> None:
    assert chosen(decision(verdict=nonfinite(step=97), is_vetoed=True)) == "step-80"


def test_nonfinite_update_that_was_applied_leads_to_a_rewind_at_once() -> None:
    assert chosen(decision(verdict=nonfinite(step=95))) == "step-80"
