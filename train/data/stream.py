"""The stream of batches: a pure function of cursor, ledger and returns; each rank takes its rows.

Owns the way from the cursor to a batch. Refuses to keep a position: the cursor is the caller's.
Called by the loop on all ranks, through `read_ahead` or directly; no collective.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Protocol, TypedDict

import numpy as np
import numpy.typing as npt

from train.data.layout import DocumentLayout
from train.data.ledger import SkipLedger
from train.data.origins import SampleOrigin
from train.data.sequence import Returns
from train.data.source import SampleSource
from train.data.store import check_vocabulary
from train.errors import DataEndError, DataError

logger = logging.getLogger(__name__)

_NO_POSITIONS = np.zeros(0, dtype=np.int64)
# Enough to notice other data, few enough to cost nothing.
_PROOF_SAMPLES = 16


class DataProof(TypedDict):
    """The samples that were read last, as JSON values.

    `sha256`: of their tokens. `given`: how many samples each source of a mixture had given then.
    """

    indices: list[int]
    sha256: str
    given: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """Which samples make up a batch, before any is read.

    `positions`, `indices`: of the whole batch, in the run's sequence and in the global order.
    `mine`: the indices of this rank. `damaged`: positions that were passed over, since their files
    are missing or damaged.
    """

    cursor: int
    num_samples: int
    positions: npt.NDArray[np.int64]
    indices: npt.NDArray[np.int64]
    mine: npt.NDArray[np.int64]
    next_cursor: int
    num_tokens: int
    damaged: npt.NDArray[np.int64] = field(default_factory=lambda: _NO_POSITIONS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One global batch as one rank sees it.

    `rows`: this rank's samples, [num_samples / ranks, sequence_length + 1]. `indices`: the whole
    batch's indices of the global order. `next_cursor`: the position where the next batch begins.
    `num_tokens`: predictions of the whole batch. `layout`: the documents of `rows`, if asked for.
    """

    rows: npt.NDArray[np.integer]
    indices: npt.NDArray[np.int64]
    next_cursor: int
    num_tokens: int
    layout: DocumentLayout | None = None


class Batches(Protocol):
    """What the loop needs of the data."""

    @property
    def ledger(self) -> SkipLedger:
        """What is skipped."""

    @property
    def returns(self) -> Returns:
        """What was put back."""

    def at(self, cursor: int, num_samples: int) -> Batch:
        """Return the next `num_samples` samples at or after `cursor` that are not skipped."""

    def cursor_after(self, cursor: int, num_samples: int) -> int:
        """Return where `num_samples` samples from `cursor` on would leave the cursor."""

    def skipped(self) -> list[tuple[int, int]]:
        """Return all skipped ranges, those of samples that were passed over among them."""

    def proof(self, cursor: int) -> DataProof:
        """Return which samples were read last before `cursor`, and a digest of their tokens."""

    def check(self, proof: DataProof) -> None:
        """Read those samples again. Raises: DataError if they are others now."""


