"""Synthetic run folders: one old journal with a crash, and one whose ladder was climbed."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass, field
from pathlib import Path

Json = dict[str, object]

START = 1_790_000_000.0


@dataclass
class RunScript:
    """Writes a run step by step on a fake clock; every second is accounted for in `spent`.

    With a `boot_id`, records carry the time since boot, as those of a run do; `clock_was_set` is by
    how much the wall clock is wrong from then on.
    """

    folder: Path
    num_steps: int = 400
    time: float = START
    clock: int = 0
    step: int = 0
    cursor: int = 0
    attempt: int = 0
    lr_factor: float = 1.0
    boot_id: str = ""
    clock_was_set: float = 0.0
    metrics: list[Json] = field(default_factory=list)
    events: list[Json] = field(default_factory=list)
    journal: list[Json] = field(default_factory=list)
    spent: dict[str, float] = field(default_factory=dict)
    noise: random.Random = field(default_factory=lambda: random.Random(7))

    def spend(self, name: str, seconds: float) -> None:
        self.time += seconds
        self.spent[name] = self.spent.get(name, 0.0) + seconds

    def event(self, kind: str, **more: object) -> None:
        common = {**self.stamp(), "kind": kind, "attempt": self.attempt}
        self.events.append({**common, "clock": self.clock, "step": self.step, **more})

    def stamp(self) -> Json:
        """The time of a record; since boot, it does not jump."""
        wall = {"time": self.time + self.clock_was_set}
        return {**wall, "uptime": self.time - START + 1e4} if self.boot_id else wall

    def start(self) -> None:
        began = self.time + self.clock_was_set
        self.spend("startup", 12.0)
        since: Json = {"boot_id": self.boot_id, "process_seconds": 12.0} if self.boot_id else {}
        self.event(
            "run_start", process_start_time=began, world_size=2, engine="ddp", host="n1", **since
        )

    def train(
        self, count: int, verdict: str = "ok", kept: bool = True, bump: float = 0.0,
        lost: str = "recomputed",
    ) -> None:  # fmt: skip
        for _ in range(count):
            self.clock, self.step, self.cursor = self.clock + 1, self.step + 1, self.cursor + 8
            self.spend("data_wait", 0.01)
            self.spend("training" if kept else lost, 0.25)
            loss: float | None = 3.1 + 7.7 * math.exp(-self.step / 55) + self.noise.gauss(0, 0.05)
            loss = loss + bump * (0.5 + self.noise.random()) if loss is not None else None
            self.metrics.append(
                {
                    "clock": self.clock,
                    "step": self.step,
                    "cursor": self.cursor,
                    "tokens_seen": self.clock * 8 * 1024,
                    "batch_samples": 8,
                    "loss_nats": None if verdict == "nonfinite" else loss,
                    "grad_norm": 0.9 + abs(self.noise.gauss(0, 0.2)) + 4 * bump,
                    "is_finite": verdict != "nonfinite",
                    "lr": self.lr_factor
                    * 3e-4
                    * min(1.0, self.step / 40)
                    * (1 - 0.6 * self.step / self.num_steps),
                    "update": "vetoed" if verdict in ("nonfinite",) else "applied",
                    "step_seconds": 0.25,
                    "data_seconds": 0.01,
                    "tokens_per_second": 8 * 1024 / 0.26 * self.noise.uniform(0.97, 1.01),
                    "mfu": 0.41,
                    "verdict": "warming_up" if self.step < 20 and verdict == "ok" else verdict,
                    **self.stamp(),
                    "attempt": self.attempt,
                }
            )

    def save(self) -> None:
        self.spend("checkpoint_stall", 0.8)
        path = f"checkpoints/step_{self.step:08d}"
        self.event("checkpoint_saved", seconds=0.8, bytes=1_540_000_000, path=path)

    def evaluate(self, *, seconds: float = 0.5, **losses: float | None) -> None:
        """Held-out losses by source, taken between two steps; the total is their mean."""
        self.spend("evaluation", seconds)
        known = [loss for loss in losses.values() if loss is not None]
        total = sum(known) / len(known) if len(known) == len(losses) else None
        self.event("evaluation", seconds=seconds, loss_nats=total, by_source=losses)

    def rewind(self, incident: int, to_step: int, skip: list[int]) -> None:
        from_step = self.step
        self.spend("rewind", 2.4)
        reason = f"loss 14.2 is 38 deviations above the baseline of 5.1; going back to {to_step}"
        self.event(
            "rewind", seconds=2.4, incident=incident, from_step=from_step, to_step=to_step,
            from_clock=self.clock, skip=skip, reason=reason,
        )  # fmt: skip
        for phase in ("intent", "done"):
            self.journal.append(
                {
                    "incident": incident, "phase": phase, "time": "2026-09-21T10:00:00Z",
                    "rule": "rewind_and_skip", "reason": reason, "verdict": "spike",
                    "onset_step": from_step - 3, "detected_step": from_step,
                    "detected_clock": self.clock, "target_step": to_step,
                    "target_checkpoint": f"step_{to_step:08d}", "skip": skip,
                    "quarantine": [f"step_{to_step + 50:08d}"], "clock": self.clock, "crc": "0",
                }
            )  # fmt: skip
        self.step, self.cursor = to_step, skip[1]

    def record(self, incident: int, rung: str, phase: str = "done", **more: object) -> Json:
        """Append a journal record of the present form; defaults are those of a thing done here."""
        entry: Json = {
            "incident": incident, "attempt": 1, "rung": rung, "phase": phase, "rule": "ladder",
            "time": f"2026-09-21T10:{len(self.journal):02d}:00.000+00:00", "code": "",
            "reason": f"because of {rung}", "verdict": "spike", "onset_step": self.step,
            "detected_step": self.step, "target_step": self.step, "target_checkpoint": "",
            "clock": self.clock, "skip": [0, 0], "returned": None, "quarantine": [], "kept": [],
            "lr_scale": 1.0, "lr_from_step": 0, "lr_until_step": 0, "lr_return_step": 0,
            "rewinds": 0, "request": "", "crc": "0", **more,
        }  # fmt: skip
        self.journal.append(entry)
        return entry

    def climb(self, incident: int, attempt: int, rung: str, to_step: int, **more: object) -> None:
        """Go back as one attempt of an incident: intent, done, and the event."""
        fields: Json = {
            "attempt": attempt, "onset_step": self.step - 3, "target_step": to_step,
            "target_checkpoint": f"step-{to_step:08d}-clock-{to_step:08d}",
            "reason": f"spike at step {self.step - 3}, found at step {self.step}, grad_norm led by "
            "2, 38.1 sigma over its baseline",
            **more,
        }  # fmt: skip
        from_step = self.step
        self.spend("rewind", 0.4)
        for phase in ("intent", "done"):
            entry = self.record(incident, rung, phase, detected_step=from_step, **fields)
        self.event(
            "rewind", seconds=0.4, incident=incident, rung=rung, from_step=from_step,
            to_step=to_step, from_clock=self.clock, skip=entry["skip"], reason=entry["reason"],
        )  # fmt: skip
        self.step = to_step

    def crash(self, back_to_step: int) -> None:
        self.spend("restart", 30.0)
        self.clock -= self.step - back_to_step
        self.step = back_to_step
        self.attempt += 1

    def write(self, name: str = "falcon_like", summary: Json | None = None) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        identity = {"run_id": "a1b2c3d4", "name": name, "created_utc": "2026-09-21T09:46:40Z"}
        (self.folder / "run.json").write_text(json.dumps(identity))
        (self.folder / "config.yaml").write_text(f"name: {name}\noptim:\n  lr: 0.0003\n")
        for stem in ("metrics", "events", "journal"):
            lines = [json.dumps(record) + "\n" for record in getattr(self, stem)]
            (self.folder / f"{stem}.jsonl").write_text("".join(lines))
        if summary is not None:
            (self.folder / "summary.json").write_text(json.dumps(summary))
        return self.folder


def play_recovered_run(script: RunScript) -> None:
    """400 steps: a spike at 184 that a rewind to 150 heals, a crash at 300, and an evaluation."""
    script.start()
    script.train(100)
    script.save()
    script.train(50)
    script.save()
    script.event("checkpoint_promoted")
    script.train(30, kept=False)
    script.train(4, verdict="spike", kept=False, bump=14.0, lost="skipped_tokens")
    script.rewind(1, to_step=150, skip=[1440, 1504])
    script.train(100)
    script.save()
    script.train(40, kept=False)
    script.crash(back_to_step=250)
    script.start()
    script.train(30)
    script.train(1, verdict="nonfinite", kept=False)
    script.train(119)
    script.spend("evaluation", 5.0)
    script.event("evaluation", seconds=5.0, loss_nats=3.22)
    script.save()
    script.event("run_end", reason="completed")


def play_ladder_run(script: RunScript) -> None:
    """A spike that a replay does not heal and a skip does, a second one cooled, and an operator."""
    script.start()
    script.train(100)
    script.record(9, "replay", "observed", target_checkpoint="step-00000050-clock-00000050")
    script.train(50)
    script.save()
    script.spend("checkpoint_stall", 0.02)
    script.event("snapshot", seconds=0.02)
    for attempt, rung, skip in ((1, "replay", [1200, 1200]), (2, "skip", [1200, 1264])):
        script.train(30, kept=False)
        script.train(4, verdict="spike", kept=False, bump=14.0)
        script.climb(1, attempt, rung, 150, skip=skip)
    script.train(60)
    script.train(1, verdict="nonfinite", kept=False)
    script.record(0, "veto", verdict="nonfinite", reason="nonfinite at step 211; refused")
    script.train(39)
    script.record(2, "skip_ahead", rule="operator", verdict="", skip=[2000, 2100], request="a")
    script.event("ledger_change", incident=2, rung="skip_ahead", skip=[2000, 2100], returned=None)
    script.train(20, kept=False)
    script.train(3, verdict="divergence", kept=False, bump=9.0)
    script.climb(3, 1, "cool", 250, skip=[2300, 2364], lr_scale=0.5, verdict="divergence")
    script.lr_factor = 0.5
    script.train(70)
    script.lr_factor = 1.0
    script.record(
        4, "unskip", rule="operator", verdict="", returned=[9000, 1200, 1264], request="b"
    )
    script.train(80)
    script.event("run_end", reason="completed")
