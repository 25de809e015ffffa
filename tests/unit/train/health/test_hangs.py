"""Who is to blame for a hang, and when one is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from train.health.hangs import describe, suspects
from train.health.heartbeats import Heartbeat
from train.health.pulse import Phase, Pulse
from train.health.watchdog import is_timeout, limit_seconds
from train.settings import RunConfig


def beat(rank: int, count: int = 1, phase: Phase = Phase.STEP, step: int = 9) -> Heartbeat:
    place: dict[str, Any] = {"host": f"h{rank}", "device": "cpu", "pid": 5, "started": "1"}
    return Heartbeat(rank=rank, count=count, phase=phase, step=step, age=1.0, **place)


def beats(*all_: Heartbeat) -> dict[int, Heartbeat]:
    return {one.rank: one for one in all_}


def test_a_rank_whose_beats_stop_is_named_before_one_that_is_behind() -> None:
    before = beats(beat(0), beat(1), beat(2))
    after = beats(beat(0, 2), beat(1), beat(2, 2, step=8))
    found = suspects(before, after, 3)
    assert found.ranks == (1,) and found.is_silent
    assert "rank 1 (process 5 on h1, cpu, step of step 9): no sign of life" in describe(
        found, after
    )


def test_a_rank_that_was_never_heard_of_is_named() -> None:
    found = suspects(beats(beat(0)), beats(beat(0, 2)), 2)
    assert found.ranks == (1,)
    assert describe(found, {}) == "rank 1 (never heard of): " + found.why


@pytest.mark.parametrize(
    "late", [beat(1, 2, step=8), beat(1, 2, Phase.DATA), beat(1, 2, Phase.REWIND)]
)
def test_the_rank_that_is_furthest_behind_is_waited_for(late: Heartbeat) -> None:
    found = suspects(beats(beat(0), beat(1)), beats(beat(0, 2), late), 2)
    assert found.ranks == (1,) and not found.is_silent


def test_ranks_at_the_same_place_cannot_be_told_apart() -> None:
    found = suspects(beats(beat(0), beat(1)), beats(beat(0, 2), beat(1, 2)), 2)
    assert found.ranks == ()
    assert "see their stacks" in describe(found, {})


def test_limits_are_learnt_but_never_below_the_floor(
    compose_config: Callable[..., tuple[RunConfig, Any]],
) -> None:
    health = compose_config(["health.hang_seconds=100", "health.start_seconds=900"])[0].health
    learnt = {Phase.STEP: 30.0, Phase.DATA: 0.1, Phase.START: 5.0, Phase.COMPILE: 60.0}
    limits = {phase: limit_seconds(health, phase, learnt) for phase in Phase}
    assert limits[Phase.STEP] == 300.0
    assert limits[Phase.DATA] == 100.0
    assert limits[Phase.SAVE] == 900.0, "not seen yet"
    assert limits[Phase.START] == limits[Phase.COMPILE] == limits[Phase.END] == 900.0


def test_the_first_step_of_an_attempt_counts_as_compilation() -> None:
    pulse = Pulse()
    pulse.enter(Phase.DATA, 4)
    pulse.enter(Phase.STEP, 4)
    assert pulse.now.phase is Phase.COMPILE and not pulse.has_stepped
    pulse.enter(Phase.DATA, 5)
    assert pulse.has_stepped
    pulse.enter(Phase.STEP, 5)
    assert (pulse.now.phase, pulse.now.step) == (Phase.STEP, 5)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[gloo] Timed out waiting 4000ms for recv operation to complete"), True),
        (RuntimeError("wait timeout after 4000ms, keys: /a"), True),
        (RuntimeError("Connection closed by peer"), False),
        (ValueError("timeout=3 is no number"), False),
    ],
)
def test_a_collective_that_waited_in_vain_is_told_from_one_that_lost_its_peer(
    error: Exception, expected: bool
) -> None:
    assert is_timeout(error) is expected