class SampleStream:
    """Batches at any cursor, for one rank of `num_ranks`.

    `vocab_size`: a token that is not below it is an error, before any engine sees it; None: not
    checked. `skips_damaged`: samples of missing or damaged files are passed over, and put into the
    ledger when their batch is taken.
    """

    def __init__(
        self,
        source: SampleSource,
        ledger: SkipLedger,
        *,
        rank: int,
        num_ranks: int,
        returns: Returns | None = None,
        vocab_size: int | None = None,
        skips_damaged: bool = False,
    ) -> None:
        self.ledger = ledger
        self.returns = Returns() if returns is None else returns
        self.source = source
        self._rank = rank
        self._num_ranks = num_ranks
        self._vocab_size = vocab_size
        self._skips_damaged = skips_damaged
        self._passed_over: list[int] = []

    def at(self, cursor: int, num_samples: int) -> Batch:
        """Return the next `num_samples` samples at or after `cursor` that are not skipped.

        Each rank gets one contiguous block of rows; `num_samples` divides among the ranks.
        """
        plan = self.plan(cursor, num_samples)
        self.take(plan)
        rows = np.empty((len(plan.mine), self.source.sample_tokens), dtype=self.source.dtype)
        return self.read(plan, rows, *self.layouts([plan]))

    def plan(self, cursor: int, num_samples: int) -> BatchPlan:
        """Return which samples `at` would take. No token is read, and nothing is changed.

        Raises: DataEndError, on all ranks alike, if there are not so many any more.
        """
        positions, next_cursor = self.ledger.take(cursor, num_samples)
        indices = self._resolve(positions)
        damaged = _NO_POSITIONS
        if self._skips_damaged:
            positions, indices, next_cursor, damaged = self._without_damaged(
                positions, indices, next_cursor
            )
        share = num_samples // self._num_ranks
        return BatchPlan(
            cursor=cursor,
            num_samples=num_samples,
            positions=positions,
            indices=indices,
            mine=indices[self._rank * share : (self._rank + 1) * share],
            next_cursor=next_cursor,
            num_tokens=self.source.num_predictions(indices),
            damaged=damaged,
        )

    def _without_damaged(
        self,
        positions: npt.NDArray[np.int64],
        indices: npt.NDArray[np.int64],
        next_cursor: int,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], int, npt.NDArray[np.int64]]:
        """Replace samples of damaged files by the ones that follow. The same on all ranks."""
        passed_over = [_NO_POSITIONS]
        is_bad = self.source.bad(indices)
        while is_bad.any():
            if sum(map(len, passed_over)) > self.source.num_samples:
                raise DataError(
                    f"behind position {int(positions[0])} all samples lie in damaged files; bring "
                    "them back, or take their source out"
                )
            passed_over.append(positions[is_bad])
            more, next_cursor = self.ledger.take(next_cursor, int(is_bad.sum()))
            positions = np.concatenate([positions[~is_bad], more])
            indices = np.concatenate([indices[~is_bad], self._resolve(more)])
            is_bad = self.source.bad(indices)
        return positions, indices, next_cursor, np.concatenate(passed_over)

    def _resolve(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        indices = self.returns.resolve(positions)
        end = self.source.num_indices
        if end is not None and int(indices.max(initial=-1)) >= end:
            raise DataEndError(
                f"the sources have given all of their {end:,} samples, by their "
                "data.sources.NAME.max_epochs: raise one, add a source in data.stages, or let the "
                "run end here with a smaller run.steps"
            )
        return indices

    def take(self, plan: BatchPlan) -> None:
        """Note that the batch of `plan` is used: what it passed over will be skipped for good."""
        self._passed_over += plan.damaged.tolist()

    def skipped(self) -> list[tuple[int, int]]:
        """Return all skipped ranges, what was passed over among them: it is put into the ledger.

        Not before this is asked for, at a save: the ledger grows by a range a sample.
        """
        self.ledger.extend((position, position + 1) for position in self._passed_over)
        self._passed_over.clear()
        return self.ledger.ranges()

    def layouts(self, plans: Sequence[BatchPlan]) -> list[DocumentLayout | None]:
        """Return the documents of this rank's samples of each plan; found together, for speed."""
        mine = [plan.mine for plan in plans]
        whole = self.source.layout(mine[0] if len(mine) == 1 else np.concatenate(mine))
        if whole is None:
            return [None] * len(plans)
        stops = list(accumulate(len(indices) for indices in mine))
        return [whole.rows(start, stop) for start, stop in pairwise([0, *stops])]

    def read(
        self, plan: BatchPlan, out: npt.NDArray[np.integer], layout: DocumentLayout | None
    ) -> Batch:
        """Read this rank's samples of `plan` into `out`, [len(plan.mine), sequence_length + 1].

        `layout`: their documents. Raises: DataError if a file cannot be read, or a token is none of
        the vocabulary.
        """
        self.source.read(plan.mine, out)
        if self._vocab_size is not None:
            check_vocabulary(out, self._vocab_size, lambda row: self._place(int(plan.mine[row])))
        return Batch(
            rows=out,
            indices=plan.indices,
            next_cursor=plan.next_cursor,
            num_tokens=plan.num_tokens,
            layout=layout,
        )

    def _place(self, index: int) -> str:
        try:
            files = sorted({origin.file for origin in self.source.origins(index)})
        except DataError:
            files = []
        return f"sample {index} of the order ({', '.join(files[:2]) or 'its file is not known'})"

    def indices(self, cursor: int, num_samples: int) -> tuple[npt.NDArray[np.int64], int]:
        """Return the indices of the order that `at` would take, and the cursor after them.

        Indices: int64, shape [num_samples]. No token is read.
        """
        plan = self.plan(cursor, num_samples)
        return plan.indices, plan.next_cursor

    def cursor_after(self, cursor: int, num_samples: int) -> int:
        """Return where `num_samples` samples from `cursor` on would leave the cursor."""
        return self.ledger.advance(cursor, num_samples)

    def proof(self, cursor: int) -> DataProof:
        """Return which samples were read last before `cursor`, and a digest of their tokens.

        It is the same on any number of ranks, and short: it is part of every checkpoint.
        """
        positions = _last_before(cursor, self.ledger, _PROOF_SAMPLES)
        indices = self.returns.resolve(positions)
        if self._skips_damaged:
            indices = indices[~self.source.bad(indices)]
        try:
            digest = self._digest(indices)
        except DataError as error:  # a save does not fail for it
            logger.warning("the checkpoint cannot tell its data: %s", error)
            return {"indices": [], "sha256": "", "given": {}}
        return {"indices": indices.tolist(), "sha256": digest, "given": self._given(indices)}

    def check(self, proof: DataProof) -> None:
        """Read the samples of a proof again.

        Raises: DataError if they are others now: the text, its order or the mixture has changed.
        """
        indices = np.array(proof["indices"], dtype=np.int64)
        if not len(indices):
            return
        if self._skips_damaged and self.source.bad(indices).any():
            logger.warning("what was trained on last lies in damaged files: it is not compared")
            return
        if given := {name: n for name, n in self._given(indices).items() if n}:
            known = {name: n for name, n in proof["given"].items() if n}
            if known and given != known:
                raise DataError(
                    f"this checkpoint has seen {known} samples of each source, and by the mixture "
                    f"of now it would be {given}: data.sources or data.stages have changed in its "
                    "past, or so near to it that it is not ready for the change; bring the old "
                    "ones back, let the new stage start later (a new source gets weight 0 and a "
                    "stage in the future), or start over with run.overwrite=true"
                )
        found = self._digest(indices)
        if found != proof["sha256"]:
            raise DataError(
                "the samples that this checkpoint was trained on last are others now (SHA-256 "
                f"{proof['sha256'][:12]}, now {found[:12]}): the corpus, the seed, data.sources, "
                "data.stages or the packing has changed; bring the old ones back, or start over "
                "with run.overwrite=true"
            )

    def _given(self, indices: npt.NDArray[np.int64]) -> dict[str, int]:
        return self.source.given_before(int(indices.max(initial=-1)) + 1)

    def _digest(self, indices: npt.NDArray[np.int64]) -> str:
        return hashlib.sha256(self.rows_of(indices).astype("<u4").tobytes()).hexdigest()

    def rows_of(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.integer]:
        """Return the tokens at `indices` of the order, shape [n, sequence_length + 1]."""
        rows = np.empty((len(indices), self.source.sample_tokens), dtype=self.source.dtype)
        self.source.read(indices, rows)
        return rows

    def origins_of(self, index: int) -> tuple[SampleOrigin, ...]:
        """Return where the text of the sample at `index` of the order comes from."""
        return self.source.origins(index)


def _last_before(cursor: int, ledger: SkipLedger, count: int) -> npt.NDArray[np.int64]:
    """Return the last `count` positions before `cursor` that are not skipped, in order."""
    found: list[int] = []
    for start, stop in [(cursor, cursor), *reversed(ledger.ranges()), (0, 0)]:
        if start > cursor:
            continue
        first = max(min(stop, cursor), cursor - (count - len(found)))
        found = [*range(first, cursor), *found]
        cursor = start
        if len(found) == count:
            break
    return np.array(found, dtype=np.int64)
