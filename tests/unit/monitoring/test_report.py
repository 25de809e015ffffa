"""The report: it opens from one file, whatever state the run is in, and escapes what it shows."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from synthetic_run import RunScript

from monitoring.comparison import Curve, write_comparison
from monitoring.figure import MAX_POINTS, build_figure, decimate
from monitoring.incidents import collect_incidents
from monitoring.records import read_run
from monitoring.report import page_content, write_report
from monitoring.ticks import log_ticks, nice_ticks


class PageReader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.num_scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.num_scripts += tag == "script"
        self.links += [str(value) for key, value in attrs if key in ("src", "href")]


def read_page(path: Path) -> tuple[str, PageReader]:
    text = path.read_text(encoding="utf-8")
    reader = PageReader()
    reader.feed(text)
    return text, reader


def read_figure(text: str) -> dict[str, Any]:
    found = re.search(r"^const figure = (.*);$", text, flags=re.MULTILINE)
    assert found is not None
    figure: dict[str, Any] = json.loads(found.group(1))
    return figure


def test_report_of_a_recovered_run_tells_what_happened(recovered_run: RunScript) -> None:
    text, reader = read_page(write_report(recovered_run.folder))
    assert "Completed 400 steps; 2 spikes, 1 rewind, 1 restart, 66k tokens skipped" in text
    assert "[1,440, 1,504)" in text
    assert "step_00000150" in text
    assert reader.num_scripts == 2
    assert reader.links == []


def test_report_marks_the_rewind_and_shades_what_was_thrown_away(recovered_run: RunScript) -> None:
    text, _ = read_page(write_report(recovered_run.folder))
    figure = read_figure(text)
    labels = [item["text"] for item in figure["layout"]["annotations"]]
    assert "#1  step 184 \u2192 150" in labels
    shaded = [item for item in figure["layout"]["shapes"] if item["type"] == "rect"]
    assert [(item["x0"], item["x1"]) for item in shaded] == [(150.5, 184.5)]


def test_report_loads_nothing_from_elsewhere(recovered_run: RunScript) -> None:
    text, reader = read_page(write_report(recovered_run.folder))
    own_text = re.sub(r"<script>.*?</script>", "", text, count=1, flags=re.DOTALL)
    assert "http://" not in own_text
    assert "https://" not in own_text
    assert reader.links == []


@pytest.mark.parametrize("hostile", ["<script>alert(1)</script>", "</title><b>", '" onload="x'])
def test_names_and_reasons_are_escaped(script: RunScript, hostile: str) -> None:
    script.start()
    script.train(5)
    script.rewind(1, to_step=2, skip=[0, 8])
    script.journal[-1]["reason"] = script.journal[-1]["verdict"] = hostile
    script.metrics[-1]["verdict"] = "spike"
    text, reader = read_page(write_report(script.write(name=hostile)))
    assert hostile not in text
    assert reader.num_scripts == 2


def test_report_of_an_empty_folder_says_that_nothing_ran(tmp_path: Path) -> None:
    text, reader = read_page(write_report(tmp_path, tmp_path / "out" / "page.html"))
    assert "Not started: 0 steps; no incidents; goodput 0%" in text
    assert "No step has been recorded yet" in text
    assert reader.num_scripts == 0


def test_report_of_an_unfinished_run_with_a_torn_line(
    script: RunScript, add_torn_line: Callable[[Path], None]
) -> None:
    script.start()
    script.train(7)
    folder = script.write()
    add_torn_line(folder / "metrics.jsonl")
    text, _ = read_page(write_report(folder))
    assert "Unfinished: 7 steps; no incidents" in text
    assert "1 torn line" in text


@pytest.mark.parametrize("num_steps", [1, 2])
def test_report_of_a_run_whose_losses_are_all_null(script: RunScript, num_steps: int) -> None:
    script.train(num_steps, verdict="nonfinite")
    for record in script.metrics:
        record["grad_norm"] = None
    text, _ = read_page(write_report(script.write()))
    assert f"Unfinished: {num_steps} step" in text
    figure = read_figure(text)
    assert all(math.isfinite(end) for end in figure["layout"]["yaxis"]["range"])


def test_report_of_a_single_step(script: RunScript) -> None:
    script.train(1)
    figure = read_figure(read_page(write_report(script.write()))[0])
    assert figure["data"][0]["mode"] == "lines+markers"


def test_incident_that_was_never_finished_says_so(script: RunScript) -> None:
    script.train(5)
    script.rewind(1, to_step=2, skip=[0, 8])
    script.events.clear()
    script.journal.pop()
    assert "cut short" in read_page(write_report(script.write()))[0]


def test_attempts_share_the_number_of_their_incident(ladder_run: RunScript) -> None:
    rows: Any = page_content(read_run(ladder_run.folder))["incidents"]
    told = [(row["id"], row["attempt"], row["rung"], row["is_first"]) for row in rows]
    assert told[:3] == [
        (1, 1, "replay", True),
        (1, 2, "skip", False),
        (2, 1, "skip ahead", True),
    ]
    assert [row["num_samples"] for row in rows] == ["0", "64", "100", "64", "-64", "0"]
    assert rows[3]["lr"] == "\u00d7 0.5"
    assert rows[0]["step"] == "181 \u2192 184"


def test_stop_shows_its_code(script: RunScript) -> None:
    script.record(1, "stop", code="rewinds_used_up", reason="twenty of them", verdict="")
    text, _ = read_page(write_report(script.write()))
    assert "rewinds_used_up: twenty of them" in text


def test_chart_marks_each_kind_of_act_with_its_own_shape(ladder_run: RunScript) -> None:
    run = read_run(ladder_run.folder)
    figure: Any = build_figure(run, collect_incidents(run))
    marks = {
        trace["name"]: trace for trace in figure["data"] if "symbol" in trace.get("marker", {})
    }
    symbols = {name: trace["marker"]["symbol"] for name, trace in marks.items()}
    assert symbols == {
        "spike": "x",
        "rewind": "triangle-left",
        "skip ahead": "triangle-right",
        "put back": "triangle-down",
        "observed": "circle-open",
    }
    assert marks["rewind"]["x"] == [184, 218, 341]
    low, high = (10**end for end in figure["layout"]["yaxis"]["range"])
    assert all(low < y < high for name in marks for y in marks[name]["y"])
    labels = [item["text"] for item in figure["layout"]["annotations"]]
    assert "#3 cool \u00d7 0.5  step 273 \u2192 250" in labels
    rates = next(trace["y"] for trace in figure["data"] if trace["name"] == "learning rate")
    assert rates[341] == pytest.approx(rates[340] / 2, rel=0.1)


def test_reason_that_is_html_is_shown_as_text_on_hover(script: RunScript) -> None:
    script.train(5)
    script.record(1, "stop", reason="<b>a & b</b>")
    run = read_run(script.write())
    figure: Any = build_figure(run, collect_incidents(run))
    (stop,) = (trace for trace in figure["data"] if trace["name"] == "stop")
    assert stop["text"] == ["#1 stop: &lt;b&gt;a &amp; b&lt;/b&gt;"]


def test_failed_write_leaves_the_old_report_and_no_litter(
    script: RunScript, monkeypatch: pytest.MonkeyPatch
) -> None:
    script.train(5)
    folder = script.write()
    output = write_report(folder)
    before = output.read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError("disk is gone")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk is gone"):
        write_report(folder)
    assert output.read_bytes() == before
    assert not list(folder.glob(".report*"))


def test_spike_above_the_axis_is_clipped_to_its_edge(script: RunScript) -> None:
    script.train(50)
    script.train(2, verdict="spike", bump=1e6)
    script.train(50)
    figure: Any = build_figure(read_run(script.write()), [])
    spikes = next(trace for trace in figure["data"] if trace["name"] == "spike")
    calm_top = max(float(str(record["loss_nats"])) for record in script.metrics[:50])
    assert max(spikes["y"]) == pytest.approx(3 * calm_top, rel=1e-3)


def test_long_run_is_thinned_and_keeps_its_extremes(script: RunScript) -> None:
    script.train(20_000)
    script.metrics[12_345]["loss_nats"] = 9e9
    figure: Any = build_figure(read_run(script.write()), [])
    loss = next(trace for trace in figure["data"] if trace["name"] == "loss")
    assert len(loss["y"]) <= MAX_POINTS
    assert max(loss["y"]) == 9e9
    assert loss["x"][0] == 1
    assert loss["x"][-1] == 20_000


def test_decimation_keeps_gaps() -> None:
    values = [None if 400 <= index < 600 else float(index) for index in range(1000)]
    chosen = decimate(values, 50)
    assert len(chosen) <= 50
    assert any(values[index] is None for index in chosen)
    assert decimate([], 50) == []


def test_page_content_is_json_ready(recovered_run: RunScript) -> None:
    json.dumps(page_content(read_run(recovered_run.folder)), allow_nan=False)


def test_comparison_is_well_formed_xml_with_every_label(tmp_path: Path) -> None:
    curves = [
        Curve(label="no fault", xs=range(3), ys=[3.0, 2.0, 1.0]),
        Curve(label="fault & <nothing> acts", xs=range(3), ys=[3.0, math.nan, 90.0], color="#000"),
    ]
    output = write_comparison(
        curves, tmp_path / "a.svg", 'three "runs"', region=(1, 2), region_label="bad <data>"
    )
    root = ElementTree.fromstring(output.read_text())
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"no fault", "fault & <nothing> acts", 'three "runs"', "bad <data>"} <= set(texts)
    paths = [element.get("d") for element in root.iter("{http://www.w3.org/2000/svg}path")]
    assert str(paths[1]).count("M") == 2


@pytest.mark.parametrize("ys", [[], [None, None], [2.0]])
def test_comparison_of_curves_without_extent_is_well_formed(
    tmp_path: Path, ys: list[float | None]
) -> None:
    output = write_comparison([Curve(label="a", xs=range(len(ys)), ys=ys)], tmp_path / "a.svg", "t")
    ElementTree.fromstring(output.read_text())


def test_comparison_refuses_other_formats_and_uneven_curves(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ends in \.svg"):
        write_comparison([], tmp_path / "a.png", "title")
    with pytest.raises(ValueError, match="2 xs and 1 ys"):
        Curve(label="a", xs=[1, 2], ys=[1.0])


def test_ticks_are_round_and_inside() -> None:
    assert nice_ticks(0.0, 10.0, 5) == [0, 2, 4, 6, 8, 10]
    assert log_ticks(math.log10(2.5), math.log10(25)) == [3, 5, 10, 20]
    assert log_ticks(math.log10(2.9), math.log10(3.2)) == pytest.approx([2.9, 3.0, 3.1, 3.2])
    assert log_ticks(-3, 9) == pytest.approx([1e-2, 1, 1e2, 1e4, 1e6, 1e8])


def test_report_shows_what_the_starts_found(script: RunScript) -> None:
    script.start()
    script.event("bad_shards", lines=["<web>: a.bin has 2 bytes", "code: b.bin is gone"])
    script.event("settings_changed", lines=["run.steps: the folder has 40, now 60"])
    script.train(5)
    text, _ = read_page(write_report(script.write()))
    assert "&lt;web&gt;: a.bin has 2 bytes" in text
    assert "code: b.bin is gone" in text
    assert "run.steps: the folder has 40, now 60" in text
    assert '<span class="tag settings_changed">settings changed</span>' in text


def test_report_shows_the_data_of_the_last_start_that_told(script: RunScript) -> None:
    script.start()
    script.events[-1]["data"] = {"web": {"tokens": 1, "samples": 1, "share": 1.0}}
    script.start()
    script.events[-1]["data"] = {
        "web": {"tokens": 1_234_567, "samples": 10, "share": 0.75},
        "code": {"tokens": None},
        "books": "unknown",
    }
    script.start()
    content: Any = page_content(read_run(script.write()))
    assert [tuple(row.values()) for row in content["data"]] == [
        ("web", "1,234,567", "75.0%"),
        ("code", "\u2013", "\u2013"),
        ("books", "\u2013", "\u2013"),
    ]
    assert "share at start" in read_page(write_report(script.folder))[0]


def test_report_of_an_older_folder_has_no_empty_tables(recovered_run: RunScript) -> None:
    text, _ = read_page(write_report(recovered_run.folder))
    for heading in ("<h2>Data</h2>", "Found at a start"):
        assert heading not in text
