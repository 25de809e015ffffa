"""From the trials of a replay to what caused an incident. Standard library alone; pure.

PaLM's authors trained an earlier checkpoint on the very batches that had surrounded a spike, saw
none, and concluded that it takes both certain data and a certain state. With two more trials, other
batches and one step done twice, the causes come apart:

| same state, same data | other data | earlier state, same data | step done twice | cause |
|---|---|---|---|---|
| any    | any    | any      | differs | not reproducible: suspect hardware |
| calm   | any    | any      | equal   | not reproducible: suspect hardware |
| spikes | spikes | any      | equal   | state |
| spikes | calm   | spikes   | equal   | data |
| spikes | calm   | calm     | equal   | data x state |

What could not be tried is None, and leaves open what hangs on it.

Source: PaLM, arXiv 2204.02311, section 5.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum


class Cause(StrEnum):
    """What an incident is put down to."""

    DATA = "data"
    STATE = "state"
    DATA_X_STATE = "data x state"
    NOT_REPRODUCIBLE = "not reproducible: suspect hardware"
    INCONCLUSIVE = "inconclusive"


@dataclass(frozen=True, slots=True, kw_only=True)
class Conclusion:
    """A cause, and why, in one sentence."""

    cause: Cause
    because: str


def conclude(
    *, same: bool | None, earlier: bool | None, other: bool | None, differs: bool | None
) -> Conclusion:
    """Return the cause.

    `same`, `earlier`, `other`: whether it spiked with the same data from the same state, with the
    same data from an earlier state, with other data from the same state. `differs`: whether one
    step, done twice from the same bits, gave other bits. None: not known.
    """
    if differs:
        return Conclusion(
            cause=Cause.NOT_REPRODUCIBLE,
            because="the same step from the same bits gave other bits the second time",
        )
    if same is None:
        return Conclusion(
            cause=Cause.INCONCLUSIVE,
            because="whether the same data from the same state spike again is not known",
        )
    if not same:
        return Conclusion(
            cause=Cause.NOT_REPRODUCIBLE,
            because="the same data from the same state did not spike again",
        )
    if other is None:
        return Conclusion(
            cause=Cause.INCONCLUSIVE,
            because="it spikes again, but whether other data spike as well is not known",
        )
    if other:
        confirmed = (
            "" if earlier is not False else ", and the same data from an earlier state do not"
        )
        return Conclusion(
            cause=Cause.STATE,
            because=f"it spikes again, and other data from the same state spike as well{confirmed}",
        )
    if earlier is None:
        return Conclusion(
            cause=Cause.INCONCLUSIVE,
            because="it spikes again and other data do not, so the data take part; whether the "
            "state does too is not known, for lack of an earlier one to compare with",
        )
    if earlier:
        return Conclusion(
            cause=Cause.DATA,
            because="the same data spike again, from an earlier state too; other data do not",
        )
    return Conclusion(
        cause=Cause.DATA_X_STATE,
        because="it takes both: neither other data nor the same data from an earlier state spike",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RankRepeat:
    """What one rank saw when a step was done twice. `host`: of the replay, not of the run."""

    rank: int
    host: str
    has_other_losses: bool
    has_other_state: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class HardwareSuspect:
    """The ranks to look at first, their hosts, and on what evidence."""

    ranks: tuple[int, ...]
    hosts: tuple[str, ...]
    evidence: str

    def __str__(self) -> str:
        places = [f"rank {r} on {h}" for r, h in zip(self.ranks, self.hosts, strict=True)]
        return f"{', '.join(places)} ({self.evidence})"


def suspect_hardware(
    repeats: Sequence[RankRepeat], capsule: Mapping[str, object]
) -> HardwareSuspect | None:
    """Return whose hardware to suspect: by the repeated step, else by the capsule, else None.

    Gradients are shared, so a wrong one reaches all ranks: a rank stands out by its own samples'
    losses, or else by its state, only if not all do. `capsule`: as in `capsule.json`, may be empty.
    """
    for which, words in (
        ([r for r in repeats if r.has_other_losses], "its losses differed in the repeated step"),
        ([r for r in repeats if r.has_other_state], "its state differed after the repeated step"),
    ):
        if which and (len(which) < len(repeats) or len(repeats) == 1):
            ranks = tuple(one.rank for one in which)
            return HardwareSuspect(ranks=ranks, hosts=tuple(r.host for r in which), evidence=words)
    return _from_capsule(capsule)


def _from_capsule(capsule: Mapping[str, object]) -> HardwareSuspect | None:
    ranks, environment = capsule.get("ranks"), capsule.get("environment")
    if not isinstance(ranks, Mapping) or not isinstance(environment, Mapping):
        return None
    odd, bad_rank = ranks.get("odd"), ranks.get("bad_rank")
    if isinstance(bad_rank, int):
        return HardwareSuspect(
            ranks=(bad_rank,),
            hosts=(str(ranks.get("bad_rank_host")),),
            evidence=f"its loss alone was not finite at step {ranks.get('bad_rank_step')}",
        )
    if isinstance(odd, Mapping):
        return HardwareSuspect(
            ranks=tuple(odd["ranks"]),
            hosts=tuple(str(host) for host in odd["hosts"]),
            evidence=f"it stood out at step {odd['step']}: {odd['reason']}",
        )
    hosts = environment.get("hosts")
    if environment.get("num_ranks") == 1 and isinstance(hosts, Mapping) and hosts:
        return HardwareSuspect(
            ranks=(0,), hosts=(str(next(iter(hosts))),), evidence="the run had no other rank"
        )
    return None
