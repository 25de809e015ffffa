"""An automatic interval of saves: when it is chosen, that all ranks agree, and that it stays."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from fakes import Process, at

from train.actions import Save
from train.callbacks.checkpointing import Checkpointing, interval_in_force
from train.checkpoint.info import Health
from train.checkpoint.interval import configured_rate
from train.errors import ConfigError
from train.settings import RunConfig
from train.signals import StepReport, StepSignals

pytestmark = pytest.mark.usefixtures("fast_disk")

ComposeConfig = Callable[..., tuple[RunConfig, dict[str, Any]]]
AUTO = (
    "checkpoint.interval_steps=auto",
    "checkpoint.failures_per_day=100",
    "checkpoint.max_interval_steps=5000",
)


class Rank:
    """One rank of a job in which steps take `step_seconds` and saves `save_seconds`."""

    def __init__(
        self,
        callback: Checkpointing,
        process: Process,
        *,
        step_seconds: float = 1.0,
        save_seconds: float = 0.5,
    ) -> None:
        self.callback = callback
        self._process = process
        self._step_seconds = step_seconds
        self._save_seconds = save_seconds

    def run(self, first: int, last: int) -> list[int]:
        """Take the steps after `first` up to `last`; return those that were saved."""
        saved = []
        for step in range(first + 1, last + 1):
            action = self.callback.after_update(self._report(step))
            assert self.callback.needs_current(step) or action is None
            if isinstance(action, Save) and action.to_disk:
                self.save(step)
                saved.append(step)
        return saved

    def save(self, step: int) -> None:
        self._process.save(step, Health.CANDIDATE)
        info = self._process.entry(step)
        self.callback.on_checkpoint_saved(info, self._save_seconds, 0.0)

    def _report(self, step: int) -> StepReport:
        return StepReport(
            state=at(step),
            signals=StepSignals(loss_nats=8.0, grad_norm=1.0, is_vetoed=False),
            lr=1e-3,
            num_samples=16,
            num_tokens=2048,
            step_seconds=self._step_seconds,
            data_seconds=0.0,
            finished_unix_seconds=0.0,
        )


@pytest.fixture
def make(compose_config: ComposeConfig, tmp_path: Path) -> Callable[..., Rank]:
    numbers = count()

    def make_it(*settings: str, agree: Any = lambda value: value, **times: float) -> Rank:
        config, _ = compose_config([*AUTO, *settings])
        process = Process(tmp_path / f"run-{next(numbers)}")
        rate = configured_rate(1e-3)  # only used where the config has none
        return Rank(
            Checkpointing(config.checkpoint, process.tiers, agree=agree, rate=rate),
            process,
            **times,
        )

    return make_it


def test_interval_is_chosen_once_steps_and_a_save_are_timed(
    make: Callable[..., Rank], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    rank = make()
    rank.save(0)
    saved = rank.run(0, 100)
    assert saved == [29, 58, 87], "Young: sqrt(2 x 0.5 s x 864 s) = 29 s"
    (line,) = [line for line in caplog.messages if "interval_steps=auto" in line]
    assert "a save every 29 steps" in line
    assert "100 failures a day (checkpoint.failures_per_day)" in line


def test_first_interval_holds_until_then(make: Callable[..., Rank]) -> None:
    assert make().run(0, 120)[0] == 100, "no save has been timed"
    assert make("checkpoint.max_interval_steps=20").run(0, 30)[0] == 20


def test_interval_that_is_nearly_right_is_left_alone(
    make: Callable[..., Rank], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    rank = make()
    rank.save(0)
    rank.run(0, 40)
    rank._save_seconds = 0.6  # 32 steps would be best
    assert rank.run(40, 120) == [58, 87, 116]
    rank._save_seconds = 8.0
    assert rank.run(120, 400) == [145, 224, 336], "112 steps, from the save that shows it on"
    assert sum("interval_steps=auto" in line for line in caplog.messages) == 2


def test_all_ranks_do_what_rank_0_has_measured(make: Callable[..., Rank]) -> None:
    agreed: list[Any] = []

    def of_rank_0(value: Any) -> Any:
        agreed.append(value)
        return value

    first = make(agree=of_rank_0)
    first.save(0)
    expected = first.run(0, 200)
    answers = iter(agreed)
    slow = make(agree=lambda value: next(answers), step_seconds=7.0, save_seconds=90.0)
    slow.save(0)
    assert slow.run(0, 200) == expected
    assert list(answers) == [], "as many agreements on each rank"


def test_interval_is_in_the_checkpoint_and_holds_after_a_resume(
    make: Callable[..., Rank], compose_config: ComposeConfig
) -> None:
    rank = make()
    rank.save(0)
    rank.run(0, 40)
    state = rank.callback.state_dict()
    assert (state["interval_steps"], state["save_seconds"]) == (29, 0.5)
    resumed = make()
    resumed.callback.load_state_dict(state)
    assert resumed.run(40, 100) == [58, 87]
    config, _ = compose_config([*AUTO])
    assert interval_in_force(config.checkpoint, {"Checkpointing": state}) == 29
    assert interval_in_force(config.checkpoint, {}) == 100


def test_rate_of_the_run_holds_where_none_is_configured(make: Callable[..., Rank]) -> None:
    rank = make("checkpoint.failures_per_day=null", "checkpoint.max_minutes_at_risk=2")
    rank.save(0)
    assert rank.run(0, 250) == [120, 240], "one failure in 1000 days: the bound is what counts"


def test_snapshots_follow_the_interval(make: Callable[..., Rank]) -> None:
    rank = make()
    rank.save(0)
    rank.run(0, 20)
    action = rank.callback.after_update(rank._report(29))
    assert isinstance(action, Save)
    assert action.to_memory


def test_a_fixed_interval_is_never_changed(make: Callable[..., Rank]) -> None:
    rank = make("checkpoint.interval_steps=10", save_seconds=1000.0)
    assert rank.run(0, 40) == [10, 20, 30, 40]
    assert rank.callback.state_dict() == {"calm_steps": 40}


@pytest.mark.parametrize("value", ["often", "0", "-3", "1.5", "null"])
def test_other_words_are_refused(compose_config: ComposeConfig, value: str) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.interval_steps"):
        compose_config([f"checkpoint.interval_steps={value}"])


@pytest.mark.parametrize("value", ["2", "much", "0GB"])
def test_disk_budget_that_is_no_size_is_refused(compose_config: ComposeConfig, value: str) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.disk_budget"):
        compose_config([f"checkpoint.disk_budget={value}x"])
