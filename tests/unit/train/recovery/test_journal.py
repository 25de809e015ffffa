"""The journal under what disks and kills do to it."""

from __future__ import annotations

import json
import logging
import zlib
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from train.errors import JournalError
from train.recovery.journal import Incident, Journal, Phase, now_utc, pending
from train.recovery.policy import Rung
from train.state import BatchRange

INTENT = Incident(
    incident=1,
    phase=Phase.INTENT,
    time="2026-01-01T00:00:00.000+00:00",
    rule="falcon",
    reason='a "quoted" reason, with ü',
    verdict="spike",
    onset_step=50,
    detected_step=52,
    clock=53,
    target_checkpoint="step-00000040-clock-00000040",
    target_step=40,
    skip=(640, 900),
    quarantine=("step-00000050-clock-00000050",),
)
DONE = replace(INTENT, phase=Phase.DONE)
SECOND = replace(INTENT, incident=2, clock=70, quarantine=())
FULL = replace(
    DONE,
    rung=Rung.COOL,
    attempt=5,
    rewinds=7,
    code="a_code",
    lr_scale=0.1,
    lr_from_step=40,
    lr_until_step=1_060,
    lr_return_step=2_060,
    returned=(9000, 640, 900),
    kept=("step-00000020-clock-00000020", "step-00000040-clock-00000040"),
    request="20260101-000000-abc",
)
SINGLE = replace(DONE, target_checkpoint="", target_step=52, skip=(0, 0), quarantine=())
OTHERS = [
    replace(SINGLE, rung=Rung.VETO, incident=0),
    replace(INTENT, rung=Rung.REPLAY, phase=Phase.OBSERVED),
    replace(SINGLE, rung=Rung.STOP, phase=Phase.OBSERVED),
    replace(SINGLE, rung=Rung.SKIP_AHEAD, skip=(900, 1000)),
    replace(SINGLE, rung=Rung.UNSKIP, returned=(9000, 640, 900)),
    replace(SINGLE, rung=Rung.STOP, code="ladder_exhausted"),
]
# As they were written before there were rungs: neither a field more nor one less.
OLD_FIELDS = (
    "incident",
    "phase",
    "time",
    "rule",
    "reason",
    "verdict",
    "onset_step",
    "detected_step",
    "clock",
    "target_checkpoint",
    "target_step",
    "skip",
    "quarantine",
)


def journal_of(folder: Path, *incidents: Incident) -> Journal:
    journal = Journal(folder / "journal.jsonl")
    for incident in incidents:
        journal.append(incident)
    return journal


def sealed_line(record: dict[str, object]) -> str:
    body = json.dumps(record, sort_keys=True)
    return json.dumps({**record, "crc": f"{zlib.crc32(body.encode()):08x}"}) + "\n"


def test_journal_that_does_not_exist_is_empty(tmp_path: Path) -> None:
    assert Journal(tmp_path / "journal.jsonl").read() == []


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    journal = journal_of(tmp_path, INTENT, DONE, SECOND)
    assert journal.read() == [INTENT, DONE, SECOND]
    assert Journal(journal.path).read()[0].skip_range == BatchRange(start=640, stop=900)


def test_every_field_comes_back_as_it_was(tmp_path: Path) -> None:
    journal = journal_of(tmp_path, FULL, *OTHERS)
    assert journal.read() == [FULL, *OTHERS]
    assert type(journal.read()[0].rung) is Rung


def test_records_from_before_there_were_rungs_can_be_read(tmp_path: Path) -> None:
    record = asdict(INTENT)
    line = sealed_line({name: record[name] for name in OLD_FIELDS})
    journal = Journal(tmp_path / "journal.jsonl")
    journal.path.write_text(line)
    assert journal.read() == [INTENT]
    assert pending(journal.read()) == INTENT
    journal.append(DONE)
    assert journal.path.read_text().startswith(line)
    assert journal.read() == [INTENT, DONE]


def test_append_leaves_earlier_lines_as_they_were(tmp_path: Path) -> None:
    journal = journal_of(tmp_path, INTENT)
    before = journal.path.read_bytes()
    journal.append(DONE)
    assert journal.path.read_bytes().startswith(before)


def test_any_torn_last_line_is_a_record_that_was_never_written(tmp_path: Path) -> None:
    journal = journal_of(tmp_path, INTENT, DONE)
    whole = journal.path.read_bytes()
    first_line = whole.index(b"\n") + 1
    for length in range(first_line, len(whole) - 1):
        journal.path.write_bytes(whole[:length])
        assert journal.read() == [INTENT], length


def test_record_whose_newline_alone_is_missing_counts(tmp_path: Path) -> None:
    journal = journal_of(tmp_path, INTENT, DONE)
    journal.path.write_bytes(journal.path.read_bytes().rstrip(b"\n"))
    assert journal.read() == [INTENT, DONE]


