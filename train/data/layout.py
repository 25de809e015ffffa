"""Where documents begin in the rows of a batch, and how much of each row is text.

Shapes: n rows of T + 1 tokens, K documents at most in one of them. Made by samples, carried by
batches, read by engines; it knows nothing of either.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentLayout:
    """The documents of n rows.

    `starts`: int32 [n, K], the columns where documents begin; the first is 0, they ascend, and
    T + 1 stands for none. None: documents are not told apart. `lengths`: int32 [n], how many of a
    row's T + 1 tokens are text; what lies behind is padding, of which no loss is taken. None: all.
    """

    starts: npt.NDArray[np.int32] | None = None
    lengths: npt.NDArray[np.int32] | None = None

    def rows(self, start: int, stop: int) -> DocumentLayout:
        """Return the layout of the rows `[start, stop)`."""
        return DocumentLayout(
            starts=None if self.starts is None else self.starts[start:stop],
            lengths=None if self.lengths is None else self.lengths[start:stop],
        )
