"""What cannot be right in the config of the data, before any file is opened.

Called by `train.config`; imports no numpy, so a bad config is refused at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from train.amounts import AmountUnit
from train.data.settings import DataSettings


def data_problems(data: DataSettings) -> Iterator[str]:
    """Yield one line a problem: its key, what was found, what to do."""
    if data.paths and data.sources:
        yield (
            "data.paths and data.sources are both set; give one source as data.paths, or several "
            "as data.sources"
        )
    for name, source in data.sources.items():
        if not source.paths:
            yield f"data.sources.{name}.paths is empty; name its files, or remove the source"
    if data.sources and not any(source.weight for source in data.sources.values()):
        yield "data.sources: every weight is 0; give at least one source a positive weight"
    yield from _stage_problems(data)
    if data.token_dtype not in (None, "uint16", "uint32", "int32", "int64"):
        yield (
            f"data.token_dtype={data.token_dtype}: should be uint16, uint32, int32 or int64 (or "
            "null, where the files say it themselves)"
        )


def _stage_problems(data: DataSettings) -> Iterator[str]:
    known = data.named_sources()
    starts = [stage.start.value for stage in data.stages]
    for number, stage in enumerate(data.stages):
        key = f"data.stages[{number}]"
        for field, amount in (("start", stage.start), ("ramp", stage.ramp)):
            if amount.unit is not AmountUnit.TOKENS:
                yield (
                    f"{key}.{field}={amount}: a mixture is scheduled over tokens, since batches "
                    'change their size; give "10B tokens"'
                )
        for name in sorted(stage.weights.keys() - known.keys()):
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
            yield f"{key}.weights.{name}: there is no such source; {hint}"
        if not any(stage.weights.values()):
            yield f"{key}.weights: every weight is 0; give at least one source a positive weight"
        if starts.count(stage.start.value) > 1:
            yield f"{key}.start={stage.start}: two stages start there; remove one"
        end = stage.start.value + stage.ramp.value
        inside = [start for start in starts if stage.start.value < start < end]
        if inside:
            yield (
                f"{key}: its ramp ends at {end:,} tokens, and another stage starts at "
                f"{min(inside):,}; shorten the ramp or let that one start later"
            )
