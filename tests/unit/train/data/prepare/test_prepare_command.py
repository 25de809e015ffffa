"""The command line: options, progress, the summary, verification, exit codes."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from train.data.prepare.command import main
from train.data.prepare.documents import Advance
from train.data.prepare.progress import Bar, Lines
from train.data.prepare.workers import Workers

pytestmark = pytest.mark.usefixtures("fast_disk")

ROOT = Path(__file__).resolve().parents[5]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    texts = [*(f"text {number}" for number in range(50)), "text 7", ""]
    lines = [json.dumps({"text": text}) for text in texts]
    path.write_text("\n".join([*lines, "bad", "{}", "[]", "5"]))
    return path


def prepare(*arguments: str | Path) -> int:
    return main([str(argument) for argument in arguments])


def test_summary_says_what_there_is_and_how_to_train_on_it(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    code = prepare(source, "--output", out, "--tokenizer=bytes", "--processes=1")
    assert code == 0
    captured = capsys.readouterr()
    assert f"{out} is prepared, after 0." in captured.out
    assert "  train       " in captured.out
    assert (
        "  tokenizer   bytes, 257 tokens, <|endoftext|> (256) behind each document" in captured.out
    )
    assert "1 duplicates, 1 empty documents, 4 bad records" in captured.out
    assert f"    {source}:53 is not JSON (Expecting value)\n" in captured.out
    assert f"    and 1 more; the first of them are in {out}/bad_records.jsonl" in captured.out
    assert f"train on it with: 'data.paths=[{out}]' tokenizer=bytes\n" in captured.out
    assert captured.err.splitlines()[0].startswith("tokenising 0.0 MB")


def test_same_command_again_says_the_same_at_once(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [source, "--output", tmp_path / "out", "--tokenizer=bpe:280", "--processes=1"]
    assert prepare(*arguments) == 0
    first = capsys.readouterr().out.splitlines()[1:]
    assert first[-1].endswith(
        f"tokenizer=file tokenizer.path={tmp_path}/out/tokenizer.json model.vocab_size=280"
    )
    assert prepare(*arguments) == 0
    assert capsys.readouterr().out.splitlines()[1:] == first


def test_whole_folder_is_verified(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    prepare(source, "--output", out, "--tokenizer=bpe:280", "--processes=1")
    assert prepare("--verify", out) == 0
    assert f"{out} is whole: all sizes, digests and documents fit" in capsys.readouterr().out


def damage(path: Path, *, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_each_damage_is_found(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ["--tokenizer=bpe:280", "--processes=1", "--overwrite"]

    def found() -> str:
        assert prepare("--verify", out) == 2
        assert prepare(source, "--output", out, *options) == 0
        return capsys.readouterr().err

    assert prepare(source, "--output", out, *options) == 0
    damage(out / "train-00000.bin", place=40)
    assert "train-00000.bin has other content: its sha256 is" in found()
    with (out / "train-00000.bin").open("ab") as file:
        file.write(b"xx")
    assert "bytes, the manifest says" in found()
    (out / "train-00000.documents.npy").unlink()
    assert "train-00000.documents.npy is missing" in found()
    (out / "tokenizer.json").unlink()
    assert "tokenizer.json is missing" in found()
    (out / "tokenizer.json").write_text("{}")
    assert "tokenizer.json is not the one of the manifest" in found()
    (out / "manifest.json").write_text("{}")
    assert "is None version None, expected trimtab-corpus version 1" in found()
    (out / "manifest.json").write_text("[]")
    assert "manifest.json holds a list, and an object is expected; prepare" in found()
    head = {"format": "trimtab-corpus", "version": 1}
    (out / "manifest.json").write_text(json.dumps(head))
    assert "manifest.json is damaged (dtype is missing); delete" in found()
    (out / "manifest.json").write_text("{")
    assert "manifest.json cannot be read" in found()
    (out / "manifest.json").unlink()
    assert f"{out} is no prepared corpus, or not prepared to the end" in found()


def test_manifest_that_was_edited_is_found(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    prepare(source, "--output", out, "--tokenizer=bytes", "--processes=1")
    path = out / "manifest.json"
    whole = path.read_text()

    def found(old: str, new: str) -> str:
        assert old in whole
        path.write_text(whole.replace(old, new))
        assert prepare("--verify", out) == 2
        return capsys.readouterr().err

    digest = json.loads(whole)["digest"]
    assert f"was edited: what it says has the digest {digest}" in found(digest, "0" * 64)
    assert "was edited: what it says has the digest" in found(
        '"text_key": "text"', '"text_key": "b"'
    )
    assert "51 documents were read and 2 of them" in found('"duplicates": 1', '"duplicates": 2')
    assert "does not say how many documents" in found('"duplicates": 1', '"duplicates": "x"')
    assert "manifest.json lacks settings or counts" in found('"counts": {', '"others": {')


def test_files_that_are_no_part_of_a_corpus_are_named(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    prepare(source, "--output", out, "--tokenizer=bytes", "--processes=1")
    (out / "train-00099.bin").touch()
    capsys.readouterr()
    assert prepare("--verify", out) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["no part of it: train-00099.bin"]


def test_documents_that_do_not_fit_the_tokens_are_found(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import hashlib

    import numpy as np

    out = tmp_path / "out"
    prepare(source, "--output", out, "--tokenizer=bytes", "--processes=1")
    path = out / "train-00000.documents.npy"
    manifest = json.loads((out / "manifest.json").read_text())
    good = np.load(path)

    def found(documents: np.ndarray) -> str:
        np.save(path, documents)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        manifest["splits"]["train"]["shards"][0]["documents_sha256"] = digest
        (out / "manifest.json").write_text(json.dumps(manifest))
        assert prepare("--verify", out) == 2
        return capsys.readouterr().err

    shifted, disordered, unknown = good.copy(), good.copy(), good.copy()
    shifted[0, 1] += 1
    disordered[0, 1] = 0
    unknown[1, 0] = 1
    assert "1 documents have no separator behind them" in found(shifted)
    assert "documents do not begin one after the other" in found(disordered)
    assert "names a file that the manifest does not" in found(unknown)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--output", "out"], "no SOURCES given; name files, folders, globs or addresses"),
        (["SOURCE"], "no --output given; name the folder that the corpus is to be in"),
        (["SOURCE", "--output", "s3://a/b"], "--output=s3://a/b is remote; give a local folder"),
        (["SOURCE", "--output", "out", "--processes=0"], "--processes=0 is too small; use 1"),
        (["SOURCE", "--output", "out", "--max-bad-records=-1"], "--max-bad-records=-1 is too"),
        (["SOURCE", "--verify", "out"], "--verify takes a prepared folder alone; leave SOURCES"),
        (["SOURCE", "--outptu", "out"], "unrecognized arguments: --outptu out; see `trimtab"),
        (
            ["SOURCE", "--output", "out", "--tokenizer=bytes", "--separator=<eos>"],
            "--separator (tokenizer.separator)=<eos> is given, and bytes have a separator of their",
        ),
        (["SOURCE", "--output", "out", "--tokenizer=./no"], "--tokenizer=./no: no cannot be read"),
        (["gone.txt", "--output", "out"], "SOURCES: gone.txt cannot be found; check the globs"),
        (["SOURCE", "--processes=x"], "invalid int value: 'x'; see `trimtab prepare --help`"),
    ],
)
def test_options_that_cannot_be_are_refused(
    source: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert prepare(*(source if word == "SOURCE" else word for word in arguments)) == 2
    assert words in capsys.readouterr().err


def test_interrupt_says_how_to_go_on(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("train.data.prepare.job._run_tasks", interrupt)
    assert prepare(source, "--output", tmp_path / "out", "--tokenizer=bytes") == 130
    assert "interrupted; the same command goes on from here" in capsys.readouterr().err


def test_sigterm_says_how_to_go_on(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(
        "train.data.prepare.job._run_tasks", lambda *_: signal.raise_signal(signal.SIGTERM)
    )
    assert prepare(source, "--output", tmp_path / "out", "--tokenizer=bytes") == 143
    assert "stopped by SIGTERM; the same command goes on from here" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before


def test_interrupt_while_it_is_imported_is_one_line(tmp_path: Path) -> None:
    package = tmp_path / "train" / "data" / "prepare"
    package.mkdir(parents=True)
    (package / "command.py").write_text("raise KeyboardInterrupt")
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    entry = tmp_path / "train" / "prepare.py"
    entry.write_text((ROOT / "train" / "prepare.py").read_text())
    done = subprocess.run([sys.executable, str(entry)], capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert done.stderr == "trimtab: interrupted; nothing was begun\n"


def test_workers_never_hear_what_is_meant_for_their_parent(tmp_path: Path) -> None:
    with Workers(tmp_path, 1, 0) as workers:
        status = Path(f"/proc/{workers._processes[0].pid}/status").read_text()
    (blocked,) = [line.split()[1] for line in status.splitlines() if line.startswith("SigBlk")]
    for number in (signal.SIGINT, signal.SIGTERM):
        assert int(blocked, 16) >> (number - 1) & 1
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_notes_are_in_the_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("été".encode("latin-1"))
    assert prepare(path, "--output", tmp_path / "out", "--tokenizer=bytes") == 0
    out = capsys.readouterr().out
    assert "  note        1 documents are not UTF-8 throughout: what was not became U+FFFD" in out
    assert "  note        no document is held out, at a share of 0.005 of 1; raise" in out


def test_lines_say_how_far_it_is() -> None:
    output = io.StringIO()
    lines = Lines(output, seconds_between=0)
    lines.start(num_bytes=1000, num_bytes_done=100)
    lines.advance(Advance(documents=0, tokens=0, text_bytes=0, source_bytes=0))
    lines.advance(Advance(documents=3, tokens=70, text_bytes=400, source_bytes=400))
    first, unknown, last = output.getvalue().splitlines()
    assert first == "tokenising 0.0 MB of files, 0.0 MB of them done before"
    assert unknown.endswith("--:-- left")
    assert last.startswith("50.0%: 3 documents, 70 tokens, ")
    assert last.endswith("0:00 left")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bar_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    output = Terminal()
    with Bar(output) as bar:
        bar.stage("training the tokenizer")
        bar.start(num_bytes=400, num_bytes_done=0)
        bar.advance(Advance(documents=3, tokens=70, text_bytes=400, source_bytes=400))
    assert "3 documents, 70 tokens" in output.getvalue()


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    script = (
        "import sys\nimport train.data.prepare.command\nimport train.data.prepare.job\n"
        "heavy = {'torch', 'tokenizers', 'pyarrow', 'zstandard', 'fsspec', 'rich', 'pydantic'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
