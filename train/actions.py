"""What callbacks may ask for, and which wish wins. Only the loop acts.

The worst action wins: `Stop > Rewind > Save > Continue`. Losers are logged by the caller.
(`Replay`, going back without a skip, is `Rewind` with an empty range.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from train.state import BatchRange


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """Base of all actions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Continue(Action):
    """Nothing to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Save(Action):
    """Write a checkpoint of the present state."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewind(Action):
    """Go back to the checkpoint `target`, and never train on the samples of `skip`.

    Steps are those of the report that led here; `verdict` is its kind.
    """

    target: str
    target_step: int
    skip_from: int
    skip_amount: int
    rule: str
    verdict: str
    onset_step: int
    detected_step: int
    reason: str

    def skip_range(self, present_cursor: int) -> BatchRange:
        """Return the range to skip; it always covers the data seen up to now.

        `present_cursor` includes the step in flight while the report was read.
        """
        stop = max(self.skip_from + self.skip_amount, present_cursor)
        return BatchRange(start=self.skip_from, stop=stop)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop(Action):
    """End the run; `needs_save` asks for a last checkpoint, `is_failure` for exit code 3."""

    reason: str
    needs_save: bool
    is_failure: bool = False


_SEVERITY: tuple[type[Action], ...] = (Continue, Save, Rewind, Stop)


def severity(action: Action) -> int:
    """Return the rank of an action: higher wins."""
    return _SEVERITY.index(type(action))


def worst(actions: Iterable[Action]) -> tuple[Action, list[Action]]:
    """Return the action that wins and those that lost; the first of equals wins."""
    winner: Action = Continue()
    losers: list[Action] = []
    for action in actions:
        if severity(action) > severity(winner):
            if not isinstance(winner, Continue):
                losers.append(winner)
            winner = action
        elif not isinstance(action, Continue):
            losers.append(action)
    return winner, losers
