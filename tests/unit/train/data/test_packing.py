"""Best-fit packing: whole documents in rows, each token once, planned once."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from token_files import corpus_of, shard_of

from train.data import packing_plan
from train.data.packing import PackedSamples
from train.data.packing_plan import best_fit, load_plan, pieces_of, rows_of
from train.data.shards import Shard, Split
from train.data.store import TokenStore
from train.errors import DataError

T = 16
PADDING = 999_999
Shards = list[list[int]]  # the lengths of the documents of each shard


def write(folder: Path, shards: Shards) -> list[Shard]:
    """Write shards in which each token is its own offset."""
    made, first = [], 0
    for number, lengths in enumerate(shards):
        documents = []
        for length in lengths:
            documents.append(range(first, first + length))
            first += length
        made.append(shard_of(folder, str(number), documents, "uint32"))
    return made


def store_of(shards: Sequence[Shard], bad: frozenset[str] = frozenset()) -> TokenStore:
    corpus = corpus_of(shards, dtype="uint32")
    return TokenStore(corpus, corpus.train, bad_shards=bad)


def pack(
    folder: Path, store: TokenStore, *, identity: str = "d/train", isolates: bool = True
) -> PackedSamples:
    return PackedSamples(
        store,
        sequence_length=T,
        identity=identity,
        cache_folder=folder / "cache",
        isolates_documents=isolates,
        padding_id=PADDING,
    )


def read_all(samples: PackedSamples) -> np.ndarray:
    out = np.full((samples.num_samples, T + 1), 7, dtype=np.uint32)
    samples.read(np.arange(samples.num_samples), out)
    return out


def plan_files(folder: Path) -> dict[str, bytes]:
    (plan,) = (path for path in (folder / "cache").glob("packing-*") if path.is_dir())
    return {path.name: path.read_bytes() for path in plan.iterdir()}


def random_lengths(seed: int, *, num_shards: int) -> Shards:
    source = random.Random(seed)
    sizes = [1, 2, 3, 5, 8, 11, 15, 16, 17, 18, 33, 34, 35, 90]
    return [source.choices(sizes, k=source.randrange(1, 40)) for _ in range(num_shards)]


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have windows and stretches end in the midst of everything."""
    monkeypatch.setattr(packing_plan, "_WINDOW_PIECES", 23)
    monkeypatch.setattr(packing_plan, "_STRETCH_TOKENS", 31)


@pytest.fixture
def five_documents(tmp_path: Path) -> PackedSamples:
    """10, 6, 40, 4 and 3 tokens in rows of 17, so that 40 is cut into 17, 17 and 6."""
    return pack(tmp_path, store_of(write(tmp_path, [[10, 6], [40, 4, 3]])))


# The packing.


