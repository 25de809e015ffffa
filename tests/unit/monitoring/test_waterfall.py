"""The waterfall: every second of the wall time is drawn once; the picture needs nothing else."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest
from synthetic_run import RunScript

from monitoring.goodput import Goodput, goodput_of_run
from monitoring.waterfall import MEANINGS, duration, waterfall_svg, write_waterfall


def bars(picture: str) -> dict[str, tuple[float, float]]:
    """Return where each bar begins and how long it is, by its label."""
    found = {}
    for bar in ElementTree.fromstring(picture).iter("rect"):
        hint = bar.find("title")
        if hint is not None and hint.text is not None:
            label = hint.text.partition(":")[0]
            found[label] = (float(bar.attrib["x"]), float(bar.attrib["width"]))
    return found


def test_losses_fall_from_the_wall_time_down_to_training(recovered_run: RunScript) -> None:
    goodput = goodput_of_run(recovered_run.folder)
    drawn = bars(waterfall_svg(goodput))
    start, whole = drawn.pop("wall time")
    edge = start + whole
    for label, (x, width) in drawn.items():
        if label != "training":
            assert x + width == pytest.approx(edge, abs=0.3), label
            edge = x
    assert drawn["training"] == pytest.approx((start, edge - start), abs=0.3)
    assert drawn["training"][1] / whole == pytest.approx(goodput.goodput, abs=0.001)
    assert drawn["restart"][1] / whole == pytest.approx(30 / goodput.wall_seconds, abs=0.001)
    assert "compile" not in drawn


def test_run_without_time_has_a_picture() -> None:
    assert set(bars(waterfall_svg(Goodput()))) == {"wall time", "training"}


def test_every_class_has_its_meaning() -> None:
    assert list(MEANINGS) == list(Goodput().seconds_by_class())
    seconds = dict.fromkeys(MEANINGS, 1.0)
    drawn = bars(waterfall_svg(Goodput(**seconds, wall_seconds=float(len(seconds)))))
    assert len(drawn) == len(MEANINGS) + 1


def test_page_has_all_runs_and_no_links(recovered_run: RunScript, tmp_path: Path) -> None:
    goodput = goodput_of_run(recovered_run.folder)
    page = write_waterfall([("a<b", goodput), ("all runs", goodput)], tmp_path / "w.html")
    text = page.read_text(encoding="utf-8")
    assert text.count("<svg") == 2
    assert "a&lt;b: 3 min 08 s of wall time in 2 attempts, goodput 53.1%" in text
    assert "a<b" not in text
    assert "src=" not in text
    assert "href=" not in text


def test_picture_of_its_own_is_one_svg(recovered_run: RunScript, tmp_path: Path) -> None:
    goodput = goodput_of_run(recovered_run.folder)
    text = write_waterfall([("x & y", goodput)], tmp_path / "w.svg").read_text(encoding="utf-8")
    assert "x & y: 3 min 08 s" in "".join(ElementTree.fromstring(text).itertext())


def test_other_endings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"w\.png: give a path that ends in \.html or \.svg"):
        write_waterfall([("x", Goodput())], tmp_path / "w.png")


def test_durations_are_for_people() -> None:
    assert [duration(s) for s in (0.44, 12.4, 200, 18120)] == [
        "0.4 s", "12 s", "3 min 20 s", "5 h 02 min",
    ]  # fmt: skip
