"""The evidence of each incident, kept before the state that shows it is replaced."""

from __future__ import annotations

from pathlib import Path

from train.data.store import CorpusInfo
from train.data.stream import SampleStream
from train.distributed import World
from train.engines.base import Engine
from train.events import Callback, CallbackPhase
from train.recovery.journal import Incident
from train.state import TrainState


class Capsules(Callback):
    """Keeps the last reports, and writes a capsule when a rewind is decided."""

    phase = CallbackPhase.REPORT

    def __init__(
        self,
        folder: Path,
        *,
        engine: Engine,
        stream: SampleStream,
        corpus: CorpusInfo,
        world: World,
    ) -> None:
        self._folder = folder
        self._engine = engine
        self._stream = stream
        self._corpus = corpus
        self._world = world

    def capture(self, intent: Incident, state: TrainState) -> None:
        """Keep what is known now. A collective."""
