"""`trimtab checkpoints`, `verify` and `prune`, on folders made by hand."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from checkpoint_folders import add_checkpoint, flip_a_bit
from click.testing import Result
from typer.testing import CliRunner

from launch import cli
from launch.errors import LaunchError
from launch.paths import training_entry
from monitoring.checkpoints import age_text, size_text
from monitoring.retention import RULES_FILE, Rules

ROOT = training_entry().parent.parent


def trimtab(*arguments: object) -> Result:
    texts = [str(argument) for argument in arguments]
    return CliRunner().invoke(cli.build_app(), texts, catch_exceptions=False)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("step-*"))


def name_of(step: int) -> str:
    return f"step-{step:08d}-clock-{step:08d}"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Five good checkpoints and a candidate, of a run that keeps two good ones."""
    folder = tmp_path / "a-run"
    for step in (10, 20, 30, 40, 50):
        add_checkpoint(folder, step, age_seconds=3600 - 60 * step)
    add_checkpoint(folder, 60, "candidate", age_seconds=30)
    write_rules(folder, Rules(keep_good=2, keep_incidents=1))
    return folder


def write_rules(run: Path, rules: Rules) -> None:
    (run / "checkpoints" / RULES_FILE).write_text(json.dumps(asdict(rules)))


def test_table_has_a_line_a_checkpoint_and_says_why_it_is_kept(run: Path) -> None:
    result = trimtab("checkpoints", run)
    head, *lines, total = result.output.splitlines()
    assert head.split() == [
        *("step", "cursor", "size", "age", "health"),
        *("saved", "as", "files", "kept", "as", "name"),
    ]
    assert len(lines) == 6
    assert "goes: good, and newer ones are" in lines[0]
    assert "newest good, last N good" in lines[4]
    assert lines[5].split()[:5] == ["60", "960", "15", "B", "30"]
    assert "candidate" in lines[5]
    assert "dcp, 2 ranks" in lines[5]
    assert "sizes fit" in lines[5]
    assert total.startswith("6 checkpoints, 90 B; ")
    assert result.exit_code == 0


def test_json_has_one_object_a_line(run: Path) -> None:
    rows = [json.loads(line) for line in trimtab("checkpoints", run, "--json").output.splitlines()]
    assert [row["step"] for row in rows] == [10, 20, 30, 40, 50, 60]
    assert rows[0]["kept"] == []
    assert rows[0]["goes"] == "good, and newer ones are"
    assert rows[-1]["kept"] == ["newest"]
    assert rows[-1]["bytes"] == 15
    assert 30 <= rows[-1]["age_seconds"] < 300


def test_what_an_incident_needs_is_named(run: Path) -> None:
    record = {"phase": "done", "incident": 3, "kept": [name_of(10)]}
    (run / "journal.jsonl").write_text(json.dumps(record) + "\n")
    assert "incident" in trimtab("checkpoints", run).output.splitlines()[1]


def test_a_wrong_size_is_seen_at_once_and_a_flipped_bit_by_reading(run: Path) -> None:
    (run / "checkpoints" / name_of(10) / "state.json").write_bytes(b"{ }")
    flip_a_bit(run / "checkpoints" / name_of(20) / "__0_0.distcp")
    output = trimtab("checkpoints", run).output
    assert output.count("1 wrong") == 1
    assert "state.json has 3 bytes, its manifest says 2" in output
    output = trimtab("checkpoints", run, "--verify").output
    assert output.count("1 wrong") == 2
    assert output.count("digests fit") == 4


def test_damaged_manifest_is_said_and_the_others_are_listed(run: Path) -> None:
    manifest = run / "checkpoints" / name_of(10) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"cursor": 160', '"cursor": 161'))
    output = trimtab("checkpoints", run).output
    assert f"left alone: {manifest} does not match its own digest" in output
    assert "5 checkpoints" in output
    rows = trimtab("checkpoints", run, "--json").output.splitlines()
    assert json.loads(rows[-1])["health"] == "unreadable"


def test_folder_without_rules_is_listed_without_reasons(tmp_path: Path) -> None:
    add_checkpoint(tmp_path / "old", 10, is_sealed=False)
    output = trimtab("checkpoints", tmp_path / "old").output
    assert "kept as" not in output
    assert "sizes fit" in output


def test_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="no run folder"):
        trimtab("checkpoints", tmp_path)


def test_verify_says_each_is_ok_and_how_fast(run: Path) -> None:
    result = trimtab("verify", run)
    assert result.exit_code == 0
    assert result.output.count("ok: 2 files, 15 B, ") == 6
    assert "/s" in result.output


def test_verify_names_the_file_that_is_wrong_and_ends_with_1(run: Path) -> None:
    path = run / "checkpoints" / name_of(20)
    flip_a_bit(path / "__0_0.distcp")
    (path / "state.json").unlink()
    result = trimtab("verify", run)
    assert result.exit_code == 1
    assert f"{path / '__0_0.distcp'} does not match its SHA-256" in result.output
    assert f"{path / 'state.json'} cannot be read (No such file or directory)" in result.output
    assert result.output.count("ok: ") == 5
    assert trimtab("verify", run / "checkpoints" / name_of(10)).exit_code == 0
    assert trimtab("verify", path).exit_code == 1
    assert json.loads((path / "health.json").read_text())["health"] == "good", "only when asked"


