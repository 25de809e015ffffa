"""Puts the data of a run together: corpora, samples, order, mixture, held-out samples.

Called by the composition roots, of training and of replay, after the corpora were opened. Refuses
too little text here, before any process group is made.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from train.data.cache import ShardCache
from train.data.corpus import cache_folder
from train.data.mixture import Mixture, MixtureStage
from train.data.order import SampleOrder
from train.data.packing import PackedSamples
from train.data.samples import CutSamples, Samples
from train.data.settings import DataSettings, OnBadShard, Packing
from train.data.shards import Corpus, Split
from train.data.source import MixedSource, SourcePart
from train.data.store import TokenStore
from train.data.stream import SampleStream
from train.data.validation import HeldOut, Validation
from train.errors import ConfigError, DataError
from train.schedule import Schedule

if TYPE_CHECKING:
    from train.distributed import World

logger = logging.getLogger(__name__)

BadShards = Mapping[str, Mapping[int, str]]
"""For each source, the numbers of the files that cannot be used, and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """The data of a run, as one source of samples. Pure: nothing here moves with the run."""

    source: MixedSource
    mixture: Mixture | None
    validation: Validation
    vocab_size: int | None
    """Of the tokenizer; None if no corpus says it."""
    num_tokens: Mapping[str, int]
    """Of each source, apart from what preparation held out."""

    def description(self) -> dict[str, dict[str, object]]:
        """Return what a reader of the run wants to know of each source, as JSON values."""
        shares = self.mixture.shares_at(0) if self.mixture is not None else [Fraction(1)]
        return {
            part.name: {
                "samples": part.order.num_samples,
                "tokens": self.num_tokens[part.name],
                "share": float(share),
            }
            for part, share in zip(self.source.parts, shares, strict=True)
        }

    @property
    def changes(self) -> tuple[int, ...]:
        """The indices of the global order at which the mixture changes."""
        return self.mixture.changes if self.mixture is not None else ()


# Positions of one batch whose indices are looked at one by one; behind a long skip, only its ends.
_MAX_LOOKED_AT = 100_000


class DataChanges:
    """Tells at which steps the mixture changes: what is announced is no surprise."""

    def __init__(self, changes: Sequence[int], stream: SampleStream, schedule: Schedule) -> None:
        self._changes = changes
        self._stream = stream
        self._schedule = schedule

    def is_change(self, cursor: int, step: int) -> bool:
        """Return whether the batch of `step`, read from `cursor` on, meets a new mixture."""
        if not self._changes:
            return False
        stop = self._stream.cursor_after(cursor, self._schedule.batch_samples_at(step))
        # Changes are places in the order; what was put back makes positions run ahead of them.
        ends = np.array([cursor, stop - 1], dtype=np.int64)
        indices = self._stream.returns.resolve(
            ends if stop - cursor > _MAX_LOOKED_AT else np.arange(cursor, stop, dtype=np.int64)
        )
        first = bisect_left(self._changes, max(1, int(indices.min())))
        return first < len(self._changes) and self._changes[first] <= int(indices.max())


def find_bad_shards(corpora: Mapping[str, Corpus], data: DataSettings, world: World) -> BadShards:
    """Return the problems of files of tokens that cannot be used. A collective.

    Raises: DataError, on all ranks, if there are any, unless `data.on_bad_shard` is skip; held-out
    samples are never skipped, and no source may lose all of its files.
    """
    cache = _cache(data)
    found: dict[str, dict[int, str]] = {}
    for name, corpus in corpora.items():
        found[name] = _problems(corpus, corpus.train, data, cache, world)
        texts = list(found[name].values())
        if corpus.validation is not None and data.validation_samples:
            held_out = _problems(corpus, corpus.validation, data, cache, world)
            if held_out:
                raise DataError(
                    f"source {name}: held-out samples cannot be read: "
                    f"{_without_skipping(next(iter(held_out.values())))}, or set "
                    "data.validation_samples=0"
                )
        if texts and data.on_bad_shard is OnBadShard.STOP:
            raise DataError(
                f"source {name}: {len(texts)} files of tokens cannot be used: "
                f"{'; '.join(texts[:3])}"
            )
        if texts and len(texts) == len(corpus.train.shards):
            raise DataError(
                f"source {name}: none of its {len(texts)} files of tokens can be used: "
                f"{_without_skipping(texts[0])}, or take the source out"
            )
    return {
        name: {number: _without_skipping(text) for number, text in texts.items()}
        for name, texts in found.items()
    }


def _without_skipping(text: str) -> str:
    """Return what to do about a file, but for what the run does already or cannot do."""
    return text.removesuffix(", or set data.on_bad_shard=skip")


def _problems(
    corpus: Corpus, split: Split, data: DataSettings, cache: ShardCache, world: World
) -> dict[int, str]:
    """Return what is wrong with which file; each rank looks at its part. A collective."""
    with closing(TokenStore(corpus, split, cache=cache, verify=data.verify)) as store:
        parts = world.gather(store.problems(slice(world.rank, None, world.size)))
    return dict(sorted(item for part in parts for item in part.items()))


