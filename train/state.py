"""Where a run stands: `TrainState` and `BatchRange`. Pure values; the loop alone makes new ones.

Step and data cursor are two numbers. A rewind moves the step back and the data forward.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRange:
    """`[start, stop)` in global sample indices.

    Invariant to batch size, number of ranks, accumulation and workers.
    """

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise ValueError(f"a range needs 0 <= start <= stop, found [{self.start}, {self.stop})")

    def __len__(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        return f"[{self.start}, {self.stop})"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainState:
    """Everything that moves with a run, apart from tensors.

    `step` counts updates, applied or vetoed, and drives the schedule. `cursor` is the index of the
    next sample in the global order. `clock` counts executed updates, never decreases, and is the
    x-axis of every tracker. `tokens_seen` counts tokens of the surviving lineage.
    """

    step: int = 0
    cursor: int = 0
    clock: int = 0
    tokens_seen: int = 0
    rewinds: int = 0

    def after(self, *, next_cursor: int, num_tokens: int) -> TrainState:
        """Return the state after one update on the samples up to `next_cursor`."""
        return replace(
            self,
            step=self.step + 1,
            cursor=next_cursor,
            clock=self.clock + 1,
            tokens_seen=self.tokens_seen + num_tokens,
        )

    def rewound(self, *, clock: int, rewinds: int) -> TrainState:
        """Return this (older) state with the history of the run that came after it."""
        return replace(self, clock=max(self.clock, clock), rewinds=rewinds)

    def as_dict(self) -> dict[str, int]:
        """Return the fields as JSON values."""
        return asdict(self)
