"""Play a scenario and judge it against a run that nobody disturbed: state, losses, samples."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

from .processes import Recipe
from .runner import NotRecoveredError, Reference, Result, Scene, make_reference
from .samples import losses, read_records
from .scenarios import DDP, SINGLE, Scenario
from .state import digest

# What another number of ranks leaves of a loss: sums in another order, over hundreds of steps.
LOSS_TOLERANCE = 2e-2
_MAX_WORDS = 110


class References:
    """The undisturbed runs, each made once. How long is waited makes no difference."""

    def __init__(self, work: Path) -> None:
        self._work = work
        self._made: dict[object, Reference] = {}

    def of(self, recipe: Recipe) -> Reference:
        patience = ("engine.timeout", "health.")
        arguments = [text for text in recipe.arguments if not text.startswith(patience)]
        key = (recipe.num_ranks, *arguments)
        if key not in self._made:
            plain = (SINGLE if recipe.num_ranks == 1 else DDP).with_arguments(*arguments)
            folder = self._work / f"undisturbed-{len(self._made)}" / "run"
            self._made[key] = make_reference(plain, folder)
        return self._made[key]


def play(scenario: Scenario, work: Path, references: References) -> Result:
    """Play one scenario in a folder of its own below `work`."""
    result = Result(name=scenario.name, done=scenario.done, engine=scenario.recipe.name)
    result.skipped = scenario.missing()
    if result.skipped:
        return result
    reference = references.of(scenario.recipe)
    started = time.monotonic()
    try:
        with scenario.build(scenario.recipe, work / scenario.name / "run") as scene:
            try:
                scene.start()
                scenario.act(scene)
            except NotRecoveredError as error:
                scene.problems.append(str(error))
            finally:
                scene.close()
            judge(scene, reference, result, is_bit_equal=scenario.is_bit_equal)
    except OSError as error:  # no right to mount, or to make a network
        result.skipped = f"not possible here: {error}"
        return result
    if result.steps_lost is not None and result.steps_lost > scenario.max_steps_lost:
        result.problems.append(f"{result.steps_lost} steps lost")
    result.wall_seconds = time.monotonic() - started
    return result


def judge(scene: Scene, reference: Reference, result: Result, *, is_bit_equal: bool) -> None:
    """Write into `result` what came of a scene that is over."""
    struck = scene.struck or 0.0
    if scene.detected is not None:
        result.detect_seconds = scene.detected - struck
    result.recover_seconds = scene.recover_seconds()
    result.steps_lost = scene.steps_lost()
    found = scene.account(reference)
    result.samples = asdict(found)
    result.happened = tell(scene)
    result.problems += scene.problems
    if not scene.is_complete:
        return
    for what, number in (("trained twice", found.twice), ("skipped", found.skipped)):
        if number:
            result.problems.append(f"{number} samples {what}")
    result.is_bit_equal = digest(scene.checkpoints[-1]) == reference.digest
    if is_bit_equal and not result.is_bit_equal:
        result.problems.append("the final state is another one")
    ours = losses(read_records(scene.folder / "metrics.jsonl"))
    tolerance = 0.0 if is_bit_equal else LOSS_TOLERANCE
    different = [
        step for step, loss in ours.items() if abs(loss - reference.losses[step]) > tolerance
    ]
    if different:
        result.problems.append(f"the losses differ from step {different[0]} on")


def tell(scene: Scene) -> str:
    """Return what happened, in a few words."""
    parts = list(scene.notes)
    began = scene.starts()
    if len(began) > 1:
        by = "the same command" if scene.num_commands > 1 else "torchrun"
        steps = ", ".join(map(str, began[1:]))
        parts.append(f"{by} started it again, from step {steps} (struck at {scene.step_struck})")
    said = [words for words in scene.spoken() if words]
    if said:
        words = said[0].replace(str(scene.folder), "RUN")
        parts.append(f'"{words[:_MAX_WORDS]}"')
    return "; ".join(parts) or "went on as if nothing had been"
