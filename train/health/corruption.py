"""Who holds, or computes, other bits than it should: checksums in, ranks out.

Pure, the standard library alone. Called by `integrity` on every rank, with equal arguments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

_MAX_TENSORS_TOLD = 3


class Check(StrEnum):
    """What was compared."""

    REPLICAS = "replicas"
    """The states of ranks that should be equal."""
    REEXECUTION = "reexecution"
    """Two executions of one step on each rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Vote:
    """Ranks that cannot all be right.

    `is_certain`: all of them are wrong; otherwise one of them is at least, no one knows which.
    """

    ranks: tuple[int, ...]
    is_certain: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """What came out otherwise on one rank when a step was executed again, from the same bits.

    `has_other_losses`: of its own samples. `gradients`: of its own samples, before they travel.
    `state`: parameters, moments and counters after the step. `problem`: the state before the step
    could not be put back.
    """

    has_other_losses: bool = False
    gradients: tuple[str, ...] = ()
    state: tuple[str, ...] = ()
    problem: str = ""

    @property
    def is_own(self) -> bool:
        """True of what no other rank can have brought about."""
        return self.has_other_losses or bool(self.gradients) or bool(self.problem)


@dataclass(frozen=True, slots=True, kw_only=True)
class Corruption:
    """Bits that are wrong, and where. `places`: host and device of each of the ranks.

    `clue`: what makes one rank the likelier one where a vote is a tie.
    """

    check: Check
    vote: Vote
    places: tuple[str, ...]
    tensors: tuple[str, ...]
    detail: str
    clue: str = ""

    def in_words(self) -> str:
        """Return what was found, for people."""
        named = [
            f"{rank} ({place})" for rank, place in zip(self.vote.ranks, self.places, strict=True)
        ]
        noun = "rank" if len(named) == 1 else "ranks"
        certainty = "" if self.vote.is_certain or self.clue else "; which of them is not known"
        clue = f"; {self.clue}" if self.clue else ""
        return f"{noun} {', '.join(named)}: {self.detail}{certainty}{clue}"


def vote(digests: Sequence[str]) -> Vote | None:
    """Return who holds another state than most, None if all hold the same. `digests` by rank.

    States that went wrong on their own are never equal, so a set of equals that is larger than all
    others is right, even if it is less than half. Without one, all ranks are named.
    """
    by_digest: dict[str, list[int]] = {}
    for rank, digest in enumerate(digests):
        by_digest.setdefault(digest, []).append(rank)
    if len(by_digest) <= 1:
        return None
    largest, second = sorted(by_digest.values(), key=len, reverse=True)[:2]
    everyone = range(len(digests))
    if len(largest) == len(second):
        return Vote(ranks=tuple(everyone), is_certain=False)
    return Vote(ranks=tuple(rank for rank in everyone if rank not in largest), is_certain=True)


def blame(differences: Sequence[Difference]) -> Vote | None:
    """Return who computes differently from one time to the next, None if no one does.

    What a rank computes of its own samples alone convicts it. If only what follows differs, and
    not on all ranks, its optimizer or its link is at fault; on all ranks, it is what they exchange.
    """
    own = tuple(rank for rank, difference in enumerate(differences) if difference.is_own)
    if own:
        return Vote(ranks=own, is_certain=True)
    after = tuple(rank for rank, difference in enumerate(differences) if difference.state)
    if not after:
        return None
    is_everyone = len(after) == len(differences) > 1
    return Vote(ranks=after, is_certain=not is_everyone)


def differing(one: Mapping[str, int], other: Mapping[str, int]) -> tuple[str, ...]:
    """Return the names whose checksums are not equal, in the order of `one`."""
    names = [*one, *(name for name in other if name not in one)]
    return tuple(name for name in names if one.get(name) != other.get(name))


def tensors_of_minority(sums: Sequence[Mapping[str, int]], found: Vote) -> tuple[str, ...]:
    """Return the tensors in which the ranks of a vote differ from the others, or among them.

    `sums`: checksums by name, of each rank.
    """
    others = [rank for rank in range(len(sums)) if rank not in found.ranks]
    reference = sums[others[0] if found.is_certain and others else 0]
    names = {name for rank in found.ranks for name in differing(reference, sums[rank])}
    return tuple(name for name in reference if name in names)


def name_some(names: Sequence[str]) -> str:
    """Return the first few names, and how many more there are."""
    told = ", ".join(names[:_MAX_TENSORS_TOLD])
    more = len(names) - _MAX_TENSORS_TOLD
    return f"{told} and {more} more" if more > 0 else told


def describe(difference: Difference) -> str:
    """Return what differed, in the order in which a step makes it."""
    if difference.problem:
        return difference.problem
    parts = []
    if difference.has_other_losses:
        parts.append("other losses of its samples")
    if difference.gradients:
        parts.append(f"other gradients ({name_some(difference.gradients)})")
    if difference.state and not parts:
        parts.append(f"another state after the update ({name_some(difference.state)})")
    return " and ".join(parts)
