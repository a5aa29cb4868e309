"""The figure of a move: its curves, what is written in it, and that it can be made again."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from vmferry.errors import Refused
from vmferry.report.plot import curves, save_plot
from vmferry.report.records import Report
from vmferry.simulator import GuestModel, LinkModel, Pattern, simulate


def test_curves_follow_rounds_and_timeline(report: Report) -> None:
    drawn = curves(report)
    sent = [(0, 0), (0.05, 0), (1.05, 28_000), (1.09, 28_000), (1.19, 30_000), (1.22, 30_000)]
    assert [pages for _, pages in drawn.sent] == [pages for _, pages in sent]
    assert [t for t, _ in drawn.sent] == pytest.approx([t for t, _ in sent])
    assert drawn.dirty == [(1.05, 2_000), (1.19, 0)]
    assert (drawn.stopped_s, drawn.resumed_s) == (1.2, 1.22)


def test_the_pull_of_post_copy_is_drawn() -> None:
    guest = GuestModel(4096, 4096, 16, Pattern.uniform(1024, 500.0, 500.0))
    report = simulate("post-copy", guest, LinkModel(12.5e6, 0.0002))
    drawn = curves(report)
    assert drawn.sent[-1][1] == report.pages_transferred == 4112
    assert drawn.resumed_s is not None
    before = [pages for t, pages in drawn.sent if t <= drawn.resumed_s]
    assert before[-1] == 16
    times = [t for t, _ in drawn.sent]
    assert times == sorted(times)


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_the_same_report_gives_the_same_file(report: Report, tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra `plot`)")
    first, second = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    save_plot(report, first)
    save_plot(report, second)
    assert first.read_bytes() == second.read_bytes()
    assert len(first.read_bytes()) > 5000


def test_the_figure_says_what_it_shows(report: Report, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra `plot`)")
    path = tmp_path / "move.svg"
    save_plot(report, path)
    svg = path.read_text()
    for words in (
        "web by pre-copy: 1.22 s",
        "downtime 20.0 ms",
        "dirty after a push",
        "seconds since the move began",
    ):
        assert words in svg
    assert not re.search(r"<dc:date>", svg)


def test_another_format_is_refused(report: Report, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"\.svg or \.png"):
        save_plot(report, tmp_path / "move.gif")


def test_a_missing_matplotlib_is_refused_in_a_sentence(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(Refused, match=r"vmferry\[plot\]"):
        save_plot(report, tmp_path / "move.svg")
