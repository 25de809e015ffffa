"""Where a run stands."""

from __future__ import annotations

import pytest

from train.state import BatchRange, TrainState


def test_range_counts_its_samples() -> None:
    assert len(BatchRange(start=3, stop=10)) == 7
    assert str(BatchRange(start=3, stop=10)) == "[3, 10)"


@pytest.mark.parametrize(("start", "stop"), [(5, 4), (-1, 4)])
def test_range_that_goes_backwards_or_below_zero_is_refused(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="0 <= start <= stop"):
        BatchRange(start=start, stop=stop)


def test_update_moves_step_cursor_clock_and_tokens() -> None:
    state = TrainState(step=4, cursor=64, clock=9, tokens_seen=100, rewinds=1)
    assert state.after(next_cursor=90, num_tokens=50) == TrainState(
        step=5, cursor=90, clock=10, tokens_seen=150, rewinds=1
    )


def test_rewind_moves_the_step_back_and_never_the_clock() -> None:
    old = TrainState(step=20, cursor=320, clock=20, tokens_seen=40)
    assert old.rewound(clock=35, rewinds=1) == TrainState(
        step=20, cursor=320, clock=35, tokens_seen=40, rewinds=1
    )
    assert old.rewound(clock=3, rewinds=1).clock == 20


def test_state_survives_a_dictionary() -> None:
    state = TrainState(step=1, cursor=2, clock=3, tokens_seen=4, rewinds=5)
    assert TrainState(**state.as_dict()) == state
