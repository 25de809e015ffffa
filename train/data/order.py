"""The global order of samples: a pure function of (seed, index), computed on the fly.

Index `i` lies in epoch `i // num_samples`; inside an epoch, a keyed permutation gives the sample.
The permutation is a balanced Feistel network over the next even power of two, with cycle-walking
back into range: O(1) time and memory a sample, no index to build or store, and another order each
epoch. The total length of a run does not enter, so lengthening it changes no sample.

Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002 (cycle-walking).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_NUM_ROUNDS = 4
_MASK_64 = (1 << 64) - 1


def _mix(value: int) -> int:
    """Scramble 64 bits (the finaliser of SplitMix64, Steele et al., OOPSLA 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK_64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return value ^ (value >> 31)


class SampleOrder:
    """Which sample stands at each index of the endless global order.

    `num_samples`: samples of one epoch (at least 1). `seed`: any integer.
    """

    def __init__(self, *, num_samples: int, seed: int) -> None:
        if num_samples < 1:
            raise ValueError(f"an order needs at least one sample, found {num_samples}")
        self.num_samples = num_samples
        self._seed = seed
        self._half_bits = max(1, ((num_samples - 1).bit_length() + 1) // 2)

    def samples(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the sample numbers, in `[0, num_samples)`, at global `indices` (any shape [n])."""
        epochs, positions = np.divmod(indices, self.num_samples)
        samples = np.empty_like(indices)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            samples[chosen] = self._permute(positions[chosen], int(epoch))
        return samples

    def _permute(self, positions: npt.NDArray[np.int64], epoch: int) -> npt.NDArray[np.int64]:
        key = _mix(_mix(self._seed & _MASK_64) ^ _mix(epoch))
        keys = [np.uint64(_mix(key + round_number)) for round_number in range(_NUM_ROUNDS)]
        values = self._encrypt(positions.astype(np.uint64), keys)
        outside = values >= np.uint64(self.num_samples)
        while outside.any():
            values[outside] = self._encrypt(values[outside], keys)
            outside = values >= np.uint64(self.num_samples)
        return values.astype(np.int64)

    def _encrypt(
        self, values: npt.NDArray[np.uint64], keys: list[np.uint64]
    ) -> npt.NDArray[np.uint64]:
        shift = np.uint64(self._half_bits)
        mask = np.uint64((1 << self._half_bits) - 1)
        left, right = values >> shift, values & mask
        for key in keys:
            mixed = (right + key) * np.uint64(0xBF58476D1CE4E5B9)
            mixed ^= mixed >> np.uint64(29)
            mixed *= np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        return (left << shift) | right
