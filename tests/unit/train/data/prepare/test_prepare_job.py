"""Whole preparations: origins, splits, duplicates, what is taken up, and what is in the way."""

from __future__ import annotations

import errno
import gzip
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from tokenizers import Tokenizer, models

from train.data.prepare import job as job_module
from train.data.prepare.job import run_job
from train.data.prepare.notes import notes
from train.data.prepare.progress import Silence
from train.data.prepare.recipe import Recipe
from train.data.prepare.sources import list_sources
from train.data.prepare.task import TaskRunner
from train.data.prepare.tokenizer import TokenizerChoice
from train.data.prepare.verify import verify_folder
from train.data.prepare.work_folder import Job
from train.data.prepare.workers import Workers
from train.errors import DataError

pytestmark = pytest.mark.usefixtures("fast_disk")

RECIPE = Recipe(validation_share=0.0, shard_tokens=1000)
END = 256


def write_lines(path: Path, *texts: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def job_of(folder: Path, *paths: Path | str, **changes: Any) -> Job:
    values: dict[str, Any] = {
        "folder": folder / "out",
        "sources": list_sources([str(path) for path in paths]),
        "recipe": RECIPE,
        "tokenizer": TokenizerChoice(kind="bytes"),
    }
    return Job(**{**values, **changes})


def run(job: Job) -> dict[str, Any]:
    manifest = run_job(job, Silence())
    assert verify_folder(job.folder) == []
    return manifest


def documents(folder: Path, split: str = "train") -> list[tuple[str, str, int]]:
    """Return text, file and line of all documents of a prepared folder of bytes."""
    manifest = json.loads((folder / "manifest.json").read_text())
    found = []
    for shard in manifest["splits"][split]["shards"]:
        tokens = np.fromfile(folder / shard["file"], dtype=manifest["dtype"])
        rows = np.load(folder / shard["documents_file"])
        ends = [*rows[0][1:], len(tokens)]
        for (start, file, line), end in zip(rows.T, ends, strict=True):
            assert tokens[end - 1] == END
            text = bytes(tokens[start : end - 1].tolist()).decode()
            found.append((text, manifest["files"][file], int(line)))
    return found


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def texts(count: int, start: int = 0) -> list[str]:
    return [f"document {number} {'x' * (number % 90)}" for number in range(start, start + count)]


# What comes out.


def test_each_document_has_its_file_and_line_whatever_the_tasks(tmp_path: Path) -> None:
    a = write_lines(tmp_path / "in" / "a.jsonl", *texts(900))
    b = write_lines(tmp_path / "in" / "b.jsonl", *texts(10, 900))
    (tmp_path / "in" / "c.txt").write_text("a whole\nfile")
    job = job_of(tmp_path, tmp_path / "in", recipe=replace(RECIPE, shard_tokens=2000))
    manifest = run(job)
    assert len(manifest["splits"]["train"]["shards"]) > 10
    assert documents(job.folder) == [
        *((text, str(a), line) for line, text in enumerate(texts(900), start=1)),
        *((text, str(b), line) for line, text in enumerate(texts(10, 900), start=1)),
        ("a whole\nfile", str(tmp_path / "in" / "c.txt"), 0),
    ]
    assert manifest["counts"] == {
        "documents_read": 911,
        "duplicates": 0,
        "empty": 0,
        "bad_records": 0,
        "characters": sum(map(len, texts(910))) + 12,
        "not_utf8": 0,
        "json_as_text": 0,
    }
    assert manifest["files_num_bytes"] == [
        Path(address).stat().st_size for address in manifest["files"]
    ]


def test_rows_of_parquet_are_numbered_over_all_tasks(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"text": texts(900)}), tmp_path / "a.parquet", row_group_size=50)
    job = job_of(tmp_path, tmp_path / "a.parquet")
    run(job)
    assert len(list(job.folder.glob("train-*.bin"))) > 3
    expected = list(enumerate(texts(900), start=1))
    assert [(line, text) for text, _, line in documents(job.folder)] == expected