def naive_best_fit(lengths: Sequence[int], capacity: int) -> list[int]:
    """Return what is left of each row, one piece after the other, from the definition."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
            rooms.append(min(fitting) - length)
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


def first_fit(lengths: Sequence[int], capacity: int) -> int:
    """Return how many rows first fit takes, in the order of the corpus."""
    rooms: list[int] = []
    for length in lengths:
        for row, room in enumerate(rooms):
            if room >= length:
                rooms[row] -= length
                break
        else:
            rooms.append(capacity - length)
    return len(rooms)


@pytest.mark.parametrize("seed", range(10))
def test_each_piece_goes_where_least_is_left(seed: int) -> None:
    source = random.Random(seed)
    capacity = source.choice([1, 7, 64, 300])
    lengths = [source.randrange(1, capacity + 1) for _ in range(200)]
    rows = best_fit(np.array(lengths), capacity)
    filled = np.bincount(rows, weights=lengths).astype(int)
    assert sorted((capacity - filled).tolist()) == naive_best_fit(lengths, capacity)


def test_rows_are_fuller_than_those_of_first_fit() -> None:
    generator = np.random.default_rng(0)
    for capacity in (65, 257):
        lengths = generator.integers(1, capacity, 2000)
        packed = int(best_fit(lengths, capacity).max()) + 1
        assert lengths.sum() / (packed * capacity) > 0.97
        assert packed < first_fit(lengths.tolist(), capacity)


def test_nothing_is_packed_into_nothing() -> None:
    assert best_fit(np.empty(0, dtype=np.int64), 5).tolist() == []
    offsets, lengths, counts = rows_of(np.array([0, 5]), np.array([5, 5]), 5)
    assert (offsets.tolist(), lengths.tolist(), counts.tolist()) == ([0, 5], [5, 5], [1, 1])


def test_long_document_is_cut_without_an_overlap() -> None:
    offsets, lengths = pieces_of(np.array([0, 3, 40]), np.array([3, 40, 57]), 17)
    assert offsets.tolist() == [0, 3, 20, 37, 40]
    assert lengths.tolist() == [3, 17, 17, 3, 17]


def test_rows_and_their_pieces_are_in_the_order_of_the_corpus() -> None:
    lengths = np.array([3, 17, 9, 5, 8, 9])
    offsets, lengths, counts = rows_of(np.cumsum(lengths) - lengths, lengths, 17)
    assert counts.tolist() == [3, 1, 2]
    assert lengths.tolist() == [3, 9, 5, 17, 8, 9]
    assert offsets.tolist() == [0, 20, 29, 3, 34, 42]


# Samples.


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.usefixtures("small_parts")
def test_every_token_is_in_one_row_and_documents_that_fit_are_whole(
    tmp_path: Path, seed: int
) -> None:
    shards = random_lengths(seed, num_shards=1 + seed % 3)
    samples = pack(tmp_path, store_of(write(tmp_path, shards)))
    rows = read_all(samples)
    everything = np.arange(samples.num_samples)
    layout = samples.layout(everything)
    assert layout.starts is not None and layout.lengths is not None
    lengths = [length for shard in shards for length in shard]
    assert ((layout.lengths > 0) & (layout.lengths <= T + 1)).all()
    is_text = np.arange(T + 1) < layout.lengths[:, None]
    assert (rows[~is_text] == PADDING).all()
    assert sorted(rows[is_text].tolist()) == list(range(sum(lengths)))
    row_and_column = {int(rows[place]): place for place in zip(*np.nonzero(is_text), strict=True)}
    first = 0
    for length in lengths:
        for begin in range(first, first + length, T + 1):
            row, column = row_and_column[begin]
            stop = column + min(T + 1, first + length - begin)
            assert stop <= T + 1
            assert rows[row, column:stop].tolist() == list(range(begin, begin + stop - column))
            assert column in layout.starts[row]
        first += length
    num_pieces = sum(-(-length // (T + 1)) for length in lengths)
    assert np.count_nonzero(layout.starts <= T) == num_pieces
    assert samples.num_predictions(everything) == sum(lengths) - samples.num_samples


def test_layout_says_where_pieces_begin_and_text_ends(five_documents: PackedSamples) -> None:
    samples = five_documents
    assert samples.num_samples == 4
    rows = read_all(samples)
    assert [row[row != PADDING].tolist() for row in rows] == [
        [*range(10), *range(10, 16)],
        list(range(16, 33)),
        list(range(33, 50)),
        [*range(50, 56), *range(56, 60), *range(60, 63)],
    ]
    layout = samples.layout(np.array([3, 1, 0]))
    assert layout.starts is not None and layout.lengths is not None
    assert layout.starts.tolist() == [[0, 6, 10], [0, 17, 17], [0, 10, 17]]
    assert layout.lengths.tolist() == [13, 17, 16]
    assert layout.starts.dtype == layout.lengths.dtype == np.int32
    assert samples.num_predictions(np.array([3, 1, 0])) == 12 + 16 + 15
    nothing = samples.layout(np.array([], dtype=np.int64))
    assert nothing.starts is not None and nothing.starts.shape == (0, 1)


def test_documents_that_see_each_other_have_no_starts(tmp_path: Path) -> None:
    samples = pack(tmp_path, store_of(write(tmp_path, [[10, 6]])), isolates=False)
    layout = samples.layout(np.array([0]))
    assert layout.starts is None and layout.lengths is not None
    assert layout.lengths.tolist() == [16]


@pytest.mark.parametrize("dtype", [np.uint32, np.int64])
def test_rows_go_where_they_belong_and_leave_others_alone(
    five_documents: PackedSamples, dtype: type[np.integer]
) -> None:
    out = np.full((5, T + 1), 7, dtype=dtype)
    five_documents.read(np.array([3, 0]), out, [4, 2])
    assert out[4].tolist() == [*range(50, 63), *[PADDING] * 4]
    assert out[2].tolist() == [*range(16), PADDING]
    assert (out[[0, 1, 3]] == 7).all()
    five_documents.announce(np.array([3, 0]))
    five_documents.read(np.array([], dtype=np.int64), out)


def test_origins_name_the_stretches_of_documents(five_documents: PackedSamples) -> None:
    found = [
        (origin.document, origin.token_offset_in_document, origin.num_tokens)
        for sample in range(4)
        for origin in five_documents.origins(sample)
    ]
    assert found[:4] == [(0, 0, 10), (1, 0, 6), (2, 0, 17), (2, 17, 17)]
    assert found[4:] == [(2, 34, 6), (3, 0, 4), (4, 0, 3)]


def test_samples_of_a_bad_shard_are_bad(tmp_path: Path) -> None:
    made = write(tmp_path, [[10, 6], [40, 4, 3]])
    samples = pack(tmp_path, store_of(made, frozenset({made[0].address})))
    assert samples.bad(np.array([3, 0, 1, 0])).tolist() == [False, True, False, True]
    assert not pack(tmp_path, store_of(made)).bad(np.arange(4)).any()


def test_split_without_text_has_no_samples(tmp_path: Path) -> None:
    corpus = replace(corpus_of([]), validation=Split(shards=()))
    assert corpus.validation is not None
    samples = pack(tmp_path, TokenStore(corpus, corpus.validation))
    assert samples.num_samples == 0
    assert samples.num_predictions(np.array([], dtype=np.int64)) == 0


def test_corpus_that_does_not_say_where_documents_begin_is_refused(tmp_path: Path) -> None:
    made = [replace(shard, documents=None) for shard in write(tmp_path, [[10, 6]])]
    with pytest.raises(DataError) as error:
        pack(tmp_path, store_of(made))
    assert str(error.value) == (
        "data.packing=best_fit, but the files of the corpus do not say where documents begin; set "
        "it to concatenate, or prepare the corpus from its text"
    )


def test_one_line_says_how_full_the_rows_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    pack(tmp_path, store_of(write(tmp_path, [[10, 6], [40, 4, 3]])))
    assert (
        "data.packing=best_fit: 4 rows of 17 tokens, 92.65% full, from 5 documents, of which 1 "
        "are longer and cut"
    ) in caplog.messages


# The plan on disk.


def test_plan_is_made_once_for_the_same_tokens_and_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_of(write(tmp_path, [[10, 6], [40, 4, 3]]))
    first = read_all(pack(tmp_path, store))
    pack(tmp_path, store, identity="d/validation")
    load_plan(store, identity="d/train", capacity=9, cache_folder=tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("packing-*.lock"))) == 3
    monkeypatch.setattr(packing_plan, "_write", None)
    assert (read_all(pack(tmp_path, store)) == first).all()
    with pytest.raises(TypeError):
        pack(tmp_path, store, identity="e/train")


@pytest.mark.parametrize("seed", range(3))
def test_plan_is_the_same_wherever_it_is_made(tmp_path: Path, seed: int) -> None:
    store = store_of(write(tmp_path, random_lengths(seed, num_shards=3)))
    for folder in ("a", "b"):
        pack(tmp_path / folder, store)
    assert plan_files(tmp_path / "a") == plan_files(tmp_path / "b")


def start(folder: Path, what: str) -> subprocess.Popen[str]:
    """Start a process that packs what lies in `folder`, and dies or dawdles where it is told to."""
    here = Path(__file__).parent
    paths = (here, here.parents[2], here.parents[3])
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import test_packing; test_packing.child({str(folder)!r}, {what!r})",
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
        stderr=subprocess.PIPE,
        text=True,
    )


def child(folder: str, what: str) -> None:
    """Run in a process of its own; see `start`."""
    patch = pytest.MonkeyPatch()
    original = packing_plan._write

    def die(*arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def dawdle(store: TokenStore, temporary: Path, capacity: int) -> dict[str, int]:
        with (Path(folder) / "log").open("a") as file:
            file.write("made\n")
        time.sleep(0.5)
        return original(store, temporary, capacity)

    patch.setattr(packing_plan, *(("_write", dawdle) if what == "dawdle" else (what, die)))
    apart = Path(folder) / str(os.getpid())
    apart.mkdir()
    pack(Path(folder), store_of(write(apart, [[10, 6], [40, 4, 3]])))


@pytest.mark.parametrize("at", ["rows_of", "fsync_file", "write_json", "fsync_folder"])
def test_kill_leaves_nothing_that_looks_whole(tmp_path: Path, at: str) -> None:
    process = start(tmp_path, at)
    assert process.wait() == -signal.SIGKILL, process.communicate()[1]
    process.communicate()
    store = store_of(write(tmp_path, [[10, 6], [40, 4, 3]]))
    found, expected = pack(tmp_path, store), pack(tmp_path / "expected", store)
    assert read_all(found).tolist() == read_all(expected).tolist()
    assert plan_files(tmp_path) == plan_files(tmp_path / "expected")
    assert list((tmp_path / "cache").glob(".*")) == [], "nothing is left lying about"


def test_one_process_makes_the_plan_and_others_wait(tmp_path: Path) -> None:
    processes = [start(tmp_path, "dawdle") for _ in range(3)]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 3, errors
    assert (tmp_path / "log").read_text() == "made\n"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("offsets", b"1234567", "offsets has 7 bytes instead of 56"),
        ("row_lengths", b"", "row_lengths has 0 bytes instead of 16"),
        ("manifest.json", b"{", "Expecting property name"),
        ("manifest.json", b"[]", "list indices must be integers"),
        ("manifest.json", b"{}", "'key'"),
        ("manifest.json", json.dumps({"key": "another"}).encode(), "it is of another, not of"),
        ("lengths", None, "No such file or directory"),
    ],
)
def test_damaged_plan_is_refused(
    tmp_path: Path, name: str, content: bytes | None, reason: str
) -> None:
    store = store_of(write(tmp_path, [[10, 6], [40, 4, 3]]))
    pack(tmp_path, store)
    (folder,) = (path for path in (tmp_path / "cache").glob("packing-*") if path.is_dir())
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        pack(tmp_path, store)
    assert str(error.value).startswith(f"the packing plan {folder} is damaged (")
    assert reason in str(error.value)
    assert str(error.value).endswith("; delete it and it is made anew")


def test_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    store = store_of(write(tmp_path, [[10, 6]]))
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError) as error:
        pack(tmp_path, store)
    assert str(error.value) == (
        f"the packing plan could not be written to {tmp_path / 'cache'} (File exists); set "
        "data.cache_dir to a disk with room that you may write to"
    )


def test_naive_packings_are_what_they_say() -> None:
    """The comparisons above are with these."""
    assert naive_best_fit([6, 5, 4, 3], 10) == [0, 2]
    assert first_fit([6, 5, 4, 3], 10) == 2
