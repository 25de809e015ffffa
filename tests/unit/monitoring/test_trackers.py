"""The guard, the configuration, and the trackers' real SDKs without a network.

The SDK tests start a process of their own, because both SDKs leave threads and exit hooks behind.
Its Python cannot resolve names or reach other machines, so that a call home would show.
"""

from __future__ import annotations

import json
import logging
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from monitoring.jsonl import JsonlTracker
from monitoring.records import read_json_lines, read_run
from monitoring.trackers import (
    GuardedTracker,
    MetricValue,
    TrackerConfig,
    TrackerKind,
    build_trackers,
    dashboard_command,
    numeric,
)

REPOSITORY = Path(__file__).parents[3]

RUN_A_TRACKER = """
import json, pathlib, signal, socket, sys
from monitoring.trackers import TrackerConfig, TrackerKind, build_trackers

real_connect, errors = socket.socket.connect, []

def connect(self, address):
    if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
        errors.append(str(address))
        raise OSError("network is off")
    return real_connect(self, address)

def resolve(host, *args, **kwargs):
    errors.append(str(host))
    raise socket.gaierror("network is off")

socket.socket.connect, socket.getaddrinfo = connect, resolve
handler = signal.getsignal(signal.SIGINT)
folder = pathlib.Path(sys.argv[1])
config = TrackerConfig(kind=TrackerKind[sys.argv[2]], mode=sys.argv[3])
for tracker in build_trackers(config):
    tracker.start({"optim": {"lr": 0.1}, "tags": ["a"], "none": None}, "falcon", "a1b2", folder)
    for clock in range(1, 4):
        held_out = {"validation_loss_nats": 4.0, "validation_loss_nats/web": 4.0 + clock}
        if clock == 2:  # a step is reported late, so its evaluation may come before it
            tracker.log(held_out, clock)
        metrics = {"loss_nats": 1.0 / clock, "mfu": None, "verdict": "ok", "step": clock}
        tracker.log({**metrics, "grad_norm": float("nan")}, clock)
    tracker.event("rewind", "step 3 to 1", 3)
    tracker.log({**held_out, "validation_loss_nats": float("inf")}, clock)
    assert signal.getsignal(signal.SIGINT) is handler
    tracker.finish({"finished": True, "goodput": {}, "steps": 3})
    assert not tracker.is_off and tracker.num_errors == 0
print(json.dumps(errors))
"""