def test_append_after_a_torn_line_starts_a_line_of_its_own(tmp_path: Path) -> None:
    journal = journal_of(tmp_path, INTENT, DONE)
    journal.path.write_bytes(journal.path.read_bytes()[:-30])
    journal.append(SECOND)
    assert journal.read() == [INTENT, SECOND]


def test_append_to_an_empty_file_writes_no_blank_line(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").touch()
    assert journal_of(tmp_path, INTENT).path.read_text().count("\n") == 1


def test_any_flipped_byte_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is left out as torn, or refused as changed; it is never taken for another record."""
    journal = journal_of(tmp_path, INTENT, DONE)
    whole = journal.path.read_bytes()
    second_line = whole.index(b"\n") + 1
    caplog.set_level(logging.WARNING)
    for position in range(second_line, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[position] ^= 0x01
        journal.path.write_bytes(damaged)
        caplog.clear()
        try:
            found = journal.read()
        except JournalError:
            continue
        assert found in ([INTENT], [INTENT, DONE]), position
        if found == [INTENT]:
            assert "left out" in caplog.text


def test_changed_line_stops_the_run_rather_than_train_on_what_it_skips(tmp_path: Path) -> None:
    journal = journal_of(tmp_path, INTENT, DONE)
    text = journal.path.read_text()
    journal.path.write_text(text.replace('"clock": 53', '"clock": 52', 1))
    with pytest.raises(JournalError, match=r"jsonl:1 fails its checksum"):
        journal.read()


@pytest.mark.parametrize("line", ["[]", "5", "null", '"text"', "{}", "[" * 5000])
def test_line_that_is_no_record_stops_the_run(tmp_path: Path, line: str) -> None:
    journal = journal_of(tmp_path, INTENT)
    with journal.path.open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(JournalError, match=r"jsonl:2 fails its checksum"):
        journal.read()


@pytest.mark.parametrize("zeros", ["", "\0", "\0" * 4096])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_record_that_ends_too_early_is_torn(tmp_path: Path, share: float, zeros: str) -> None:
    journal = journal_of(tmp_path, INTENT, DONE)
    first, second = journal.path.read_text().splitlines()
    journal.path.write_text(f"{first}\n{second[: int(share * len(second))]}{zeros}\n")
    assert journal.read() == [INTENT]


def test_record_with_a_broken_key_is_no_torn_one(tmp_path: Path) -> None:
    journal = journal_of(tmp_path, INTENT, DONE)
    journal.path.write_bytes(journal.path.read_bytes().replace(b'"rung"', b'"run\xff'))
    with pytest.raises(JournalError, match=r"jsonl:1 fails its checksum"):
        journal.read()


@pytest.mark.parametrize(
    "change",
    [
        {"phase": "thinking"},
        {"rung": "jump"},
        {"rung": None},
        {"kept": None},
        {"returned": [1, 2]},
        {"returned": "x"},
        {"skip": [1]},
        {"skip": None},
        {"skip": ["a", "b"]},
        {"unknown": 1},
        {"quarantine": None},
    ],
)
def test_whole_record_of_another_format_is_an_error_that_names_the_line(
    tmp_path: Path, change: dict[str, object]
) -> None:
    journal = journal_of(tmp_path, INTENT)
    with journal.path.open("a") as file:
        file.write(sealed_line({**asdict(INTENT), **change}))
    with pytest.raises(JournalError, match=r"journal\.jsonl:2 is whole but not a record"):
        journal.read()


def test_record_that_lacks_a_field_is_an_error(tmp_path: Path) -> None:
    record = asdict(INTENT)
    del record["clock"]
    journal = Journal(tmp_path / "journal.jsonl")
    journal.path.write_text(sealed_line(record))
    with pytest.raises(JournalError, match="another version of Trimtab"):
        journal.read()


def test_intent_without_done_is_pending() -> None:
    assert pending([]) is None
    assert pending([INTENT]) == INTENT
    assert pending([INTENT, DONE]) is None
    assert pending([INTENT, DONE, SECOND]) == SECOND


@pytest.mark.parametrize("between", OTHERS, ids=[str(record.rung) for record in OTHERS])
def test_what_has_no_parts_neither_opens_nor_closes_a_rewind(between: Incident) -> None:
    assert pending([between]) is None
    assert pending([INTENT, between]) == INTENT
    assert pending([INTENT, between, DONE]) is None
    assert pending([between, INTENT, DONE, between]) is None
    assert pending([INTENT, DONE, between, SECOND, between]) == SECOND


def test_only_what_goes_back_is_a_rewind() -> None:
    assert INTENT.is_rewind and DONE.is_rewind
    assert not any(record.is_rewind for record in OTHERS)


def test_time_is_utc() -> None:
    assert now_utc().endswith("+00:00")


def test_journal_that_is_gone_is_not_begun_anew(tmp_path: Path) -> None:
    """The folder of a live run was moved: its records would be split over two journals."""
    journal = journal_of(tmp_path, INTENT)
    journal.path.rename(tmp_path / "moved.jsonl")
    with pytest.raises(FileNotFoundError):
        journal.append(DONE)
    assert not journal.path.exists()
