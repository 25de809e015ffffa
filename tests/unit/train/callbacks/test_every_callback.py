"""What holds for each callback that there is; a new module in `train/callbacks` is found."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import Process

import train.callbacks
from monitoring.clocks import Birth, Moment
from monitoring.console import ConsoleProgress
from train.callbacks.tracking import Telemetry
from train.checkpoint.tiers import Tiers
from train.events import Callback, CallbackPhase, Events
from train.recovery.history import RecoveryHistory
from train.schedule import Schedule
from train.settings import RunConfig
from train.signals import StepReport, StepSignals
from train.state import TrainState

pytestmark = pytest.mark.usefixtures("fast_disk")

FOLDER = Path(inspect.getfile(train.callbacks)).parent
MODULES = sorted(path.stem for path in FOLDER.glob("[a-z]*.py"))


def callback_class(module_name: str) -> type[Callback]:
    module = importlib.import_module(f"train.callbacks.{module_name}")
    (found,) = (
        member
        for _, member in inspect.getmembers(module, inspect.isclass)
        if issubclass(member, Callback) and member.__module__ == module.__name__
    )
    return found


@pytest.fixture
def make(
    compose_config: Callable[..., tuple[RunConfig, dict[str, Any]]], tmp_path: Path
) -> Callable[[str], Callback]:
    """Return a function from a module's name to its callback, made of real parts."""
    config, node = compose_config()
    telemetry = Telemetry(
        folder=tmp_path,
        run_id="id",
        attempt=0,
        birth=Birth(process=Moment(unix_seconds=0.0, uptime_seconds=0.0)),
        world_size=1,
        engine="single",
        host="here",
        config=node,
        flops_per_token=1.0,
        peak_flops=None,
        group_names=(),
    )
    parts: dict[type, object] = {
        Tiers: Process(tmp_path).tiers,
        RecoveryHistory: RecoveryHistory(),
        Schedule: Schedule(config.schedule, peak_lr=1.0, num_steps=10),
        Telemetry: telemetry,
        ConsoleProgress: ConsoleProgress(10, "run"),
        list: [],
        int: 128,
    }
    for name in config.__dataclass_fields__:
        parts[type(getattr(config, name))] = getattr(config, name)

    def make_it(module_name: str) -> Callback:
        chosen = callback_class(module_name)
        hints = inspect.get_annotations(chosen.__init__, eval_str=True)
        needed = [
            hints[name]
            for name, parameter in inspect.signature(chosen).parameters.items()
            if parameter.default is parameter.empty
        ]
        return chosen(*(parts[getattr(hint, "__origin__", hint)] for hint in needed))

    return make_it


def reports(*losses: float) -> list[StepReport]:
    return [
        StepReport(
            state=TrainState(step=step, cursor=16 * step, clock=step),
            signals=StepSignals(loss_nats=loss, grad_norm=1.0, is_vetoed=False),
            lr=1e-3,
            num_samples=16,
            num_tokens=2048,
            step_seconds=0.1,
            data_seconds=0.0,
            finished_unix_seconds=0.0,
        )
        for step, loss in enumerate(losses, start=1)
    ]


def test_there_are_callbacks() -> None:
    assert {"spike_detection", "spike_recovery", "checkpointing", "tracking"} <= set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_module_holds_one_callback_named_after_it(module: str) -> None:
    assert callback_class(module).__name__ == module.replace("_", " ").title().replace(" ", "")


@pytest.mark.parametrize("module", MODULES)
def test_callback_has_a_phase_and_only_reporting_is_for_rank_0_alone(module: str) -> None:
    chosen = callback_class(module)
    assert isinstance(chosen.phase, CallbackPhase)
    if chosen.is_main_only:
        assert chosen.phase is CallbackPhase.REPORT


@pytest.mark.parametrize("module", MODULES)
def test_callback_overrides_only_what_the_contract_has(module: str) -> None:
    public = {name for name in vars(callback_class(module)) if not name.startswith("_")}
    assert public <= set(dir(Callback))


@pytest.mark.parametrize("module", MODULES)
def test_state_survives_json_and_goes_on_alike(
    module: str, make: Callable[[str], Callback]
) -> None:
    losses = [4.0 - 0.001 * step for step in range(60)]
    first, second = make(module), make(module)
    for report in reports(*losses):
        first.after_update(report)
    state = json.loads(json.dumps(first.state_dict()))
    if state:
        second.load_state_dict(state)
    assert json.loads(json.dumps(second.state_dict())) == state
    if callback_class(module).phase is CallbackPhase.OBSERVE:
        after = reports(*losses, 9.0, 9.0)[-2:]
        assert [second.after_update(r) for r in after] == [first.after_update(r) for r in after]
    first.close()
    second.close()


@pytest.mark.parametrize("module", MODULES)
def test_closing_twice_and_without_a_start_is_harmless(
    module: str, make: Callable[[str], Callback]
) -> None:
    callback = make(module)
    callback.close()
    callback.close()


def test_default_callbacks_are_dispatched_in_this_order(make: Callable[[str], Callback]) -> None:
    names = ("tracking", "checkpointing", "spike_recovery", "spike_detection")
    events = Events([make(name) for name in names], is_main=True)
    assert events.describe().split(", ") == [
        "observe:SpikeDetection",
        "decide:SpikeRecovery",
        "persist:Checkpointing",
        "report:Tracking",
    ]
    events.close()
