"""Batches that are read before they are asked for, by one thread, into buffers that are reused.

The caller's thread plans (cheap, touches the ledger); the reading thread only reads, which is
pure. A batch that was foreseen wrongly, after a rewind, a skip or a change of batch size, is read
again: what is delivered never depends on what was foreseen.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue

import numpy as np
import numpy.typing as npt

from train.data.layout import DocumentLayout
from train.data.ledger import SkipLedger
from train.data.sequence import Returns
from train.data.stream import Batch, BatchPlan, DataProof, SampleStream
from train.errors import DataEndError

BufferMaker = Callable[[tuple[int, int], np.dtype[np.integer]], npt.NDArray[np.integer]]

# A row that takes longer than this to copy came from a disk or a network; from the page cache,
# 8 KiB take about 1 microsecond.
_COLD_SECONDS_PER_ROW = 2e-5
# How long, in groups, reads are announced after one was cold: announcing costs half as much as
# reading from the page cache does.
_ANNOUNCED_GROUPS = 64
_NUM_BUFFERED_GROUPS = 3
_MAX_CLOSING_SECONDS = 5.0


def plain_buffer(shape: tuple[int, int], dtype: np.dtype[np.integer]) -> npt.NDArray[np.integer]:
    """Return memory that is not pinned."""
    return np.empty(shape, dtype=dtype)


class ReadAhead:
    """Delivers what a stream would, sooner.

    `num_batches` are read ahead, in two groups: one is delivered while the other is read; behind a
    jump, groups begin small. Rows of a batch are valid until two more batches have been asked for.
    Only one thread may call it.
    """

    def __init__(
        self,
        stream: SampleStream,
        *,
        num_batches: int,
        make_buffer: BufferMaker = plain_buffer,
    ) -> None:
        self._stream = stream
        self._group_size = max(2, num_batches // 2)
        self._make_buffer = make_buffer
        self._buffers: dict[int, npt.NDArray[np.integer]] = {}
        self._next_buffer = 0
        self._next_size = 1
        self._announced_groups = _ANNOUNCED_GROUPS
        # What has been planned and not yet delivered, oldest first.
        self._planned: deque[BatchPlan] = deque()
        self._versions = (-1, -1)
        self._is_dropping = False
        self._requests: SimpleQueue[list[tuple[BatchPlan, npt.NDArray[np.integer]]] | None] = (
            SimpleQueue()
        )
        self._results: SimpleQueue[Batch | BaseException] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="read-ahead", daemon=True)
        self._thread.start()

    @property
    def ledger(self) -> SkipLedger:
        """The stream's ledger."""
        return self._stream.ledger

    @property
    def returns(self) -> Returns:
        """The stream's returns."""
        return self._stream.returns

    def at(self, cursor: int, num_samples: int) -> Batch:
        """Return the next `num_samples` samples at or after `cursor` that are not skipped.

        Raises: DataError if they cannot be read.
        """
        if not self._is_foreseen(cursor, num_samples):
            self._drop()
            self._versions = self._present_versions()
            self._next_size = 1  # the first batch does not wait for others
            self._plan_group([self._stream.plan(cursor, num_samples)])
        plan = self._planned.popleft()
        batch = self._results.get()
        if isinstance(batch, BaseException):
            self._drop()
            raise batch
        self._stream.take(plan)
        if len(self._planned) < self._next_size:
            self._plan_group(self._plans_behind(self._planned[-1] if self._planned else plan))
        return batch

    def cursor_after(self, cursor: int, num_samples: int) -> int:
        """Return where `num_samples` samples from `cursor` on would leave the cursor."""
        return self._stream.cursor_after(cursor, num_samples)

    def skipped(self) -> list[tuple[int, int]]:
        """Return all skipped ranges, those of samples that were passed over among them."""
        is_valid = self._versions == self._present_versions()
        ranges = self._stream.skipped()
        if is_valid:
            self._versions = self._present_versions()  # they lie behind what was foreseen
        return ranges

    def proof(self, cursor: int) -> DataProof:
        """Return which samples were read last before `cursor`, and a digest of their tokens."""
        return self._stream.proof(cursor)

    def check(self, proof: DataProof) -> None:
        """Read those samples again. Raises: DataError if they are others now."""
        self._stream.check(proof)

    def close(self) -> None:
        """End the thread; one that waits for a remote file is left to itself."""
        self._is_dropping = True
        self._requests.put(None)
        self._thread.join(timeout=_MAX_CLOSING_SECONDS)

    def _is_foreseen(self, cursor: int, num_samples: int) -> bool:
        if not self._planned or self._versions != self._present_versions():
            return False
        plan = self._planned[0]
        return plan.cursor == cursor and plan.num_samples == num_samples

    def _present_versions(self) -> tuple[int, int]:
        return self.ledger.version, self.returns.version

    def _drop(self) -> None:
        """Forget what was foreseen; returns when nothing is being read any more."""
        self._is_dropping = True
        for _ in self._planned:
            self._results.get()
        # Their buffers come next; the ones before them may still be on their way to the device.
        num_buffers = _NUM_BUFFERED_GROUPS * self._group_size
        self._next_buffer = (self._next_buffer - len(self._planned)) % num_buffers
        self._planned.clear()
        self._is_dropping = False

    def _plans_behind(self, plan: BatchPlan) -> list[BatchPlan]:
        """Return the plans of a group; fewer where the data end: that is said when it comes."""
        plans = [plan]
        try:
            for _ in range(self._next_size):
                plans.append(self._stream.plan(plans[-1].next_cursor, plan.num_samples))
        except DataEndError:
            pass
        return plans[1:]

    def _plan_group(self, plans: list[BatchPlan]) -> None:
        if not plans:
            return
        self._requests.put([(plan, self._buffer(len(plan.mine))) for plan in plans])
        self._planned.extend(plans)
        self._next_size = min(2 * self._next_size, self._group_size)

    def _buffer(self, num_rows: int) -> npt.NDArray[np.integer]:
        """Return the buffer that was used longest ago; the batch in it is not valid any more."""
        source = self._stream.source
        number = self._next_buffer
        self._next_buffer = (number + 1) % (_NUM_BUFFERED_GROUPS * self._group_size)
        buffer = self._buffers.get(number)
        if buffer is None or len(buffer) < num_rows:
            buffer = self._make_buffer((num_rows, source.sample_tokens), source.dtype)
            self._buffers[number] = buffer
        return buffer[:num_rows]

    def _work(self) -> None:
        """Read group after group; runs in the thread."""
        while (group := self._requests.get()) is not None:
            is_announced = self._announced_groups > 0
            started = time.perf_counter()
            if not self._is_dropping:
                self._announce(group, is_announced=is_announced)
            layouts = self._layouts([plan for plan, _ in group])
            for (plan, buffer), layout in zip(group, layouts, strict=True):
                self._results.put(self._read(plan, buffer, layout))
            num_rows = sum(len(plan.mine) for plan, _ in group)
            seconds = time.perf_counter() - started
            is_cold = seconds > _COLD_SECONDS_PER_ROW * num_rows
            self._announced_groups = _ANNOUNCED_GROUPS if is_cold else self._announced_groups - 1

    def _announce(
        self, group: list[tuple[BatchPlan, npt.NDArray[np.integer]]], *, is_announced: bool
    ) -> None:
        source = self._stream.source
        try:
            if is_announced:
                source.announce(np.concatenate([plan.mine for plan, _ in group]))
            source.look_ahead(int(group[-1][0].indices[-1]))
        except Exception:  # noqa: BLE001 - reading will say what is wrong, to the right caller
            return

    def _layouts(self, plans: list[BatchPlan]) -> Sequence[DocumentLayout | BaseException | None]:
        if self._is_dropping:
            return [None] * len(plans)
        try:
            return self._stream.layouts(plans)
        except BaseException as error:  # noqa: BLE001 - raised where the batch is asked for
            return [error] * len(plans)

    def _read(
        self,
        plan: BatchPlan,
        buffer: npt.NDArray[np.integer],
        layout: DocumentLayout | BaseException | None,
    ) -> Batch | BaseException:
        if self._is_dropping:
            return InterruptedError("dropped")
        if isinstance(layout, BaseException):
            return layout
        try:
            return self._stream.read(plan, buffer, layout)
        except BaseException as error:  # noqa: BLE001 - raised where the batch is asked for
            return error
