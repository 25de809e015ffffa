"""The global order of samples: a pure function of (seed, key, index), computed on the fly.

Index `i` lies in epoch `i // num_samples`; inside an epoch, a keyed permutation gives the sample:
O(1) time and memory a sample, no index to build or store, another order each epoch. The length of
a run does not enter, so lengthening it changes no sample. `ORDER_VERSION` goes into run folders.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from train.data.blocks import BlockMemory, first_if_consecutive
from train.data.permutation import MAX_SIZE, Permutation, Words, mix

# Raised whenever the same seed and key give another order. 1 had no key and a power-of-two domain.
ORDER_VERSION = 2

# Each use of an epoch's key draws numbers of its own.
_FOR_OFFSET, _FOR_BLOCKS, _FOR_WINDOWS = (np.uint64(number << 32) for number in (1, 2, 3))


class SampleOrder:
    """Which sample stands at each index of the endless global order.

    `num_samples`: samples of one epoch, 1 to 2**50. `seed`: any integer. `key`: what is ordered
    (name and digest of a corpus), so that two corpora of one size do not share an order.

    With `block_samples` the order is local, for storage on which far jumps are slow: each epoch is
    cut into blocks of so many neighbouring samples, the blocks are shuffled, and the samples of
    each `window_blocks` successive ones are shuffled among themselves. A window reads that many
    contiguous stretches and no more (a block over the end of the corpus counts as two). Where the
    cut begins moves each epoch, so blocks hold other neighbours, and what remains at its end, less
    than a block, is never the same: it comes in the last window.
    """

    def __init__(
        self,
        *,
        num_samples: int,
        seed: int,
        key: str = "",
        block_samples: int | None = None,
        window_blocks: int = 64,
    ) -> None:
        if num_samples < 1:
            raise ValueError(f"an order needs at least one sample, found {num_samples}")
        if num_samples > MAX_SIZE:
            raise ValueError(f"an order holds at most {MAX_SIZE} samples, found {num_samples}")
        if window_blocks < 1 or (block_samples is not None and block_samples < 1):
            raise ValueError(
                "a local order needs block_samples and window_blocks of at least 1, found "
                f"{block_samples} and {window_blocks}"
            )
        self.num_samples = num_samples
        digest = blake2b(f"{seed}:{key}".encode(), digest_size=8).digest()
        self._key = np.uint64(int.from_bytes(digest, "little"))
        self._local: _LocalEpoch | None = None
        if block_samples is not None:
            self._local = _LocalEpoch(num_samples, block_samples, window_blocks)
        self._epoch = self._local or Permutation(num_samples)
        self._memory = BlockMemory(
            lambda first, count: self._compute(np.arange(first, first + count, dtype=np.int64))
        )

    def samples(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the sample numbers, in `[0, num_samples)`, at global `indices`, int64 [n].

        Successive indices are cheap: they come from blocks that are kept. Any thread may call.
        """
        if indices.size == 0:
            return np.empty_like(indices)
        first = first_if_consecutive(indices)
        if first is not None:
            return self._memory.read(first, len(indices))
        picked = self._memory.pick(indices)
        return self._compute(indices) if picked is None else picked

    @property
    def window_samples(self) -> int | None:
        """How many successive indices of an epoch a window holds; None if the order is global."""
        return None if self._local is None else self._local.window_samples

    def blocks_ahead(self, index: int, count: int) -> npt.NDArray[np.int64]:
        """Return the stretches of samples of the windows that `[index, index + count)` touches.

        int64 [k, 2]: first sample and number of samples of each, in the order of the windows, so
        that storage can fetch them before their samples are asked for. Of a global order none:
        there a sample's neighbours are no likelier to come next than any others.
        """
        if self._local is None or count < 1:
            return np.empty((0, 2), dtype=np.int64)
        stretches = []
        while count > 0:
            epoch, position = divmod(index, self.num_samples)
            window = position // self._local.window_samples
            stretches.append(self._local.stretches(window, self._epoch_keys(np.array([epoch]))))
            stop = min((window + 1) * self._local.window_samples, self.num_samples)
            index, count = index + stop - position, count - (stop - position)
        return np.concatenate(stretches)

    def _epoch_keys(self, epochs: npt.NDArray[np.int64]) -> Words:
        return mix(mix(epochs.astype(np.uint64)) ^ self._key)

    def _compute(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        epochs = indices // self.num_samples
        positions = (indices - epochs * self.num_samples).astype(np.uint64)
        is_one_epoch = bool((epochs == epochs[0]).all())
        keys = self._epoch_keys(epochs[:1] if is_one_epoch else epochs)
        return self._epoch.apply(positions, keys).astype(np.int64)


class _LocalEpoch:
    """A permutation of samples that reads a window of blocks at a time.

    The samples are numbered from the epoch's offset on, round the end of the corpus, and cut into
    blocks. Whole blocks are shuffled over places; the rest of the cut keeps the last place. A
    window is `window_blocks` successive places, and its samples are shuffled.
    """

    def __init__(self, num_samples: int, block_samples: int, window_blocks: int) -> None:
        self.window_samples = min(block_samples * window_blocks, num_samples)
        self._num_samples = num_samples
        self._block_samples = min(block_samples, num_samples)
        self._window_blocks = window_blocks
        self._num_whole_blocks = num_samples // self._block_samples
        self._num_windows = -(-num_samples // self.window_samples)
        self._blocks = Permutation(self._num_whole_blocks)
        self._window = Permutation(self.window_samples)
        self._last_window = Permutation(num_samples - (self._num_windows - 1) * self.window_samples)

    def apply(self, positions: Words, keys: Words) -> Words:
        """Return the samples at `positions`, [n], of the epochs with `keys`, [n] or [1]."""
        windows = positions // np.uint64(self.window_samples)
        inside = positions - windows * np.uint64(self.window_samples)
        is_last = windows == np.uint64(self._num_windows - 1)
        is_one_window = keys.size == 1 and bool((windows == windows[0]).all())
        window_keys = mix(mix(keys + _FOR_WINDOWS) ^ (windows[:1] if is_one_window else windows))
        if is_last.all():
            inside = self._last_window.apply(inside, window_keys)
        elif not is_last.any():
            inside = self._window.apply(inside, window_keys)
        else:
            for chosen, shuffle in ((is_last, self._last_window), (~is_last, self._window)):
                inside[chosen] = shuffle.apply(inside[chosen], window_keys[chosen])
        places = inside // np.uint64(self._block_samples)
        inside -= places * np.uint64(self._block_samples)
        if is_one_window:
            # A window has far fewer places than a stretch of indices: shuffle each place once.
            blocks = self._blocks_of(int(windows[0]), keys)[places.astype(np.int64)]
        else:
            blocks = self._shuffle_blocks(places + windows * np.uint64(self._window_blocks), keys)
        return self._turn(blocks * np.uint64(self._block_samples) + inside, keys)

    def stretches(self, window: int, keys: Words) -> npt.NDArray[np.int64]:
        """Return first sample and number of samples, int64 [k, 2], of what a window reads."""
        starts = self._blocks_of(window, keys).astype(np.int64) * self._block_samples
        counts = np.minimum(self._block_samples, self._num_samples - starts)
        firsts = self._turn(starts.astype(np.uint64), keys).astype(np.int64)
        over_the_end = np.maximum(firsts + counts - self._num_samples, 0)
        whole = np.stack([firsts, counts - over_the_end], axis=1)
        wrapped = np.stack([np.zeros_like(firsts), over_the_end], axis=1)
        return np.concatenate([whole, wrapped[over_the_end > 0]])

    def _blocks_of(self, window: int, keys: Words) -> Words:
        first = window * self._window_blocks
        num_places = -(-self._num_samples // self._block_samples)
        stop = min(first + self._window_blocks, num_places)
        return self._shuffle_blocks(np.arange(first, stop, dtype=np.uint64), keys)

    def _shuffle_blocks(self, places: Words, keys: Words) -> Words:
        is_rest = places >= np.uint64(self._num_whole_blocks)
        blocks = self._blocks.apply(
            np.where(is_rest, np.uint64(0), places), mix(keys + _FOR_BLOCKS)
        )
        return np.where(is_rest, places, blocks)

    def _turn(self, numbers: Words, keys: Words) -> Words:
        size = np.uint64(self._num_samples)
        turned = numbers + mix(keys + _FOR_OFFSET) % size
        return np.where(turned >= size, turned - size, turned)