def test_old_manifest_has_no_digest_and_is_verified_all_the_same(tmp_path: Path) -> None:
    path = add_checkpoint(tmp_path / "old", 10, is_sealed=False)
    result = trimtab("verify", path)
    assert result.exit_code == 0
    assert "its manifest has no digest of its own" in result.output


def test_verify_quarantines_what_is_wrong_when_asked(run: Path) -> None:
    path = run / "checkpoints" / name_of(20)
    flip_a_bit(path / "state.json")
    result = trimtab("verify", run, "--quarantine")
    assert result.exit_code == 1
    health = json.loads((path / "health.json").read_text())
    assert health["health"] == "quarantined"
    assert "state.json does not match" in health["reason"]
    other = run / "checkpoints" / name_of(30) / "health.json"
    assert json.loads(other.read_text())["health"] == "good"


def test_prune_tells_and_then_does_the_same(run: Path) -> None:
    before = names(run)
    dry = trimtab("prune", run, "--dry-run").output
    assert names(run) == before
    assert f"{name_of(10)}  15 B  good, and newer ones are" in dry
    assert dry.endswith("3 of 6 checkpoints would go, 45 B\n")
    done = trimtab("prune", run).output
    assert done.endswith("3 of 6 checkpoints removed, 45 B\n")
    assert names(run) == [name_of(step) for step in (40, 50, 60)]
    assert trimtab("prune", run).output == "0 of 3 checkpoints removed, 0 B\n"


def test_prune_by_other_rules_never_takes_the_last_good_one(run: Path) -> None:
    output = trimtab("prune", run, "--keep-good", 1, "--disk-budget", "20b").output
    assert "cannot be met: what must stay takes 10 B more" in output
    assert names(run) == [name_of(50), name_of(60)]


def test_prune_keeps_one_of_each_stretch_for_good(run: Path) -> None:
    trimtab("prune", run, "--keep-good", 1, "--keep-every", 20)
    assert names(run) == [name_of(step) for step in (10, 20, 40, 50, 60)]


def test_prune_needs_rules(tmp_path: Path) -> None:
    add_checkpoint(tmp_path / "old", 10)
    with pytest.raises(LaunchError, match="give --keep-good"):
        trimtab("prune", tmp_path / "old")
    assert trimtab("prune", tmp_path / "old", "--keep-good", 1).exit_code == 0
    with pytest.raises(LaunchError, match="expected a size"):
        trimtab("prune", tmp_path / "old", "--keep-good", 1, "--disk-budget", "much")


HOLDER = """
import fcntl, socket, sys, time
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
file.write(f"process 1 on {socket.gethostname()}\\n")
file.flush()
print("held", flush=True)
time.sleep(60)
"""


def test_nothing_is_changed_while_a_run_holds_the_folder(run: Path) -> None:
    flip_a_bit(run / "checkpoints" / name_of(20) / "state.json")
    before = names(run)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run / ".lock")], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            assert trimtab("checkpoints", run).exit_code == 0, "reading is not refused"
            assert trimtab("prune", run, "--dry-run").exit_code == 0
            for command in (["prune", run], ["verify", run, "--quarantine"]):
                with pytest.raises(LaunchError, match="is training, and keeps its checkpoints"):
                    trimtab(*command)
        finally:
            process.kill()
    assert names(run) == before
    health = json.loads((run / "checkpoints" / name_of(20) / "health.json").read_text())
    assert health["health"] == "good"


def test_a_run_last_seen_on_another_host_is_not_touched_unless_forced(run: Path) -> None:
    (run / ".lock").write_text("process 7 on another-host\n")
    with pytest.raises(LaunchError, match="cannot be told from this host"):
        trimtab("prune", run)
    assert len(names(run)) == 6
    trimtab("prune", run, "--force")
    assert len(names(run)) == 3


def test_commands_need_no_torch(run: Path) -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from launch import cli;"
        f"CliRunner().invoke(cli.build_app(), ['checkpoints', {str(run)!r}]);"
        f"CliRunner().invoke(cli.build_app(), ['verify', {str(run)!r}]);"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-5, "0 s"), (59, "59 s"), (600, "10 min"), (3599, "60 min"), (5400, "1.5 h"), (2e5, "2.3 d")],
)
def test_ages_are_short(seconds: float, text: str) -> None:
    assert age_text(seconds) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1500, "1.5 kB"),
        (999_499, "999 kB"),
        (999_600, "1.0 MB"),
        (84_000_000_000, "84.0 GB"),
        (2.4e15, "2400 TB"),
    ],
)
def test_sizes_are_short(num_bytes: float, text: str) -> None:
    assert size_text(num_bytes) == text
