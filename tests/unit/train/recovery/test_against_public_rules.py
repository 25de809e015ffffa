"""Where the public rules fail, ours holds. Each test asserts both, on the same numbers."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.public_rules import (
    FoundryKillLossSpike,
    LightningSpikeDetection,
    MegatronSpikyLoss,
    MetaseqRatio,
    OlmoSkipStep,
    Rule,
)
from train.distributed import World
from train.engines.build import build_engine
from train.recovery.detector import (
    CALM_KINDS,
    ROLLBACK_KINDS,
    SpikeDetector,
    Verdict,
    VerdictKind,
    default_detector,
)
from train.signals import Gate, StepSignals

LEVEL, NOISE = 2.5, 0.02
NUM_CLEAN = 200
TINY = [
    "engine=single",
    "model.hidden_size=32",
    "model.num_layers=2",
    "model.num_heads=2",
    "data.sequence_length=16",
    "tokenizer=bytes",
    "tokenizer.vocab_size=257",
]


def around(level: float, count: int, *, seed: int = 0) -> list[float]:
    """Return the losses of a calm run."""
    noise = random.Random(seed)
    return [level * math.exp(noise.gauss(0, NOISE)) for _ in range(count)]


def kinds(rule: Rule, losses: Iterable[float], *, first_step: int = 1) -> list[VerdictKind]:
    """Return what a rule, or our detector, makes of each loss; the gradient norm is always calm."""
    answers = [rule.update(step, loss, 1.0) for step, loss in enumerate(losses, start=first_step)]
    return [answer.kind if isinstance(answer, Verdict) else answer for answer in answers]


def is_flagged(kind: VerdictKind) -> bool:
    return kind not in CALM_KINDS


def adamw_times_zero(parameter: torch.Tensor, gradient: torch.Tensor, factor: float) -> None:
    """Take one AdamW step that is "skipped" by a factor of 0, without moments from before."""
    mean = torch.zeros_like(parameter).lerp_(gradient, factor * 0.1)
    square = torch.zeros_like(parameter).add_(factor * gradient * gradient, alpha=0.05)
    update = mean / (square.sqrt() + 1e-8)
    parameter.add_(update * factor, alpha=-1e-3)


def test_nan_gradient_passes_an_update_times_zero_and_does_not_pass_the_veto(
    compose_config: Callable[..., Any],
) -> None:
    theirs = torch.ones(8)
    adamw_times_zero(theirs, torch.full((8,), math.nan), factor=0.0)
    assert torch.isnan(theirs).all(), "0 times NaN is NaN"

    torch.manual_seed(0)
    config, _ = compose_config(TINY)
    engine = build_engine(config, World(rank=0, size=1, device=torch.device("cpu")))
    rows = np.random.default_rng(0).integers(0, 257, (4, 17))
    engine.step(rows, num_tokens=64, lr=1e-3, gate=Gate())  # so that there are moments, too
    before = {name: value.clone() for name, value in engine.model.state_dict().items()}
    moments = [
        value.clone() for state in engine.optimizer.state.values() for value in state.values()
    ]
    hook = next(engine.model.parameters()).register_hook(lambda grad: grad * math.nan)
    vector = engine.step(rows, num_tokens=64, lr=1e-3, gate=Gate())
    hook.remove()
    assert StepSignals.from_vector(vector.tolist()).is_vetoed
    after = engine.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    now = [value for state in engine.optimizer.state.values() for value in state.values()]
    assert all(torch.equal(one, other) for one, other in zip(moments, now, strict=True))


def test_one_nan_freezes_the_next_128_clean_steps_of_skip_step_and_none_of_ours() -> None:
    losses = [*around(LEVEL, NUM_CLEAN), math.nan, *around(LEVEL, NUM_CLEAN, seed=1)]
    theirs = kinds(OlmoSkipStep(), losses)[NUM_CLEAN + 1 :]
    assert sum(map(is_flagged, theirs)) >= 128
    assert all(map(is_flagged, theirs[:128]))

    detector = default_detector()
    ours = kinds(detector, losses[: NUM_CLEAN + 1])
    assert ours[-1] is VerdictKind.NONFINITE
    for step, loss in enumerate(losses[NUM_CLEAN + 1 :], start=NUM_CLEAN + 2):
        max_loss, max_norm = detector.limits()
        assert loss <= max_loss and max_norm >= 1.0, "the device would have refused it"
        assert not is_flagged(detector.update(step, loss, 1.0).kind)


def test_plateau_is_let_in_after_four_steps_by_skip_step_and_then_hides_a_lone_spike() -> None:
    plateau, calm = around(5.0, 12, seed=1), around(LEVEL, 20, seed=2)
    losses = [*around(LEVEL, NUM_CLEAN), *plateau, *calm, 4.5]
    theirs, ours = kinds(OlmoSkipStep(), losses), kinds(default_detector(), losses)
    within = slice(NUM_CLEAN, NUM_CLEAN + len(plateau))
    assert sum(map(is_flagged, theirs[within])) <= 4
    assert not is_flagged(theirs[-1]), "its own spike has widened its band"

    assert sum(map(is_flagged, ours[within])) == len(plateau)
    assert sum(kind in ROLLBACK_KINDS for kind in ours[within]) >= len(plateau) - 2
    assert is_flagged(ours[-1])


@pytest.mark.parametrize("height", [5.2, 6.0, 7.0])
def test_jump_from_two_and_a_half_to_six_passes_a_rule_of_factor_three(height: float) -> None:
    losses = [*around(LEVEL, NUM_CLEAN), *around(height, 6, seed=1)]
    theirs, ours = kinds(LightningSpikeDetection(), losses), kinds(default_detector(), losses)
    assert not any(map(is_flagged, theirs))

    assert VerdictKind.SPIKE in ours[NUM_CLEAN : NUM_CLEAN + 3]


def test_ten_times_the_first_hundred_losses_needs_a_hundred_and_eight_nats() -> None:
    first = [10.8 * math.exp(-0.02 * step) for step in range(100)]
    calm = around(LEVEL, NUM_CLEAN)
    losses = [*first, *calm, *[107.0] * 6]
    theirs, ours = kinds(MegatronSpikyLoss(), losses), kinds(default_detector(), losses)
    assert not any(map(is_flagged, theirs)), "forty times the level is no spike to it"
    assert kinds(MegatronSpikyLoss(), [*first, *calm, 108.1])[-1] is VerdictKind.SPIKE

    assert VerdictKind.SPIKE in ours[-6:-3]


@pytest.mark.parametrize(
    "fresh", [OlmoSkipStep, MegatronSpikyLoss, lambda: FoundryKillLossSpike(2.0)]
)
def test_baseline_that_is_not_in_the_checkpoint_is_blind_after_a_resume(
    fresh: Callable[[], Rule],
) -> None:
    """A spike five steps after a resume: of theirs, a new instance is all that there is."""
    before, after = around(LEVEL, NUM_CLEAN), [*around(LEVEL, 5, seed=1), *around(6.0, 6, seed=2)]
    assert not hasattr(fresh(), "state_dict")
    assert not any(map(is_flagged, kinds(fresh(), after, first_step=NUM_CLEAN + 1)))

    saved = default_detector()
    kinds(saved, before)
    resumed = default_detector()
    resumed.load_state_dict(json.loads(json.dumps(saved.state_dict())))
    resumed.resumed()
    ours = kinds(resumed, after, first_step=NUM_CLEAN + 1)
    assert not any(map(is_flagged, ours[:5]))
    assert VerdictKind.SPIKE in ours[5:8]


def test_lasting_level_is_skipped_for_ever_by_a_ratio_and_accepted_by_ours() -> None:
    """No update is taken any more, although nothing is wrong."""
    losses = [*around(LEVEL, NUM_CLEAN), *around(3.5, 300, seed=1)]
    theirs = kinds(MetaseqRatio(), losses)[NUM_CLEAN:]
    assert all(map(is_flagged, theirs))

    detector = SpikeDetector()
    ours = kinds(detector, losses)[NUM_CLEAN:]
    assert VerdictKind.LEVEL_SHIFT in ours[: detector.max_flagged_steps + 1]
    assert not any(map(is_flagged, ours[detector.max_flagged_steps + 1 :]))


def test_ranks_that_judge_their_own_loss_disagree_and_those_that_judge_the_mean_do_not() -> None:
    """One rank alone would leave; the others would wait for it."""
    good, bad = around(LEVEL, NUM_CLEAN + 8), around(LEVEL, NUM_CLEAN)
    bad += around(3 * LEVEL, 8, seed=1)
    theirs = [kinds(FoundryKillLossSpike(2.0), losses) for losses in (good, bad)]
    assert [VerdictKind.SPIKE in verdicts for verdicts in theirs] == [False, True]

    means = [(one + other) / 2 for one, other in zip(good, bad, strict=True)]
    ours = [kinds(default_detector(), means) for _ in range(2)]
    assert ours[0] == ours[1]
    assert VerdictKind.SPIKE in ours[0][NUM_CLEAN : NUM_CLEAN + 3]
