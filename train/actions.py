"""What callbacks may ask for, and which wish wins. Only the loop acts.

The worst action wins: `Stop > Rewind > Skip > Unskip > Save > Note > Continue`. Losers are logged
by the caller. (`Replay`, going back without a skip, is `Rewind` with an empty range.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from train.recovery.policy import Rung
from train.state import BatchRange


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """Base of all actions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Continue(Action):
    """Nothing to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Note(Action):
    """Write into the journal what was borne, or what would have been done; change nothing."""

    rule: str
    rung: Rung
    incident: int
    attempt: int
    is_observed: bool
    verdict: str
    onset_step: int
    detected_step: int
    clock: int
    reason: str
    code: str = ""
    target: str = ""
    target_step: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Save(Action):
    """Keep the present state: on disk, in memory, or both."""

    reason: str
    to_disk: bool = True
    to_memory: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Unskip(Action):
    """Put what was skipped back at the end of the data; an operator's wish."""

    skipped: tuple[BatchRange, ...]
    reason: str
    request: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Skip(Action):
    """Skip the next `amount` samples without going back; an operator's wish."""

    amount: int
    reason: str
    request: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewind(Action):
    """Go back to the state `target`, and never train on the samples of `skip`.

    Steps are those of the report that led here; `verdict` is its kind. `skip_amount` 0 replays the
    same data; otherwise what was seen up to now is skipped too, and `margin` samples more, unless
    `is_exact`. The learning rate is multiplied by `lr_scale` up to `lr_until_step`. `suspects`:
    hosts and devices that gave wrong bits.
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
    incident: int
    attempt: int = 1
    rung: Rung = Rung.SKIP
    margin: int = 0
    is_exact: bool = False
    lr_scale: float = 1.0
    lr_until_step: int = 0
    lr_return_step: int = 0
    request: str = ""
    suspects: tuple[str, ...] = ()

    def skip_range(self, present_cursor: int) -> BatchRange:
        """Return the range to skip; it covers the data seen up to now and the margin.

        `present_cursor` includes the step in flight while the report was read.
        """
        if self.skip_amount == 0:
            return BatchRange(start=self.skip_from, stop=self.skip_from)
        stop = self.skip_from + self.skip_amount
        if not self.is_exact:
            stop = max(stop, present_cursor + self.margin)
        return BatchRange(start=self.skip_from, stop=stop)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop(Action):
    """End the run; `needs_save` asks for a last checkpoint, `is_failure` for exit code 3.

    `code` says in one word why, for launchers and dashboards; the rest is for the journal.
    """

    reason: str
    needs_save: bool
    is_failure: bool = False
    code: str = ""
    rule: str = ""
    incident: int = 0
    attempt: int = 1
    verdict: str = ""
    onset_step: int = 0
    detected_step: int = 0
    suspects: tuple[str, ...] = ()


_SEVERITY: tuple[type[Action], ...] = (Continue, Note, Save, Unskip, Skip, Rewind, Stop)


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