def build_data(
    corpora: Mapping[str, Corpus],
    data: DataSettings,
    *,
    seed: int,
    bad_shards: BadShards | None = None,
) -> RunData:
    """Return the data of a run; no token is read. Raises: DataError if there is too little."""
    cache = _cache(data)
    parts, held_out = [], {}
    for name, corpus in corpora.items():
        numbers = (bad_shards or {}).get(name, {})
        is_bad = frozenset(corpus.train.shards[number].address for number in numbers)
        samples = _samples(corpus, corpus.train, data, cache, is_bad)
        num_trained = samples.num_samples
        if data.validation_samples and corpus.validation is not None:
            apart = _samples(corpus, corpus.validation, data, cache)
            held_out[name] = HeldOut(
                apart, start=0, stop=apart.num_samples, count=data.validation_samples
            )
            if apart.num_samples == 0:
                logger.warning(
                    "source %s: nothing is held out, so it has no validation loss; raise "
                    "data.validation_share=%g",
                    name,
                    data.validation_share,
                )
        elif data.validation_samples:
            num_trained -= data.validation_samples
            held_out[name] = HeldOut(
                samples,
                start=max(0, num_trained),
                stop=samples.num_samples,
                count=data.validation_samples,
            )
            if held_out[name].is_bad():
                raise DataError(
                    f"source {name}: its held-out samples, the end of its tokens, lie in files "
                    "that cannot be used; bring them back, or set data.validation_samples=0"
                )
        if num_trained < 1:
            raise DataError(_too_little(name, corpus, samples.num_samples, data))
        order = SampleOrder(
            num_samples=num_trained,
            seed=seed,
            key=f"{name}:{corpus.digest}",
            block_samples=data.block_samples,
            window_blocks=data.window_blocks,
        )
        parts.append(SourcePart(name=name, samples=samples, order=order))
    mixture = _mixture(parts, data)
    return RunData(
        source=MixedSource(parts, mixture),
        mixture=mixture,
        validation=Validation(held_out, interval_steps=data.validation_interval_steps),
        vocab_size=max((corpus.vocab_size or 0 for corpus in corpora.values()), default=0) or None,
        num_tokens={name: corpus.train.num_tokens for name, corpus in corpora.items()},
    )


def _samples(
    corpus: Corpus,
    split: Split,
    data: DataSettings,
    cache: ShardCache,
    bad_shards: frozenset[str] = frozenset(),
) -> Samples:
    # Digests were compared by `find_bad_shards`, on one rank for all.
    store = TokenStore(corpus, split, cache=cache, bad_shards=bad_shards)
    length, isolates = data.sequence_length, data.isolates_documents
    if data.packing is Packing.BEST_FIT:
        return PackedSamples(
            store,
            sequence_length=length,
            identity=f"{corpus.digest}:{'train' if split is corpus.train else 'validation'}",
            cache_folder=cache_folder(data),
            isolates_documents=isolates,
            padding_id=corpus.separator_id or 0,
        )
    return CutSamples(store, sequence_length=length, isolates_documents=isolates)


def _cache(data: DataSettings) -> ShardCache:
    return ShardCache(cache_folder(data), max_bytes=data.cache_bytes)


def _mixture(parts: list[SourcePart], data: DataSettings) -> Mixture | None:
    """Return the mixture; None if there is one source without an end."""
    sources = data.named_sources()
    limits = [sources[part.name].max_epochs for part in parts]
    if len(parts) == 1 and limits == [None]:
        return None
    weights = {name: settings.weight for name, settings in sources.items()}
    stages = [MixtureStage(start_index=0, weights=_in_order(parts, weights))]
    for stage in sorted(data.stages, key=lambda stage: stage.start.value):
        start = -(-stage.start.value // data.sequence_length)
        ramp = -(-(stage.start.value + stage.ramp.value) // data.sequence_length) - start
        new = MixtureStage(
            start_index=start, weights=_in_order(parts, stage.weights), ramp_indices=ramp
        )
        stages = [old for old in stages if old.start_index != start] + [new]
    return Mixture(
        stages,
        num_samples=[part.order.num_samples for part in parts],
        max_epochs=limits,
    )


def _in_order(parts: list[SourcePart], weights: Mapping[str, float]) -> tuple[Fraction, ...]:
    """Return the weights as they were typed: 0.1 is a tenth."""
    return tuple(Fraction(str(weights.get(part.name, 0.0))) for part in parts)


def warn_of_late_stages(data: DataSettings, schedule: Schedule) -> None:
    """Say which stages the run never comes to."""
    num_tokens = schedule.num_samples * data.sequence_length
    for number, stage in enumerate(data.stages):
        if stage.start.value >= num_tokens:
            logger.warning(
                "data.stages[%d] starts at %s, and the run ends after %s tokens: it has no effect",
                number,
                stage.start,
                f"{num_tokens:,}",
            )


def refuse_short_mixture(run_data: RunData, data: DataSettings, schedule: Schedule) -> None:
    """Refuse a new run that is longer than its mixture. Raises: ConfigError."""
    needed, num_indices = schedule.num_samples, run_data.source.num_indices
    if num_indices is not None and needed > num_indices:
        raise ConfigError(
            [
                f"data.sources: with their max_epochs they give {num_indices:,} samples of "
                f"data.sequence_length={data.sequence_length}, and the run reads {needed:,}; raise "
                "max_epochs, add a source, or lower run.steps"
            ]
        )


def _too_little(name: str, corpus: Corpus, total: int, data: DataSettings) -> str:
    held_out = (
        f", and data.validation_samples={data.validation_samples} are held out"
        if corpus.validation is None and data.validation_samples
        else ""
    )
    return (
        f"the corpus of source {name} has {corpus.train.num_tokens:,} tokens, which make {total} "
        f"samples of data.sequence_length={data.sequence_length}{held_out}: nothing is left to "
        "train on; give more text or lower one of the two"
    )
