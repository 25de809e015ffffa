"""Held-out samples of each source, in an order of their own that never changes.

Owns which samples are evaluated. They come from the split that preparation held out, or, where
the files have none, from the end of the tokens, which training then leaves alone. The same for
every seed, so runs can be compared. Called by the loop on all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from train.data.layout import DocumentLayout
from train.data.order import SampleOrder
from train.data.samples import Samples
from train.data.store import check_vocabulary

_ORDER_SEED = 0


class Evaluator(Protocol):
    """What can be evaluated: an engine."""

    def evaluate(
        self, rows: npt.NDArray[np.integer], layout: DocumentLayout | None = None
    ) -> float:
        """Return the mean loss in nats a token of `rows`. A collective."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Held-out losses in nats a token: of each source, and of all their tokens together."""

    loss_nats: float
    by_source: Mapping[str, float]


class HeldOut:
    """The held-out samples of one source: the first `count` of them in a fixed order.

    `start`, `stop`: which of `samples` are held out.
    """

    def __init__(self, samples: Samples, *, start: int, stop: int, count: int) -> None:
        self._samples = samples
        num_samples = stop - start
        order = SampleOrder(num_samples=max(1, num_samples), seed=_ORDER_SEED, key="validation")
        chosen = np.arange(min(count, num_samples), dtype=np.int64)
        self._numbers = start + order.samples(chosen)

    def __len__(self) -> int:
        return len(self._numbers)

    def read(self) -> tuple[npt.NDArray[np.integer], DocumentLayout | None]:
        """Return the rows, [n, sequence_length + 1], and their documents if they are told apart."""
        samples = self._samples
        rows = np.empty((len(self), samples.sample_tokens), dtype=samples.dtype)
        samples.read(self._numbers, rows)
        return rows, samples.layout(self._numbers)

    def check(self, vocab_size: int, name: str) -> None:
        """Read the samples once. Raises: DataError if a token is none of the vocabulary."""
        rows, _ = self.read()
        check_vocabulary(rows, vocab_size, f"the held-out samples of source {name}")

    def is_bad(self) -> bool:
        """Return whether a sample touches files that are missing or damaged."""
        return bool(self._samples.bad(self._numbers).any())

    def num_predictions(self) -> int:
        """Return how many tokens are predicted."""
        return self._samples.num_predictions(self._numbers)


class Validation:
    """What is evaluated, and when: every `interval_steps` steps, and at the end of a run."""

    def __init__(self, sources: Mapping[str, HeldOut], *, interval_steps: int | None) -> None:
        self._sources = {name: held_out for name, held_out in sources.items() if len(held_out)}
        self._interval_steps = interval_steps

    @property
    def has_samples(self) -> bool:
        """Whether anything is held out."""
        return bool(self._sources)

    def check(self, vocab_size: int) -> None:
        """Read all of it once, so that nothing is found wrong at the end of a run.

        Raises: DataError.
        """
        for name, held_out in self._sources.items():
            held_out.check(vocab_size, name)

    def is_due(self, step: int) -> bool:
        """Return whether the state after `step` updates is to be evaluated."""
        if self._interval_steps is None or not self.has_samples:
            return False
        return step % self._interval_steps == 0

    def evaluate(self, engine: Evaluator) -> Evaluation:
        """Return the losses of the present state. A collective, and a host sync."""
        losses = {}
        for name, held_out in self._sources.items():
            rows, layout = held_out.read()
            losses[name] = engine.evaluate(rows, layout)
        weights = {name: held_out.num_predictions() for name, held_out in self._sources.items()}
        total = sum(loss * weights[name] for name, loss in losses.items())
        return Evaluation(loss_nats=total / sum(weights.values()), by_source=losses)