def test_first_of_equal_documents_stays_over_all_tasks(tmp_path: Path) -> None:
    all_texts = [*texts(400), "twice", *texts(400, 400), "twice", *texts(50), "", "twice"]
    path = write_lines(tmp_path / "a.jsonl", *all_texts)
    job = job_of(tmp_path, path)
    manifest = run(job)
    expected = [*texts(400), "twice", *texts(400, 400)]
    assert [text for text, _, _ in documents(job.folder)] == expected
    assert [line for _, _, line in documents(job.folder)] == list(range(1, 802))
    assert (manifest["counts"]["duplicates"], manifest["counts"]["empty"]) == (52, 1)
    names = sorted(path.name for path in job.folder.glob("train-*.bin"))
    assert names == [f"train-{number:05d}.bin" for number in range(len(names))]


def test_duplicates_stay_if_they_are_to(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", "a", "b", "a")
    job = job_of(tmp_path, path, recipe=replace(RECIPE, deduplicate=False))
    run(job)
    assert [text for text, _, _ in documents(job.folder)] == ["a", "b", "a"]


def test_split_depends_on_the_text_alone(tmp_path: Path) -> None:
    recipe = replace(RECIPE, validation_share=0.3)
    path = write_lines(tmp_path / "a.jsonl", *texts(300))
    reverse = write_lines(tmp_path / "b.jsonl", *reversed(texts(300)))
    lower = replace(recipe, validation_share=0.1)
    jobs = [
        job_of(tmp_path / "1", path, recipe=recipe),
        job_of(tmp_path / "2", reverse, recipe=replace(recipe, shard_tokens=100_000)),
        job_of(tmp_path / "3", path, recipe=lower),
    ]
    found = []
    for job in jobs:
        run(job)
        found.append({text for text, _, _ in documents(job.folder, "validation")})
        assert len(found[-1]) + len(documents(job.folder)) == 300
    assert found[0] == found[1]
    assert found[2] < found[0]
    assert 60 < len(found[0]) < 120


def test_document_longer_than_a_piece_is_one_document(tmp_path: Path) -> None:
    text = "".join(f"line {number} of a long document\n" for number in range(2000))
    path = write_lines(tmp_path / "a.jsonl", "before", text, "after")
    (tmp_path / "b.txt").write_text(text + "the end")
    sources = [path, tmp_path / "b.txt"]
    recipe = replace(RECIPE, piece_characters=500, validation_share=0.5)
    pieces = job_of(tmp_path / "1", *sources, recipe=recipe)
    whole = job_of(tmp_path / "2", *sources, recipe=replace(recipe, piece_characters=10**6))
    run(pieces)
    run(whole)
    for split in ("train", "validation"):
        assert documents(pieces.folder, split) == documents(whole.folder, split)
    assert len(documents(pieces.folder)) + len(documents(pieces.folder, "validation")) == 4


def test_pieces_have_the_tokens_of_the_whole(tmp_path: Path) -> None:
    text = "".join(f"def function_{n}(x):\n    return x + {n}\n\n\n" for n in range(500))
    (tmp_path / "a.txt").write_text(text)
    choice = TokenizerChoice(kind="bpe", vocab_size=400)
    found = []
    for size in (400, 10**6):
        recipe = replace(RECIPE, piece_characters=size)
        job = job_of(tmp_path / str(size), tmp_path / "a.txt", recipe=recipe, tokenizer=choice)
        found.append(run(job)["splits"]["train"]["shards"][0]["sha256"])
    assert found[0] == found[1]


def test_text_in_two_normal_forms_is_one_document(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", "ﬁne e\u0301", "fine \u00e9", "ﬁne \u00e9")
    for form, expected in {"none": 3, "nfc": 2, "nfkc": 1}.items():
        job = job_of(tmp_path / form, path, recipe=replace(RECIPE, normalise=form))
        assert run(job)["splits"]["train"]["num_documents"] == expected


def test_result_is_the_same_with_any_number_of_processes(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", *texts(900))
    one = job_of(tmp_path / "1", path)
    two = job_of(tmp_path / "2", path, num_processes=2)
    run(one)
    run(two)
    assert files_of(one.folder) == files_of(two.folder)


def test_remote_files_are_read_and_named_by_address(tmp_path: Path) -> None:
    system = fsspec.filesystem("memory")
    system.pipe("/corpus/a.jsonl", b'{"text": "one"}\n{"text": "two"}\n')
    system.pipe("/corpus/b.txt", b"three")
    try:
        job = job_of(tmp_path, "memory://corpus", num_processes=2)
        run(job)
    finally:
        system.rm("/corpus", recursive=True)
    assert documents(job.folder) == [
        ("one", "memory:///corpus/a.jsonl", 1),
        ("two", "memory:///corpus/a.jsonl", 2),
        ("three", "memory:///corpus/b.txt", 0),
    ]


# Bad records.


def test_bad_records_are_listed_with_their_line_in_the_whole_file(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", *texts(900))
    lines = path.read_text().splitlines()
    lines[400], lines[800] = "bad", "{}"
    path.write_text("\n".join(lines))
    job = job_of(tmp_path, path, max_bad_records=2)
    assert run(job)["counts"]["bad_records"] == 2
    listed = [json.loads(x) for x in (job.folder / "bad_records.jsonl").read_text().splitlines()]
    assert listed == [
        {"file": str(path), "line": 401, "reason": "is not JSON (Expecting value)"},
        {"file": str(path), "line": 801, "reason": "has no text under 'text'"},
    ]
    assert (documents(job.folder)[400][2], documents(job.folder)[-1][2]) == (402, 900)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_more_bad_records_than_allowed_stop_it_at_a_line(
    tmp_path: Path, num_processes: int
) -> None:
    path = write_lines(tmp_path / "a.jsonl", *texts(900))
    lines = path.read_text().splitlines()
    lines[850] = "bad"
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"a\.jsonl: line 851 is not JSON \(.*\); each line of a"):
        run(job_of(tmp_path, path, num_processes=num_processes))


def test_bad_records_of_all_tasks_count_together(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", *texts(900))
    lines = path.read_text().splitlines()
    lines[100] = lines[850] = "bad"
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"more than 1 bad records: raise data\.max_bad_records"):
        run(job_of(tmp_path, path, max_bad_records=1))


def test_document_whose_end_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"text " * 1000 + b"\0")
    (tmp_path / "b.txt").write_bytes(b"good")
    recipe = replace(RECIPE, piece_characters=100)
    job = job_of(tmp_path, tmp_path / "a.txt", tmp_path / "b.txt", recipe=recipe, max_bad_records=1)
    assert run(job)["counts"]["documents_read"] == 1
    assert [text for text, _, _ in documents(job.folder)] == ["good"]


def test_damaged_file_stops_it_at_once_whatever_the_limit(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "a.jsonl", "a")
    (tmp_path / "in" / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 99)[:-9])
    with pytest.raises(DataError, match=r"b\.jsonl\.gz cannot be unpacked .*; get it once more"):
        run(job_of(tmp_path, tmp_path / "in", max_bad_records=1000))


def test_documents_that_are_not_utf8_are_counted_once_each(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("é and à, ".encode("latin-1") * 100)
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "a\xff"}\n{"text": "b"}\n{"text": "\\ud800"}\n')
    recipe = replace(RECIPE, piece_characters=100)
    manifest = run(job_of(tmp_path, tmp_path / "a.txt", tmp_path / "b.jsonl", recipe=recipe))
    assert (manifest["counts"]["documents_read"], manifest["counts"]["not_utf8"]) == (4, 3)
    assert "3 documents are not UTF-8 throughout: what was not became" in notes(manifest)[0]


def test_json_texts_that_look_like_records_are_counted(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.json").write_text('[{"text": "a"}, {"text": "b"}]')
    (tmp_path / "in" / "b.json").write_text('{"name": "no record"}')
    (tmp_path / "in" / "c.txt").write_text('{"text": "no json, it says"}')
    manifest = run(job_of(tmp_path, tmp_path / "in"))
    assert manifest["counts"]["json_as_text"] == 1
    assert "1 .json files have a field 'text', and each was read as one text" in notes(manifest)[0]


# What is odd, and said.


def test_usual_corpus_has_no_notes(tmp_path: Path) -> None:
    choice = TokenizerChoice(kind="bpe", vocab_size=280)
    path = write_lines(tmp_path / "a.jsonl", *texts(300))
    recipe = replace(RECIPE, validation_share=0.1)
    assert notes(run(job_of(tmp_path, path, recipe=recipe, tokenizer=choice))) == []


def test_tokenizer_that_is_not_what_was_asked_for_is_noted(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", *texts(20))
    choice = TokenizerChoice(kind="bpe", vocab_size=10_000)
    (note,) = notes(run(job_of(tmp_path / "1", path, tokenizer=choice)))
    assert "tokens, 10,000 were asked for: the text is too small for more" in note
    given = tmp_path / "given.json"
    given.write_text(str(Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")).to_str()))
    choice = TokenizerChoice(kind="file", path=str(given))
    (note,) = notes(run(job_of(tmp_path / "2", path, tokenizer=choice)))
    assert "no separator that is known: <|endoftext|> was added to it, as token 2; name" in note


def test_split_without_documents_is_noted(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", "one")
    job = job_of(tmp_path, path, recipe=replace(RECIPE, validation_share=0.001))
    (note,) = notes(run(job))
    assert note.startswith("no document is held out, at a share of 0.001 of 1; raise --validation")


# What is taken up.


def test_what_was_done_before_a_stop_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_lines(tmp_path / "a.jsonl", *texts(900))
    undisturbed = job_of(tmp_path / "1", path)
    run(undisturbed)
    done: list[int] = []
    original = TaskRunner.run

    def stop_at_third(self: TaskRunner, task: Any, number: int) -> Any:
        if len(done) == 2:
            done.append(-1)
            raise KeyboardInterrupt
        done.append(number)
        return original(self, task, number)

    monkeypatch.setattr(TaskRunner, "run", stop_at_third)
    job = job_of(tmp_path / "2", path)
    with pytest.raises(KeyboardInterrupt):
        run(job)
    assert not (job.folder / "manifest.json").exists()
    run(job)
    assert done[:4] == [0, 1, -1, 2]
    assert files_of(job.folder) == files_of(undisturbed.folder)


def test_finished_corpus_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of(tmp_path, write_lines(tmp_path / "a.jsonl", "a"))
    manifest = run(job)
    (job.work).mkdir()
    monkeypatch.setattr(job_module, "_run_tasks", None)
    assert run(job) == manifest
    assert not job.work.exists()


def half_done(folder: Path, *paths: Path, **changes: Any) -> Job:
    job = job_of(folder, *paths, **changes)
    with pytest.MonkeyPatch.context() as patch:

        def stop(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(job_module.Finish, "run", stop)
        with pytest.raises(KeyboardInterrupt):
            run_job(job, Silence())
    return job


def test_files_that_changed_since_are_refused_and_named(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", "a")
    half_done(tmp_path, path)
    write_lines(path, "other")
    with pytest.raises(DataError, match=r"1 of its files came, .* \(.*a\.jsonl\); use --overwrite"):
        run(job_of(tmp_path, path))
    run(job_of(tmp_path, path, overwrite=True))
    assert [text for text, _, _ in documents(tmp_path / "out")] == ["other"]


def test_plan_that_nothing_is_done_of_gives_way_to_another(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", "a")
    given = tmp_path / "given.json"
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(given))
    wrong = TokenizerChoice(kind="file", path=str(given), separator="<s>")
    with pytest.raises(DataError, match=r"has no such token; give one that it has, such as </s>"):
        run(job_of(tmp_path, path, tokenizer=wrong))
    right = replace(wrong, separator="</s>")
    assert run(job_of(tmp_path, path, tokenizer=right))["tokenizer"]["separator_id"] == 1


def test_other_settings_for_a_half_done_output_are_refused_and_named(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", "a")
    half_done(tmp_path, path)
    other = job_of(tmp_path, path, recipe=replace(RECIPE, normalise="nfc"))
    with pytest.raises(DataError, match=r"\(normalise: 'none' there, 'nfc' here\); use those"):
        run(other)
    run(replace(other, overwrite=True))


def test_finished_corpus_of_other_settings_or_files_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", "a")
    run(job_of(tmp_path, path))
    with pytest.raises(DataError, match=r"prepared with other settings \(deduplicate: True there"):
        run(job_of(tmp_path, path, recipe=replace(RECIPE, deduplicate=False)))
    with pytest.raises(DataError, match="holds a corpus of other files; give another --output"):
        run(job_of(tmp_path, write_lines(tmp_path / "b.jsonl", "a")))
    run(job_of(tmp_path, tmp_path / "b.jsonl", overwrite=True))


def test_finished_corpus_of_files_that_changed_since_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_lines(tmp_path / "a.jsonl", "a")
    manifest = run(job_of(tmp_path, path))
    later_ns = time.time_ns() + 10**12
    os.utime(path, ns=(later_ns, later_ns))
    assert run(job_of(tmp_path, path)) == manifest
    assert "1 of its files were written since it was finished, at the same size" in caplog.text
    write_lines(path, "a", "more")
    with pytest.raises(
        DataError,
        match=r"1 files that changed since \(.*a\.jsonl: 14 bytes then, 31 now\); use --overwrite",
    ):
        run(job_of(tmp_path, path))
    run(job_of(tmp_path, path, overwrite=True))


def test_finished_corpus_of_an_earlier_version_is_taken(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", "a")
    manifest = run(job_of(tmp_path, path))
    del manifest["files_num_bytes"], manifest["counts"]["not_utf8"]
    del manifest["counts"]["json_as_text"]
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    assert notes(run(job_of(tmp_path, path))) == []


def test_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", "a")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match=r"is not empty \(thesis\.txt\); give a new folder"):
        run(job_of(tmp_path, path))
    with pytest.raises(DataError, match=r"no part of a corpus \(thesis\.txt\); give a new"):
        run(job_of(tmp_path, path, overwrite=True))
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    import fcntl

    job = half_done(tmp_path, write_lines(tmp_path / "a.jsonl", "a"))
    with (job.work / "lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(DataError, match=r"another process is preparing .*; wait for it, or"):
            run(job)


def test_file_that_changes_meanwhile_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_lines(tmp_path / "a.jsonl", "a")
    job = job_of(tmp_path, path)
    write_lines(path, "other")
    with pytest.raises(DataError, match=r"a\.jsonl changed while it was prepared; run the same"):
        run(job)


def test_damaged_work_is_refused_with_what_to_do(tmp_path: Path) -> None:
    job = half_done(tmp_path, write_lines(tmp_path / "a.jsonl", "a"))
    (job.work / "plan.json").write_text("{")
    with pytest.raises(DataError, match=r"plan\.json is damaged .*; use --overwrite to start over"):
        run(job)


# What cannot be.


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"normalise": "nfd"}, "--normalise=nfd is unknown; use one of none, nfc, nfkc"),
        ({"validation_share": 1.0}, "--validation-share=1 is no share of the documents; use 0"),
        ({"shard_tokens": 0}, "--shard-tokens=0 is too small; use 1 or more"),
        ({"max_document_bytes": 0}, "--max-document-bytes=0 is too small; use 1 or more"),
    ],
)
def test_values_that_cannot_be_are_refused(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    path = write_lines(tmp_path / "a.jsonl", "a")
    with pytest.raises(DataError, match=words):
        run(job_of(tmp_path, path, recipe=replace(RECIPE, **changes)))
    assert not (tmp_path / "out").exists()


def test_corpus_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match="the corpus is empty: 1 files hold no text; point data"):
        run(job_of(tmp_path, tmp_path / "a.txt"))


@pytest.mark.parametrize("num_processes", [1, 2])
def test_corpus_without_text_says_which_records_could_not_be_read(
    tmp_path: Path, num_processes: int
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"body": "x" * 300}) + "\n" + '{"body": "a"}\nbad\n{}\n' * 40)
    wrong = job_of(tmp_path, path, num_processes=num_processes, max_bad_records=1000)
    with pytest.raises(
        DataError,
        match=r"1 files hold no text; 121 records could not be read, the first: "
        r".*a\.jsonl: line 1 has no text under 'text', but under body; .*: line 2 has no text .*; "
        r".*: line 3 is not JSON .*; set data\.text_key",
    ):
        run(wrong)
    # The folder is as it was, so the right settings need no --overwrite.
    assert list(wrong.folder.iterdir()) == []
    run(replace(wrong, recipe=replace(RECIPE, text_key="body")))


def test_file_that_is_no_text_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("text".encode("utf-16"))
    with pytest.raises(
        DataError, match=r"the first: .*a\.txt is not text \(it has NUL bytes\); take"
    ):
        run(job_of(tmp_path, tmp_path / "a.txt", max_bad_records=1000))


def test_corpus_that_is_all_held_out_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", "only one")
    recipe = replace(RECIPE, validation_share=0.999999)
    with pytest.raises(DataError, match="all 9 tokens of the corpus fell into its validation"):
        run(job_of(tmp_path, path, recipe=recipe))


def test_full_disk_is_one_error_and_what_is_done_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_lines(tmp_path / "a.jsonl", *texts(900))
    undisturbed = job_of(tmp_path / "1", path)
    run(undisturbed)
    job = job_of(tmp_path / "2", path)
    num_written = 0
    from train.data.prepare import shards

    original = shards._write_all

    def fill(file: Any, part: memoryview) -> None:
        nonlocal num_written
        num_written += 1
        if num_written == 40:
            file.write(part[: len(part) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        original(file, part)

    monkeypatch.setattr(shards, "_write_all", fill)
    with pytest.raises(DataError, match=r"\(No space left on device\); make room there. What is"):
        run(job)
    assert not (job.folder / "manifest.json").exists()
    run(job)
    assert files_of(job.folder) == files_of(undisturbed.folder)


def test_full_disk_of_a_worker_is_the_same_error(tmp_path: Path) -> None:
    """A real limit, on the size of files, which is what a worker meets first."""
    path = write_lines(tmp_path / "a.jsonl", *(f"{number} " * 3000 for number in range(60)))
    job = job_of(tmp_path, path, num_processes=2)
    script = (
        "import json, resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "from train.data.prepare.command import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    options = ["--output", str(job.folder), "--tokenizer", "bytes", "--processes", "2"]
    arguments = [sys.executable, "-c", script, str(path), *options, "--shard-tokens", "20000"]
    root = Path(__file__).resolve().parents[5]
    done = subprocess.run(arguments, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "(File too large); make room there. What is done is kept" in done.stderr
    assert not (job.folder / "manifest.json").exists()


def test_output_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    path = write_lines(tmp_path / "a.jsonl", "a")
    with pytest.raises(DataError, match=r"could not be written to .*out \(.*\); give a folder"):
        run(job_of(tmp_path, path))


def test_worker_that_is_killed_is_one_error_and_the_rest_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_lines(tmp_path / "a.jsonl", *texts(900))
    original = Workers.__enter__

    def kill_one(self: Workers) -> Workers:
        self._processes[0].kill()
        return original(self)

    job = job_of(tmp_path, path, num_processes=2)
    with monkeypatch.context() as patch:
        patch.setattr(Workers, "__enter__", kill_one)
        with pytest.raises(DataError, match=r"was killed by signal 9; if memory was short, use"):
            run(job)
    run(job)
    assert len(documents(job.folder)) == 900


def test_error_of_a_worker_is_the_one_that_is_seen(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", *texts(900))
    job = job_of(tmp_path, path, num_processes=2)
    path.unlink()
    with pytest.raises(DataError, match=r"a\.jsonl cannot be read \(No such file"):
        run_job(job, Silence())
