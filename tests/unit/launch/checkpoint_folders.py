"""Run folders with checkpoints in them, made by hand: no torch, no run."""

import hashlib
import json
import time
from pathlib import Path

from monitoring.checkpoints import sealed


def add_checkpoint(
    run: Path,
    step: int,
    health: str = "good",
    *,
    files: dict[str, bytes] | None = None,
    is_sealed: bool = True,
    age_seconds: float = 60.0,
    format_: str = "dcp",
    num_ranks: int = 2,
) -> Path:
    path = run / "checkpoints" / f"step-{step:08d}-clock-{step:08d}"
    path.mkdir(parents=True)
    files = files or {"__0_0.distcp": b"weights of %d" % step, "state.json": b"{}"}
    entries: dict[str, dict[str, object]] = {}
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        entries[name] = {"bytes": len(content), "sha256": digest}
    manifest: dict[str, object] = {
        "version": 1,
        "step": step,
        "cursor": 16 * step,
        "clock": step,
        "world_size": num_ranks,
        "format": format_,
        "saved_unix_seconds": time.time() - age_seconds,
        "files": entries,
    }
    text = json.dumps(sealed(manifest) if is_sealed else manifest, indent=2, sort_keys=True)
    (path / "manifest.json").write_text(text)
    (path / "health.json").write_text(json.dumps({"health": health, "reason": ""}))
    return path


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
