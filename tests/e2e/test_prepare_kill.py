"""SIGKILL of preparations at random moments: the corpus is the undisturbed one, to the byte."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NUM_KILLS = 20
DEADLINE_SECONDS = 120.0


def write_text(folder: Path) -> None:
    """A few MB in three files, with documents that come again far away."""
    source = random.Random(5)
    words = ["".join(source.choices("abcdefghij", k=source.randint(2, 8))) for _ in range(2000)]
    texts = [" ".join(source.choices(words, k=source.randint(5, 300))) for _ in range(1500)]
    texts[1400:1460] = texts[40:100]
    folder.mkdir()
    for name, part in (("a", texts[:1300]), ("b", texts[1300:])):
        lines = [json.dumps({"text": text}) for text in part]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    (folder / "c.txt").write_text("\n".join(texts[:500]))


def command(folder: Path, output: Path, num_processes: int) -> list[str]:
    entry = [sys.executable, str(ROOT / "train" / "prepare.py"), str(folder)]
    options = ["--tokenizer=bpe:300", "--shard-tokens=80000", "--validation-share=0.1"]
    return [*entry, f"--output={output}", *options, f"--processes={num_processes}"]


def start(folder: Path, output: Path, num_processes: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command(folder, output, num_processes),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def wait_for_the_end_of_all(group: int) -> None:
    """Workers see that their parent is gone, and go."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)
    pytest.fail("a worker outlived the command")


def test_killed_preparations_end_in_the_undisturbed_corpus(tmp_path: Path) -> None:
    write_text(tmp_path / "in")
    started = time.monotonic()
    assert start(tmp_path / "in", tmp_path / "whole", 2).wait(DEADLINE_SECONDS) == 0
    seconds = time.monotonic() - started
    expected = files_of(tmp_path / "whole")
    assert len([name for name in expected if name.endswith(".bin")]) > 8

    dice = random.Random(11)
    num_kills = num_whole = 0
    stages = set()
    output = tmp_path / "killed-0"
    while num_kills < NUM_KILLS:
        process = start(tmp_path / "in", output, dice.choice([1, 2, 3]))
        try:
            assert process.wait(dice.uniform(0.1, 0.8) * seconds) == 0
            assert files_of(output) == expected
            num_whole += 1
            output = tmp_path / f"killed-{num_whole}"
            continue
        except subprocess.TimeoutExpired:
            num_kills += 1
        if dice.random() < 0.5:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            os.kill(process.pid, signal.SIGKILL)
        process.wait()
        left = [path.name for path in output.glob(".work/*")]
        stages |= {name.partition("-")[0] for name in left}
        assert (output / "manifest.json").exists() <= (files_of_whole(output) == expected)
    assert start(tmp_path / "in", output, 1).wait(DEADLINE_SECONDS) == 0
    assert files_of(output) == expected
    assert "task" in stages
    wait_for_the_end_of_all(process.pid)


def files_of_whole(folder: Path) -> dict[str, bytes]:
    """The corpus alone: a kill behind the manifest may have left the work folder."""
    found = folder.iterdir() if folder.exists() else ()  # on a busy machine nothing had begun
    return {path.name: path.read_bytes() for path in found if path.is_file()}
