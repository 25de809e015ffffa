"""The faults, each one small function, and what a run has to come to in spite of it.

`python -m tests.chaos --only NAME` plays one. A scenario that needs a program or a right that is
not there is skipped, and says what it needs.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from . import damage
from .hosts import run, two_hosts
from .processes import Recipe, send
from .runner import Scene

STRIKE_STEP = 95  # fifteen steps behind a checkpoint
INTERVAL_STEPS = 20
MEANWHILE_SECONDS = 8.0
CLOCK = Path(__file__).with_name("clock.c")
HOST_TOOLS = ("ip",)

SINGLE = Recipe(name="single", num_ranks=1, is_launched=False)
DDP = Recipe(name="ddp, 2 ranks")
SHORT_TIMEOUT = DDP.with_arguments(
    "engine.timeout_seconds=30", "health.hang_seconds=8", "health.heartbeat_seconds=1"
)
TWO_HOSTS = Recipe(
    name="ddp, 2 hosts", num_hosts=2, rendezvous=("--nnodes=2", "--rdzv-id=chaos"), max_restarts=10
)
ELASTIC = replace(TWO_HOSTS, rendezvous=("--nnodes=1:2", "--rdzv-id=chaos")).with_arguments(
    "engine.timeout_seconds=8", "run.steps=1600"
)
OVER_THE_NETWORK = {
    "GLOO_SOCKET_IFNAME": "eth0",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # without it, torch 2.13 cannot take a host back
}

Build = Callable[[Recipe, Path], AbstractContextManager[Scene]]
Act = Callable[[Scene], None]


@contextmanager
def _plain(recipe: Recipe, folder: Path) -> Iterator[Scene]:
    yield Scene(recipe, folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One fault. `done` is what is done; `max_steps_lost` is what may be trained once more.

    `is_bit_equal`: the final state has to be that of the run that nobody disturbed. `build`: makes
    the surroundings of the scene. `needs`: programs, each as `PROGRAM` or `PROGRAM:PACKAGE`.
    """

    name: str
    done: str
    act: Act
    recipe: Recipe = DDP
    build: Build = _plain
    needs: tuple[str, ...] = ()
    is_quick: bool = False
    is_bit_equal: bool = True
    max_steps_lost: int = 2 * INTERVAL_STEPS  # a save may still be on its way to the disk

    def shorter(self, num_steps: int) -> Scenario:
        """Return the same fault in a run of so many steps."""
        return replace(self, recipe=self.recipe.with_arguments(f"run.steps={num_steps}"))

    def missing(self) -> str:
        """Return what is not installed and how to get it; empty if nothing is missing."""
        lacking = [need.split(":") for need in self.needs if not shutil.which(need.split(":")[0])]
        names = ", ".join(program for program, *_ in lacking)
        packages = " ".join(package[0] if package else name for name, *package in lacking)
        return f"needs {names} (apt-get install {packages})" if lacking else ""


# Surroundings.


@contextmanager
def on_small_disk(recipe: Recipe, folder: Path) -> Iterator[Scene]:
    with damage.small_disk(folder.parent / "small", "64m"):
        yield Scene(recipe, folder.parent / "small" / folder.name)


