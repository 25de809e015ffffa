"""Which files a path means, in which order, and what is refused before anything is read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import fsspec
import pytest

from train.data.prepare.sources import Format, changed_sources, list_sources
from train.errors import DataError


def write(path: Path, text: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def addresses(*paths: Path | str) -> list[str]:
    return [source.address for source in list_sources([str(path) for path in paths])]


def test_globs_folders_and_files_are_joined_and_counted_once(tmp_path: Path) -> None:
    a = write(tmp_path / "text" / "a.txt")
    b = write(tmp_path / "text" / "deep" / "b.txt")
    write(tmp_path / "text" / "picture.png")
    write(tmp_path / "text" / "__pycache__" / "c.txt")
    found = addresses(tmp_path / "text" / "**" / "[ab].txt", tmp_path / "text", a)
    assert found == [str(a), str(b)]


@pytest.mark.parametrize("name", ["book.dat", "part[1].txt"])
def test_named_file_is_read_whatever_its_name(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name)
    assert addresses(path) == [str(path)]


@pytest.mark.parametrize(
    ("name", "kind", "packing"),
    [
        ("a.jsonl", Format.JSONL, ""),
        ("a.JSONL", Format.JSONL, ""),
        ("a.ndjson", Format.JSONL, ""),
        ("a.json", Format.TEXT, ""),
        ("a.json.gz", Format.JSONL, "gz"),
        ("a.jsonl.zst", Format.JSONL, "zst"),
        ("a.txt.xz", Format.TEXT, "xz"),
        ("a.bz2", Format.TEXT, "bz2"),
        ("a.parquet", Format.PARQUET, ""),
        ("a.arrow", Format.ARROW, ""),
    ],
)
def test_suffixes_say_how_a_file_is_read(
    tmp_path: Path, name: str, kind: Format, packing: str
) -> None:
    (source,) = list_sources([str(write(tmp_path / name))])
    assert (source.format, source.packing) == (kind, packing)


def test_standard_library_is_a_corpus_without_any_file_of_ours() -> None:
    found = addresses()
    assert len(found) > 300
    assert found == sorted(found)
    assert not any({"site-packages", "test"} & set(name.split("/")) for name in found)


def test_folder_that_gets_the_corpus_is_passed_by(tmp_path: Path) -> None:
    a = write(tmp_path / "a.txt")
    write(tmp_path / "out" / "manifest.json")
    found = list_sources([str(tmp_path)], but=str(tmp_path / "out"))
    assert [source.address for source in found] == [str(a)]


def test_folder_that_gets_the_corpus_is_passed_by_however_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.txt")
    write(tmp_path / "out" / "manifest.json")
    monkeypatch.chdir(tmp_path)
    assert [source.address for source in list_sources(["."], but="out")] == ["./a.txt"]
    assert len(list_sources([str(tmp_path)], but="out")) == 1


def test_corpus_among_the_text_is_passed_by(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    a = write(tmp_path / "a.txt")
    write(tmp_path / "whole" / "manifest.json")
    write(tmp_path / "whole" / "train-00000.documents.npy")
    write(tmp_path / "half" / ".work" / "plan.json")
    assert addresses(tmp_path) == [str(a)]
    for name in ("whole", "half"):
        assert f"{tmp_path / name} is a prepared corpus, and passed by" in caplog.text


def test_files_of_a_folder_that_are_left_out_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "a.TXT")
    write(tmp_path / "b.png")
    assert addresses(tmp_path) == [str(tmp_path / "a.TXT")]
    assert "1 files without a text suffix left out" in caplog.text


def save_dataset(folder: Path, *names: str) -> None:
    for name in names:
        write(folder / name)
    write(folder / "dataset_info.json", "{}")
    state = {"_data_files": [{"filename": name} for name in names]}
    write(folder / "state.json", json.dumps(state))


def test_dataset_on_disk_is_its_arrow_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for split in ("train", "test"):
        save_dataset(tmp_path / "saved" / split, "data-0.arrow")
        write(tmp_path / "saved" / split / "cache-12.arrow")
    write(tmp_path / "saved" / "dataset_dict.json", json.dumps({"splits": ["train", "test"]}))
    assert addresses(tmp_path / "saved") == [str(tmp_path / "saved" / "train" / "data-0.arrow")]
    assert "its split train is taken, test left out" in caplog.text
    test = tmp_path / "saved" / "test"
    assert addresses(test) == [str(test / "data-0.arrow")]


def test_dataset_whose_file_is_missing_is_refused_with_its_name(tmp_path: Path) -> None:
    save_dataset(tmp_path, "data-0.arrow", "data-1.arrow")
    (tmp_path / "data-1.arrow").unlink()
    with pytest.raises(DataError, match=r"lacks 1 of the 2 files .* \(data-1\.arrow\); copy or"):
        addresses(tmp_path)


def test_file_that_the_dataset_does_not_name_is_left_out_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_dataset(tmp_path, "data-0.arrow")
    write(tmp_path / "data-9.arrow")
    assert addresses(tmp_path) == [str(tmp_path / "data-0.arrow")]
    assert "data-9.arrow left out: its state.json does not name them" in caplog.text


def test_dataset_whose_split_is_missing_is_refused_with_its_name(tmp_path: Path) -> None:
    write(tmp_path / "dataset_dict.json", json.dumps({"splits": ["a", "b"]}))
    save_dataset(tmp_path / "a", "data-0.arrow")
    write(tmp_path / "b" / "data-0.arrow")
    with pytest.raises(DataError, match=rf"{tmp_path}/b is missing or no whole dataset, though"):
        addresses(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"_data_files": 5}', '{"_data_files": ["a"]}'])
def test_dataset_without_a_list_of_files_is_refused(tmp_path: Path, text: str) -> None:
    save_dataset(tmp_path, "data-0.arrow")
    write(tmp_path / "state.json", text)
    with pytest.raises(DataError, match=r"state\.json names no files \(.*\); copy or download"):
        addresses(tmp_path)


def test_dataset_without_a_list_of_splits_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "dataset_dict.json", "{}")
    with pytest.raises(DataError, match=r"dataset_dict\.json names no splits .* give the folders"):
        addresses(tmp_path)


def test_remote_addresses_are_listed_like_paths() -> None:
    system = fsspec.filesystem("memory")
    for name in ("a.jsonl", "deep/b.txt", "deep/c.png"):
        system.pipe(f"/listed/{name}", b"text")
    try:
        assert addresses("memory://listed") == [
            "memory:///listed/a.jsonl",
            "memory:///listed/deep/b.txt",
        ]
        assert addresses("memory://listed/*/*.txt") == ["memory:///listed/deep/b.txt"]
        (one,) = list_sources(["memory://listed/a.jsonl"])
        assert (one.num_bytes, bool(one.stamp)) == (4, True)
        with pytest.raises(DataError, match=r"memory://listed/gone\.txt cannot be found"):
            addresses("memory://listed/gone.txt")
    finally:
        system.rm("/listed", recursive=True)


def test_file_scheme_is_a_path(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt")
    assert addresses(f"file://{path}") == [str(path)]


def test_changed_files_are_named(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.txt"), write(tmp_path / "b.txt")
    sources = list_sources([str(tmp_path)])
    assert changed_sources(sources) == []
    write(a, "longer text")
    b.unlink()
    assert changed_sources(sources) == [str(a), str(b)]


# What is refused.


def test_missing_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "link.txt").symlink_to(tmp_path / "gone.txt")
    for name in ("nothing.txt", "link.txt"):
        with pytest.raises(DataError, match=rf"{name} cannot be found; check the globs"):
            addresses(tmp_path / name)


def test_folder_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no text files; text is expected in .*\.parquet"):
        addresses(tmp_path)


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tgz"])
def test_archive_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=rf"{name} is an archive; unpack it to files"):
        addresses(write(tmp_path / name))


def test_pipe_is_refused_rather_than_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(DataError, match="is not a regular file"):
        addresses(tmp_path / "a.txt")


def test_scheme_that_nothing_knows_is_refused() -> None:
    with pytest.raises(DataError, match=r"nosuch://a cannot be opened .*; install fsspec"):
        addresses("nosuch://a")


def test_folder_that_may_not_be_listed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", fail)
    with pytest.raises(DataError, match=r"cannot be read \(Permission denied\); fix its perm"):
        addresses(tmp_path)


def test_folder_that_is_itself_the_output_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.py")
    with pytest.raises(DataError, match=r"SOURCES: .* lies in --output=.*, where nothing is read"):
        list_sources([str(tmp_path)], but=str(tmp_path), option="SOURCES")


def test_option_that_was_given_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^SOURCES: .*gone\.txt cannot be found"):
        list_sources([str(tmp_path / "gone.txt")], option="SOURCES")


def test_corpus_that_is_not_whole_is_not_read_as_text(tmp_path: Path) -> None:
    write(tmp_path / "half" / ".work" / "plan.json")
    with pytest.raises(DataError, match="half is a corpus that was not prepared to the end; run"):
        addresses(tmp_path / "half")
    write(tmp_path / "broken" / "manifest.json", "{")
    write(tmp_path / "broken" / "train-00000.documents.npy")
    with pytest.raises(DataError, match=r"broken is a prepared corpus and no text; a run reads it"):
        addresses(tmp_path / "broken")
