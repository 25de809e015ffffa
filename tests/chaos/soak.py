"""A soak: one run, struck again and again at random, ends as the run that nobody touched.

What is done when is drawn from a seed, so a soak that fails can be played again; when exactly a
blow falls within a step is up to the machine.
"""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from . import damage
from .play import References, judge
from .processes import Recipe, send
from .runner import POLL_SECONDS, NotRecoveredError, Result, Scene

IN_START = "kill -9 in a start"
SECONDS_A_FAULT = 60.0
START_SECONDS = 6.0
FROZEN_SECONDS = 1.0
MAX_STEPS_BETWEEN = 6
# About 10 ms a step: starting takes most of the time. A stretch of its data is foreign, so that
# some of the blows fall on a recovery.
TINY = (
    "model.hidden_size=32",
    "data.sequence_length=32",
    "schedule.batch_samples=8",
    "schedule.batch_ramp_start_samples=4",
    "schedule.batch_ramp_steps=4",
    "checkpoint.interval_steps=5",
    "checkpoint.good_after_steps=3",
    "recovery.skip=10 batches",
    "recovery.margin=0 batches",
    "recovery.threshold_sigma=4",  # 256 tokens a step are few to know the noise from
    "recovery.step_scale=1",
    "recovery.token_scale=1",
    "health.max_same_failures=0",  # a soak is a crash loop
    "chaos=bad_data",
    "chaos.start=60 batches",
    "chaos.length=8 batches",
)


@dataclass(slots=True, kw_only=True)
class Soak:
    """A run under fire: its scene, its dice, and what has been done so far."""

    scene: Scene
    dice: random.Random
    done: Counter[str] = field(default_factory=Counter)
    num_orphaned: int = 0
    back_seconds: list[float] = field(default_factory=list)

    def advance(self, steps: int) -> None:
        """Return when `steps` more have been reported; what has ended is started again."""
        scene = self.scene
        goal, begun = len(scene.metrics) + steps, time.monotonic()
        while len(scene.metrics) < goal:
            scene.poll()
            if scene.launch.exit_code == 0:
                raise NotRecoveredError(f"the run was over after {self.done.total()} faults")
            if scene.launch.exit_code is not None:
                self.start_again()
            if time.monotonic() - begun > SECONDS_A_FAULT:
                raise NotRecoveredError(f"no step for a minute: {scene.last_words()}")
            time.sleep(POLL_SECONDS / 4)
        self.back_seconds.append(time.monotonic() - begun)
        scene.poll(is_thorough=True)

    def start_again(self) -> None:
        """Start the same command, once nothing of the start before is left."""
        num_problems = len(self.scene.problems)
        self.scene.await_ends(seconds=5.0)
        if len(self.scene.problems) > num_problems:
            del self.scene.problems[num_problems:]
            self.num_orphaned += 1
        self.scene.launch.process.wait(timeout=10)
        self.scene.start()

    def kill(self) -> None:
        """SIGKILL to everything, and start again."""
        self.scene.kill(with_launcher=True)
        self.start_again()


Fault = Callable[[Soak], None]


def _kill_all(soak: Soak) -> None:
    soak.kill()


def _kill_in_save(soak: Soak) -> None:
    """Wait for the next save to begin, for a few steps at most."""
    folder, until = soak.scene.folder / "checkpoints", time.monotonic() + 2.0
    while time.monotonic() < until and not any(folder.glob(".saving-*")):
        time.sleep(0.001)
    time.sleep(soak.dice.uniform(0.0, 0.02))
    soak.kill()


def _freeze(soak: Soak) -> None:
    """SIGSTOP to all ranks, and SIGCONT a little later."""
    pids = list(soak.scene.ranks.values())
    send(signal.SIGSTOP, *pids)
    time.sleep(soak.dice.uniform(0.0, FROZEN_SECONDS))
    send(signal.SIGCONT, *pids)


def _end(soak: Soak) -> None:
    """SIGTERM, and however long it takes."""
    send(signal.SIGTERM, soak.scene.launch.pid)
    try:
        soak.scene.launch.process.wait(timeout=SECONDS_A_FAULT)
    except subprocess.TimeoutExpired as error:
        raise NotRecoveredError("no end a minute after SIGTERM") from error
    soak.start_again()


