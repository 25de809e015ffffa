"""The watchdog: no run waits for ever.

A thread of each rank looks at this rank's pulse. When a phase takes too long, all ranks write their
stacks, the one that noticed first names the ranks that the others wait for, and all end, so that
the launcher starts them again. It never waits for the store or for a collective.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from train.health.hangs import Suspects, describe, suspects, write_hang, write_stacks
from train.health.heartbeats import Heartbeat, Heartbeats, end_process
from train.health.outcome import HANG, REQUEUE_EXIT_CODE
from train.health.pulse import Phase, Pulse
from train.settings import HealthSettings

logger = logging.getLogger(__name__)

_UNLEARNT = frozenset({Phase.START, Phase.COMPILE, Phase.END})


def is_timeout(error: BaseException) -> bool:
    """Return whether a collective has waited in vain: other ranks are there, but do not answer."""
    is_plain = isinstance(error, RuntimeError) and type(error).__module__.startswith(
        ("builtins", "torch")
    )
    return is_plain and re.search(r"timed? ?out", str(error), re.IGNORECASE) is not None


def limit_seconds(
    settings: HealthSettings, phase: Phase, longest_seconds: Mapping[Phase, float]
) -> float:
    """Return how long a phase may take; what was never seen to end has the limit of the start."""
    if phase in _UNLEARNT or phase not in longest_seconds:
        return max(settings.start_seconds, settings.hang_seconds)
    return max(settings.hang_seconds, settings.hang_factor * longest_seconds[phase])


class Watchdog:
    """Watches one rank.

    `on_hang` writes down the end: code, exit code, reason; False if another rank has.
    """

    def __init__(
        self,
        settings: HealthSettings,
        pulse: Pulse,
        heartbeats: Heartbeats | None,
        *,
        run_folder: Path,
        attempt: int,
        rank: int,
        size: int,
        on_hang: Callable[[str, int, str], bool],
    ) -> None:
        self._settings = settings
        self._pulse = pulse
        self._heartbeats = heartbeats
        self._run_folder = run_folder
        self._folder = run_folder / "hangs" / f"attempt-{attempt}"
        self._attempt = attempt
        self._rank = rank
        self._size = size
        self._on_hang = on_hang
        self._interval_seconds = min(1.0, settings.heartbeat_seconds)
        self._patience_seconds = 3 * settings.heartbeat_seconds + 2
        self._words_since: float | None = None
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def close(self) -> None:
        """Stop watching."""
        self._is_closed.set()
        self._thread.join(timeout=5)

    def alarm_now(self) -> None:
        """Treat a collective that has timed out as the hang that it is; does not return.

        Otherwise the launcher would wait for a stopped rank as long as it waits for one that saves.
        """
        self._is_closed.set()
        beat = self._pulse.now
        self._alarm(beat.phase, beat.step, time.monotonic() - beat.since)

    def _watch(self) -> None:
        paused_seconds = 0.0
        beat = self._pulse.now
        before = time.monotonic()
        while not self._is_closed.wait(self._interval_seconds):
            now = time.monotonic()
            if self._pulse.now is not beat:
                beat, paused_seconds = self._pulse.now, 0.0
            # A process that was stopped and goes on has not waited all that time.
            lateness = now - before - self._interval_seconds
            paused_seconds += lateness if lateness > 2 * self._interval_seconds else 0.0
            before = now
            waited = now - beat.since - paused_seconds
            if self._heartbeats is not None:
                if "alarm" in self._heartbeats.heard:
                    self._join_alarm(self._heartbeats)
                self._follow_the_dead(self._heartbeats, now)
            limit = limit_seconds(self._settings, beat.phase, self._pulse.longest_seconds)
            if waited > limit and self._pulse.now is beat:
                self._alarm(beat.phase, beat.step, waited)

    def _alarm(self, phase: Phase, step: int, waited: float) -> None:
        """Tell all, find out who is to blame, and end; if another rank was first, join it."""
        logger.error(
            "rank %d: %s of step %d has taken %.0f s; looking for who is to blame",
            *(self._rank, phase, step, waited),
        )
        line = self._heartbeats
        if line is not None:
            line.say("alarm", {"phase": str(phase), "step": step})
            alarm = line.hear("alarm", self._patience_seconds)
            if alarm is not None and alarm["rank"] != self._rank:
                self._join_alarm(line)
        self._write_stacks()
        found, beats = self._look_around(line)
        reason = f"{phase} of step {step} hung for {waited:.0f} s; {describe(found, beats)}"
        logger.error("%s; stacks of all ranks are in %s", reason, self._folder)
        hang = {
            "kind": "hang",
            "time": time.time(),
            "attempt": self._attempt,
            "seconds": waited,
            "phase": str(phase),
            "step": step,
            "ranks": list(found.ranks),
            "why": found.why,
            "reason": reason,
        }
        if self._on_hang(HANG, REQUEUE_EXIT_CODE, reason):
            known = [beats[rank] for rank in sorted(beats)]
            write_hang(self._folder, self._run_folder, hang, known)
        if line is not None:
            silent = found.ranks if found.is_silent else ()
            line.say("done", {"silent": list(silent)})
            line.hear("done", self._patience_seconds)
            self._end_stopped(silent, beats)
        os._exit(REQUEUE_EXIT_CODE)

    def _look_around(self, line: Heartbeats | None) -> tuple[Suspects, dict[int, Heartbeat]]:
        """Read everybody's heartbeat twice, more than an interval apart."""
        if line is None:
            return Suspects(ranks=(self._rank,), why="alone"), {}
        first = dict(self._read(line))
        time.sleep(1.5 * self._settings.heartbeat_seconds)
        second = dict(self._read(line))
        if not first or not second:
            where = os.environ.get("MASTER_ADDR", "?")
            why = f"the store on {where} does not answer: rank 0, or its host, is stopped or gone"
            return Suspects(ranks=(0,), why=why, is_silent=True), line.beats
        return suspects(first, second, self._size), second

    def _read(self, line: Heartbeats) -> dict[int, Heartbeat]:
        line.read_all()
        reads, deadline = line.reads, time.monotonic() + self._patience_seconds
        while line.reads < reads + 2:  # the one under way may have begun before
            if time.monotonic() > deadline:
                return {}
            time.sleep(0.02)
        return line.beats

    def _join_alarm(self, line: Heartbeats) -> None:
        """Write this rank's stacks, wait for the verdict, and end."""
        self._write_stacks()
        line.read_all()
        done = line.hear("done", 4 * self._patience_seconds) or {}
        silent = tuple(done.get("silent", ()))
        if silent:
            self._read(line)
        self._end_stopped(silent, line.beats)
        os._exit(REQUEUE_EXIT_CODE)

    def _follow_the_dead(self, line: Heartbeats, now: float) -> None:
        """End if another rank has failed and this one waits for it in vain, as it may with NCCL."""
        words = line.heard.get("words")
        if words is None or words["rank"] == self._rank:
            return
        if self._words_since is None:
            self._words_since = now
        elif now - self._words_since > self._patience_seconds:
            self._on_hang(words["code"], words["exit_code"], words["reason"])
            os._exit(words["exit_code"])

    def _end_stopped(self, ranks: tuple[int, ...], beats: Mapping[int, Heartbeat]) -> None:
        """End the stopped processes of this host: they cannot end themselves."""
        for rank in ranks:
            if rank != self._rank and rank in beats and end_process(beats[rank]):
                logger.error("rank %d, process %d, was ended", rank, beats[rank].pid)

    def _write_stacks(self) -> None:
        try:
            write_stacks(self._folder, self._rank)
        except OSError as error:
            logger.error("stacks of rank %d cannot be written (%s)", self._rank, error)