def run_tracker(folder: Path, kind: str, mode: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", RUN_A_TRACKER, str(folder), kind, mode],
        env={"PYTHONPATH": str(REPOSITORY), "HOME": str(folder), "PATH": "/usr/bin:/bin"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


class BrokenTracker:
    def __init__(self) -> None:
        self.num_calls = 0

    def start(self, config: Mapping[str, object], name: str, run_id: str, folder: Path) -> None:
        self._break()

    def log(self, metrics: Mapping[str, MetricValue], clock: int) -> None:
        self._break()

    def event(self, kind: str, message: str, clock: int) -> None:
        self._break()

    def finish(self, summary: Mapping[str, object]) -> None:
        self._break()

    def _break(self) -> None:
        self.num_calls += 1
        raise ConnectionError("no route")


def test_tracker_is_switched_off_after_three_errors(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    broken = BrokenTracker()
    guarded = GuardedTracker(broken)
    with caplog.at_level(logging.WARNING):
        guarded.start({}, "name", "id", tmp_path)
        guarded.log({}, 1)
        assert not guarded.is_off
        guarded.event("rewind", "text", 1)
        guarded.log({}, 2)
        guarded.finish({})
    assert guarded.is_off
    assert broken.num_calls == 3
    assert len(caplog.records) == 4
    assert "BrokenTracker.start failed (1 of 3): ConnectionError: no route" in caplog.text
    assert "switched off" in caplog.records[-1].message


def test_guard_lets_an_interrupt_through(tmp_path: Path) -> None:
    class Interrupted(BrokenTracker):
        def _break(self) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        GuardedTracker(Interrupted()).finish({})


def test_jsonl_tracker_continues_the_file_after_a_restart(tmp_path: Path) -> None:
    for clock in (1, 2):
        tracker = JsonlTracker()
        tracker.start({}, "name", "id", tmp_path)
        tracker.log({"loss_nats": float("nan"), "verdict": "ok", "step": clock}, clock)
        tracker.event("stop", "text", clock)
        tracker.finish({})
    records = read_json_lines(tmp_path / "metrics.jsonl").records
    assert [record["clock"] for record in records] == [1, 2]
    assert records[0]["loss_nats"] is None


def test_held_out_losses_do_not_take_the_place_of_a_step_in_the_file(tmp_path: Path) -> None:
    tracker = JsonlTracker()
    tracker.start({}, "name", "id", tmp_path)
    for clock in (1, 2):
        tracker.log({"loss_nats": 3.0, "step": clock}, clock)
        tracker.log({"validation_loss_nats": 3.5, "validation_loss_nats/web": 3.5}, clock)
    tracker.log({"validation_loss_nats": 3.5}, 3)
    tracker.finish({})
    curve = read_run(tmp_path).curve
    assert curve == tuple({"clock": at, "step": at, "loss_nats": 3.0} for at in (1, 2))


@pytest.mark.parametrize("kind", ["swanlab", "wandb", "jsonl"])
def test_logging_before_start_says_so(kind: str) -> None:
    if kind == "jsonl":
        with pytest.raises(RuntimeError, match="start"):
            JsonlTracker().log({}, 1)
        return
    config = TrackerConfig(kind=TrackerKind[kind], mode="offline")
    guarded = build_trackers(config)[1]
    assert isinstance(guarded, GuardedTracker)
    guarded.log({"loss_nats": 1.0}, 1)
    guarded.finish({})
    assert guarded.num_errors == 1


def test_only_finite_numbers_reach_a_chart() -> None:
    metrics = {"a": 1, "b": 0.5, "c": True, "d": "ok", "e": None, "f": float("inf")}
    assert numeric(metrics) == {"a": 1.0, "b": 0.5}


def test_no_tracker_still_writes_the_run_folder() -> None:
    assert len(build_trackers(TrackerConfig())) == 1


def test_mode_of_another_tracker_is_refused_with_the_right_ones() -> None:
    with pytest.raises(ValueError, match="use local or offline or cloud or disabled"):
        TrackerConfig(kind=TrackerKind.swanlab, mode="online")
    with pytest.raises(ValueError, match="project is empty"):
        TrackerConfig(project="")


def test_unknown_config_key_is_refused() -> None:
    adapter = TypeAdapter(TrackerConfig)
    found = adapter.validate_python({"kind": "wandb", "mode": "offline"})
    assert found == TrackerConfig(kind=TrackerKind.wandb, mode="offline")
    with pytest.raises(ValidationError, match="entity"):
        adapter.validate_python({"kind": "wandb", "mode": "offline", "entity": "x"})


def test_dashboard_command_names_the_folder_that_the_tracker_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("swanlab", "wandb"):
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    folder = Path("runs/my run")
    swanlab = TrackerConfig(kind=TrackerKind.swanlab, mode="local")
    wandb = TrackerConfig(kind=TrackerKind.wandb, mode="offline")
    assert dashboard_command(swanlab, folder) == "swanlab watch 'runs/my run'/swanlog"
    assert dashboard_command(wandb, folder) == "wandb sync 'runs/my run'/wandb/offline-run-*"
    assert dashboard_command(TrackerConfig(), folder) is None


def test_dashboard_command_works_where_the_environment_is_not_activated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    command = dashboard_command(TrackerConfig(kind=TrackerKind.swanlab, mode="local"), Path("x"))
    assert command == f"{Path(sys.executable).with_name('swanlab')} watch x/swanlog"


def read_swanlab(folder: Path) -> dict[int, list[float]]:
    """What one local run keeps of each clock, charts in the order of their first values."""
    found: dict[int, list[float]] = {}
    for path in sorted(folder.glob("swanlog/run-*/logs/*/*.log")):
        for record in read_json_lines(path).records:
            found.setdefault(int(str(record["index"])), []).append(float(str(record["data"])))
    return found


def read_wandb(folder: Path) -> dict[int, list[float]]:
    """What one offline run keeps of each clock, by the names of the charts.

    Source of the format: LevelDB, doc/log_format.md, behind a header of 7 bytes.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    data, at, found = path.read_bytes(), 7, {}
    while at < len(data):
        assert at % 32_768 <= 32_768 - 7, "the run fills more than a block"
        _, num_bytes, _ = struct.unpack("<IHB", data[at : at + 7])
        record = Record.FromString(data[at + 7 : at + 7 + num_bytes])
        at += 7 + num_bytes
        if record.HasField("history"):
            items = {item.key or "/".join(item.nested_key): item for item in record.history.item}
            names = sorted(name for name in items if name[0] != "_" and name not in ("clock",))
            values = [float(items[name].value_json) for name in names]
            found[record.history.step.num] = values
    return found


@pytest.mark.parametrize(
    ("kind", "mode", "expected"),
    [
        # loss_nats, step, validation_loss_nats, its web, events/rewind
        ("swanlab", "local", {1: [1.0, 1.0], 2: [0.5, 2.0, 4.0, 6.0], 3: [1 / 3, 3.0, 7.0, 1.0]}),
        # events/rewind, loss_nats, step, validation_loss_nats, its web
        ("wandb", "offline", {1: [1.0, 1.0], 2: [0.5, 2.0, 4.0, 6.0], 3: [1.0, 1 / 3, 3.0, 7.0]}),
    ],
)
def test_tracker_keeps_what_comes_twice_at_a_clock(
    tmp_path: Path, kind: str, mode: str, expected: dict[int, list[float]]
) -> None:
    pytest.importorskip(kind)
    done = run_tracker(tmp_path, kind, mode)
    assert (done.returncode, done.stderr) == (0, "")
    read = {"swanlab": read_swanlab, "wandb": read_wandb}[kind]
    assert read(tmp_path) == expected


@pytest.mark.parametrize(
    ("kind", "mode", "pattern"),
    [
        ("swanlab", "local", "swanlog/run-*/run-a1b2.swanlab"),
        ("swanlab", "offline", "swanlog/run-*/run-a1b2.swanlab"),
        ("wandb", "offline", "wandb/offline-run-*/run-a1b2.wandb"),
    ],
)
def test_tracker_runs_and_restarts_without_a_network(
    tmp_path: Path, kind: str, mode: str, pattern: str
) -> None:
    pytest.importorskip(kind)
    for _ in range(2):
        done = run_tracker(tmp_path, kind, mode)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == [], "the SDK printed, or tried to reach the network"
    assert len(list(tmp_path.glob(pattern))) == 2
    assert len(read_json_lines(tmp_path / "metrics.jsonl").records) == 6