@contextmanager
def with_false_clock(recipe: Recipe, folder: Path) -> Iterator[Scene]:
    """A clock that can be set within the processes of the run alone: see clock.c."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    offset, library = (folder.parent / f"{folder.name}.{kind}" for kind in ("clock", "so"))
    offset.write_text("0\n")
    compiler = ["cc", "-O1", "-shared", "-fPIC", "-o", str(library), str(CLOCK), "-ldl"]
    run(*compiler)
    environment = {"LD_PRELOAD": str(library), "CHAOS_CLOCK": str(offset)}
    yield Scene(recipe, folder, environment=environment)


@contextmanager
def on_two_hosts(recipe: Recipe, folder: Path) -> Iterator[Scene]:
    with two_hosts() as hosts:
        yield Scene(
            recipe, folder, places=hosts.places(), environment=OVER_THE_NETWORK, hosts=hosts
        )


@contextmanager
def behind_a_relay(recipe: Recipe, folder: Path) -> Iterator[Scene]:
    with two_hosts() as hosts, hosts.delay(0.01):
        yield Scene(recipe, folder, places=hosts.places(), environment=OVER_THE_NETWORK)


# Kills.


def kill_one_rank(scene: Scene) -> None:
    scene.reach(STRIKE_STEP)
    scene.strike()
    scene.kill(rank=1)
    scene.finish()


def kill_rank_0(scene: Scene) -> None:
    scene.reach(STRIKE_STEP)
    scene.strike()
    scene.kill(rank=0)
    scene.finish()


def kill_all_ranks(scene: Scene) -> None:
    scene.reach(STRIKE_STEP)
    scene.strike()
    scene.kill()
    scene.finish()


def kill_launcher(scene: Scene) -> None:
    scene.reach(STRIKE_STEP)
    scene.strike()
    send(signal.SIGKILL, scene.launch.pid)
    scene.finish()


def kill_everything(scene: Scene) -> None:
    scene.reach(STRIKE_STEP)
    scene.strike()
    scene.kill(with_launcher=True)
    scene.finish()


def stop_one_rank(scene: Scene) -> None:
    scene.reach(STRIKE_STEP)
    scene.strike()
    send(signal.SIGSTOP, scene.ranks[1])
    scene.finish()


def end_with_grace(scene: Scene) -> None:
    scene.reach(STRIKE_STEP)
    scene.strike()
    send(signal.SIGTERM, scene.launch.pid)
    scene.finish()


# Disks.


def _damaged(damages: Callable[[Path], str]) -> Act:
    """Kill everything, damage the newest checkpoint, start the same command again."""

    def act(scene: Scene) -> None:
        scene.reach(STRIKE_STEP)
        scene.kill(with_launcher=True)
        scene.strike(shows_in_words=True)
        newest = damage.whole(scene.checkpoints)[-1]
        scene.notes.append(f"{damages(newest)} of step {int(newest.name[5:13])}")
        scene.start()
        scene.finish()

    return act


def fill_disk_in_save(scene: Scene) -> None:
    scene.reach(STRIKE_STEP)
    scene.strike()
    ballast = scene.folder.parent / "ballast"
    damage.fill_disk(ballast, left_bytes=400_000)
    scene.reach(STRIKE_STEP + 2 * INTERVAL_STEPS)
    ballast.unlink()
    scene.relieve()
    scene.finish()
    said = "\n".join(scene.spoken())
    failed = dict.fromkeys(re.findall(r"checkpoint of step (\d+) could not be written", said))
    if not failed:
        scene.problems.append("no save failed: the disk was not full")
    scene.notes.append(f"the save of step {', '.join(failed)} failed, later ones did not")


# Clocks, cores and networks.


def _set_clock(offset: str) -> Act:
    def act(scene: Scene) -> None:
        scene.reach(STRIKE_STEP)
        scene.strike()
        (scene.folder.parent / f"{scene.folder.name}.clock").write_text(f"{offset}\n")
        scene.finish()
        counted = json.loads((scene.folder / "summary.json").read_text())["wall_seconds"]
        scene.notes.append(f"its summary counts {counted:,.0f} s")

    return act


def _slowed(begin: Callable[[Scene], Callable[[], None]]) -> Act:
    """Slow something down for a while; `begin` returns how to end it."""

    def act(scene: Scene) -> None:
        scene.reach(STRIKE_STEP)
        before = scene.median_step_seconds(0.0, float("inf"))
        scene.strike()
        end = begin(scene)
        scene.wait(MEANWHILE_SECONDS)
        end()
        meanwhile = scene.median_step_seconds(scene.struck or 0.0, float("inf"))
        scene.relieve()
        if before and meanwhile:
            scene.notes.append(f"steps took {meanwhile / before:.1f} times as long meanwhile")
        else:
            scene.notes.append(f"fewer than three steps in {MEANWHILE_SECONDS:.0f} s")
        scene.finish()

    return act


def _limit_core(scene: Scene) -> Callable[[], None]:
    limiter = subprocess.Popen(
        ["cpulimit", "--pid", str(scene.ranks[1]), "--limit", "15"], stdout=subprocess.DEVNULL
    )
    rank = scene.ranks[1]

    def end() -> None:
        limiter.terminate()
        limiter.wait()
        send(signal.SIGCONT, rank)

    return end


def _limit_bandwidth(scene: Scene) -> Callable[[], None]:
    assert scene.hosts is not None
    scene.hosts.limit_bandwidth("8mbit")
    return scene.hosts.free_bandwidth


def _lose_packets(scene: Scene) -> Callable[[], None]:
    assert scene.hosts is not None
    scene.hosts.lose_packets(0.05)
    return scene.hosts.lose_none


def from_the_start(scene: Scene) -> None:
    """Whatever it is, it is there from the start."""
    scene.finish()
    seconds = scene.median_step_seconds(0.0, float("inf")) or 0.0
    scene.notes.append(f"{1000 * seconds:.0f} ms a step from the first to the last")


def cut_off_host(scene: Scene) -> None:
    assert scene.hosts is not None
    scene.reach(STRIKE_STEP)
    scene.strike()
    scene.hosts.cut_off_two(is_cut=True)
    scene.wait(30.0)
    scene.notes.append(f"step {scene.step} when the host came back")
    scene.hosts.cut_off_two(is_cut=False)
    scene.relieve()
    scene.finish()


SCENARIOS = (
    Scenario(name="kill_one_rank", done="SIGKILL to rank 1", act=kill_one_rank, is_quick=True),
    Scenario(name="kill_rank_0", done="SIGKILL to rank 0", act=kill_rank_0),
    Scenario(name="kill_all_ranks", done="SIGKILL to all ranks", act=kill_all_ranks),
    Scenario(name="kill_launcher", done="SIGKILL to torchrun alone", act=kill_launcher),
    Scenario(name="kill_everything", done="SIGKILL to torchrun and all ranks", act=kill_everything),
    Scenario(
        name="stop_one_rank",
        done="SIGSTOP to rank 1, for good",
        act=stop_one_rank,
        recipe=SHORT_TIMEOUT,
    ),
    Scenario(
        name="end_with_grace",
        done="SIGTERM to torchrun",
        act=end_with_grace,
        max_steps_lost=0,
    ),
    Scenario(
        name="node_cut_off",
        done="the cable of host 2 out for 30 s, and in again",
        act=cut_off_host,
        recipe=ELASTIC,
        build=on_two_hosts,
        needs=HOST_TOOLS,
        is_bit_equal=False,
    ),
    Scenario(
        name="disk_full",
        done="the disk full for forty steps (tmpfs)",
        act=fill_disk_in_save,
        recipe=SINGLE,
        build=on_small_disk,
        needs=("mount",),
    ),
    *(
        Scenario(
            name=name,
            done=f"power loss, and {what} in the newest checkpoint",
            act=_damaged(damages),
            recipe=SINGLE,
            is_quick=damages is damage.flip_byte,
            max_steps_lost=3 * INTERVAL_STEPS,
        )
        for name, what, damages in (
            ("shard_truncated", "a shard cut in half", damage.truncate_shard),
            ("byte_flipped", "a bit flipped", damage.flip_byte),
            ("manifest_missing", "no manifest", damage.remove_manifest),
            ("half_renamed", "a folder half renamed", damage.half_rename),
        )
    ),
    *(
        Scenario(
            name=f"clock_{name}",
            done=f"the clock an hour {name} (a preloaded library)",
            act=_set_clock(offset),
            build=with_false_clock,
            needs=("cc:gcc",),
            max_steps_lost=0,
        )
        for name, offset in (("forward", "3600"), ("back", "-3600"))
    ),
    Scenario(
        name="slow_rank",
        done=f"rank 1 at 15% of a core for {MEANWHILE_SECONDS:.0f} s (cpulimit)",
        act=_slowed(_limit_core),
        needs=("cpulimit",),
        max_steps_lost=0,
    ),
    Scenario(
        name="slow_network",
        done=f"8 Mbit/s between two hosts for {MEANWHILE_SECONDS:.0f} s (tc)",
        act=_slowed(_limit_bandwidth),
        recipe=TWO_HOSTS,
        build=on_two_hosts,
        needs=(*HOST_TOOLS, "tc:iproute2"),
        max_steps_lost=0,
    ),
    Scenario(
        name="slow_answers",
        done="10 ms more each way between two hosts, all the time (a relay)",
        act=from_the_start,
        recipe=TWO_HOSTS,
        build=behind_a_relay,
        needs=(*HOST_TOOLS, "iptables"),
        max_steps_lost=0,
    ),
    Scenario(
        name="packet_loss",
        done=f"5% of packets lost between two hosts for {MEANWHILE_SECONDS:.0f} s (iptables)",
        act=_slowed(_lose_packets),
        recipe=TWO_HOSTS,
        build=on_two_hosts,
        needs=(*HOST_TOOLS, "iptables"),
        max_steps_lost=0,
    ),
)