def _damaged(damages: Callable[[Path], object]) -> Fault:
    def act(soak: Soak) -> None:
        soak.scene.kill(with_launcher=True)
        *older, newest = damage.whole(soak.scene.checkpoints)
        if any(damage.is_good(checkpoint) for checkpoint in older):  # one to go back to
            damages(newest)
        soak.start_again()

    return act


def _torn(name: str) -> Fault:
    def act(soak: Soak) -> None:
        soak.scene.kill(with_launcher=True)
        damage.tear_line(soak.scene.folder / name)
        soak.start_again()

    return act


def _kill_rank(soak: Soak) -> None:
    """SIGKILL to one rank: torchrun starts all of them again."""
    soak.scene.kill(rank=soak.dice.choice(sorted(soak.scene.ranks)))


def _kill_ranks(soak: Soak) -> None:
    soak.scene.kill()


def _kill_launcher(soak: Soak) -> None:
    send(signal.SIGKILL, soak.scene.launch.pid)
    soak.scene.launch.process.wait(timeout=10)
    soak.start_again()


FAULTS: dict[str, Fault] = {
    "kill -9 of all": _kill_all,
    IN_START: _kill_all,
    "kill -9 in a save": _kill_in_save,
    "SIGTERM": _end,
    "frozen a while": _freeze,
    "byte flipped": _damaged(damage.flip_byte),
    "shard cut": _damaged(damage.truncate_shard),
    "manifest gone": _damaged(damage.remove_manifest),
    "half renamed": _damaged(damage.half_rename),
    "torn metrics": _torn("metrics.jsonl"),
    "torn events": _torn("events.jsonl"),
    "torn journal": _torn("journal.jsonl"),
}
WITH_RANKS: dict[str, Fault] = {
    "kill -9 of a rank": _kill_rank,
    "kill -9 of the ranks": _kill_ranks,
    "kill -9 of torchrun": _kill_launcher,
}


def recipe_of(num_ranks: int, num_faults: int) -> Recipe:
    """Return a command long enough for that many faults."""
    plain = Recipe(
        name="single" if num_ranks == 1 else f"ddp, {num_ranks} ranks",
        num_ranks=num_ranks,
        is_launched=num_ranks > 1,
        max_restarts=10 * num_faults,
    )
    steps = MAX_STEPS_BETWEEN * num_faults + 100
    return plain.with_arguments(*TINY, f"run.steps={steps}")


def soak(
    num_ranks: int,
    num_faults: int,
    work: Path,
    references: References,
    *,
    seed: int,
    tell: Callable[[str], None],
) -> Result:
    """Strike one run `num_faults` times and return how it ended."""
    recipe = recipe_of(num_ranks, num_faults)
    name = f"soak_{'single' if num_ranks == 1 else 'ddp'}"
    result = Result(name=name, done=f"{num_faults} random faults in one run", engine=recipe.name)
    reference = references.of(recipe)
    started = time.monotonic()
    limit = 120 + num_faults * SECONDS_A_FAULT
    scene = Scene(recipe, work / name / "run", limit_seconds=limit)
    under_fire = Soak(scene=scene, dice=random.Random(seed))
    faults = {**FAULTS, **(WITH_RANKS if num_ranks > 1 else {})}
    try:
        scene.start()
        for number in range(num_faults):
            kind = under_fire.dice.choice(sorted(faults))
            if kind == IN_START:
                time.sleep(under_fire.dice.uniform(0.05, START_SECONDS))
            else:
                under_fire.advance(under_fire.dice.randint(1, MAX_STEPS_BETWEEN))
            tell(f"fault {number + 1} of {num_faults}: {kind}, step {scene.step}")
            faults[kind](under_fire)
            under_fire.done[kind] += 1
        under_fire.advance(1)
        scene.num_commands = 0
        scene.finish()
    except NotRecoveredError as error:
        scene.problems.append(str(error))
    finally:
        scene.close()
    judge(scene, reference, result, is_bit_equal=True)
    counts = ", ".join(f"{count} x {kind}" for kind, count in sorted(under_fire.done.items()))
    orphaned = under_fire.num_orphaned
    outlived = f"; ranks outlived torchrun {orphaned} times" if orphaned else ""
    result.happened = (
        f"seed {seed}: {counts}; {len(scene.starts())} starts{outlived}; "
        f"{result.samples['in_ledger'] if result.samples else 0} samples in the ledger"
    )
    result.recover_seconds = median(under_fire.back_seconds) if under_fire.back_seconds else None
    result.wall_seconds = time.monotonic() - started
    return result
