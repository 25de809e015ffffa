"""Which documents of a corpus have a text that an earlier one has.

Owns nothing but the search: 128-bit hashes of all documents, 8 bytes of memory each and little
more for those that are candidates. Called by `finish`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]


def find_duplicates(hash_files: Sequence[Path]) -> dict[int, Mask]:
    """Return, by the number of the file, which of its documents to drop: [documents], True if so.

    Files without any are left out. Of equal documents the first in order stays.
    """
    sizes = [path.stat().st_size // 16 for path in hash_files]
    halves = np.empty(sum(sizes), dtype=np.uint64)
    end = 0
    for path, size in zip(hash_files, sizes, strict=True):
        halves[end : end + size] = _hashes(path)[:, 0]
        end += size
    halves.sort()
    repeated = np.unique(halves[1:][halves[1:] == halves[:-1]])
    del halves
    if not len(repeated):
        return {}
    return _resolve(hash_files, sizes, repeated)


def _resolve(
    hash_files: Sequence[Path], sizes: Sequence[int], repeated: npt.NDArray[np.uint64]
) -> dict[int, Mask]:
    """Compare the whole hashes of the documents whose first halves are met more than once."""
    found: list[npt.NDArray[np.uint64]] = []
    places: list[npt.NDArray[np.int64]] = []
    first = 0
    for path, size in zip(hash_files, sizes, strict=True):
        hashes = _hashes(path)
        nearest = np.searchsorted(repeated, hashes[:, 0])
        nearest[nearest == len(repeated)] = 0
        (candidates,) = np.nonzero(repeated[nearest] == hashes[:, 0])
        found.append(hashes[candidates])
        places.append(candidates + first)
        first += size
    hashes, documents = np.concatenate(found), np.concatenate(places)
    order = np.lexsort((documents, hashes[:, 1], hashes[:, 0]))
    is_repeat = np.zeros(len(order), dtype=np.bool_)
    is_repeat[1:] = np.all(hashes[order[1:]] == hashes[order[:-1]], axis=1)
    dropped = np.sort(documents[order[is_repeat]])
    firsts = np.cumsum([0, *sizes])
    masks: dict[int, Mask] = {}
    for number in np.unique(np.searchsorted(firsts, dropped, side="right") - 1):
        mask = np.zeros(sizes[number], dtype=np.bool_)
        inside = dropped[(dropped >= firsts[number]) & (dropped < firsts[number + 1])]
        mask[inside - firsts[number]] = True
        masks[int(number)] = mask
    return masks


def _hashes(path: Path) -> npt.NDArray[np.uint64]:
    return np.fromfile(path, dtype="<u8").reshape(-1, 2)
