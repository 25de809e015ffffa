"""Which samples a run has trained on, from what it left behind, and what is wrong with that.

The surviving lineage has each step once, the last time that it was run: steps behind a checkpoint
that a killed run went back to are undone by that, and so are those behind the target of a rewind.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """Samples of the surviving lineage.

    `trained`: how many were trained on. `twice`: how many of them more often than once. `skipped`:
    how many below the last cursor neither were trained on nor are in the ledger. `in_ledger`: how
    many the ledger skips there.
    """

    trained: int
    twice: int
    skipped: int
    in_ledger: int


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a JSON-lines file, none if there is no file."""
    found = []
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:  # torn by a kill
            continue
        if isinstance(record, dict):
            found.append(record)
    return found


def lineage(metrics: Iterable[Record]) -> list[Record]:
    """Return the record of each surviving step, in order."""
    surviving: list[Record] = []
    for record in metrics:
        while surviving and surviving[-1]["step"] >= record["step"]:
            surviving.pop()
        surviving.append(record)
    return surviving


def skipped_ranges(journal: Iterable[Record]) -> list[tuple[int, int]]:
    """Return the ledger as disjoint ranges in order."""
    ranges = sorted(
        (int(record["skip"][0]), int(record["skip"][1]))
        for record in journal
        if record["phase"] != "observed" and record["skip"][0] < record["skip"][1]
    )
    merged: list[tuple[int, int]] = []
    for start, stop in ranges:
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def account(
    metrics: Iterable[Record], journal: Iterable[Record], sizes: Mapping[int, int]
) -> Account:
    """Return what became of each position below the last cursor.

    `sizes`: samples of the batch of each step, for steps whose record was lost with a disk.
    """
    ledger = skipped_ranges(journal)
    trained = twice = skipped = in_ledger = cursor = step = 0
    for record in lineage(metrics):
        passed = _num_skipped(ledger, cursor, record["cursor"])
        lost = sum(sizes[missing] for missing in range(step + 1, record["step"]))
        batch = record["batch_samples"] + lost
        left = record["cursor"] - cursor - passed - batch
        twice, skipped = twice + max(0, -left), skipped + max(0, left)
        trained, in_ledger = trained + batch, in_ledger + passed
        cursor, step = record["cursor"], record["step"]
    return Account(trained=trained, twice=twice, skipped=skipped, in_ledger=in_ledger)


def _num_skipped(ledger: Sequence[tuple[int, int]], start: int, stop: int) -> int:
    return sum(max(0, min(stop, last) - max(start, first)) for first, last in ledger)


def losses(metrics: Iterable[Record]) -> dict[int, float]:
    """Return the loss of each surviving step."""
    return {record["step"]: record["loss_nats"] for record in lineage(metrics)}
