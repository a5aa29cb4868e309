"""Tables, by what they say."""

from __future__ import annotations

import io

import msgspec
import pytest
from rich.console import Console, RenderableType

from vmferry.report.records import Downtime, Faults, Report, Verification
from vmferry.report.table import Row, comparison, downtime, headline, row, summary, verdict


def shown(renderable: RenderableType, *, styled: bool = False) -> str:
    console = Console(
        file=io.StringIO(),
        width=110,
        force_terminal=styled,
        color_system="standard" if styled else None,
    )
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def line_with(text: str, word: str) -> list[str]:
    """Cells of the one line of a table that begins with a word."""
    lines = [line for line in text.splitlines() if word in line]
    assert len(lines) == 1, text
    return [cell.strip() for cell in lines[0].strip("│").split("│")]


def test_a_comparison_holds_every_figure_of_every_move(report: Report) -> None:
    qemu = Row("QEMU pre-copy", 301.0, 333.3, 12.5, 91 << 20, None, "not compared")
    text = shown(comparison([row(report, "vmferry pre-copy"), qemu], "idle, 1 Gbit/s"))
    assert "idle, 1 Gbit/s" in text
    assert line_with(text, "vmferry pre-copy") == [
        "vmferry pre-copy", "20.0 ms", "24.2 ms", "1.22 s", "78.0 MiB", "30,000", "equal",
    ]  # fmt: skip
    assert line_with(text, "QEMU pre-copy") == [
        "QEMU pre-copy", "301.0 ms", "333.3 ms", "12.5 s", "91.0 MiB", "-", "not compared",
    ]  # fmt: skip


def test_the_best_of_each_column_is_bold(report: Report) -> None:
    slow = Row("slow", 301.0, 333.3, 12.5, 1 << 20, 1, "equal")
    text = shown(comparison([row(report, "fast"), slow]), styled=True)
    bold = [part.split("\x1b[0m")[0] for part in text.split("\x1b[1m")[1:]]
    assert {"20.0 ms", "24.2 ms", "1.22 s", "1.00 MiB", "1"} <= {b.strip() for b in bold}
    assert "301.0 ms" not in bold


@pytest.mark.parametrize(
    ("differing", "word"), [(0, "equal"), (1, "1 page differs"), (7, "7 pages differ")]
)
def test_the_verdict_on_memory(differing: int, word: str) -> None:
    assert verdict(Verification(100, differing, 0.1)) == word


def test_the_headline_says_it_all(report: Report) -> None:
    assert headline(report) == (
        "web: alpha to beta by pre-copy: moved in 1.22 s, downtime 20.0 ms, blackout 24.2 ms; "
        "30,000 pages of 131,072, 78.0 MiB on the wire; memory equal."
    )
    failed = msgspec.structs.replace(report, outcome="failed", error="The link broke.")
    assert headline(failed) == "web: alpha to beta by pre-copy: failed. The link broke."


def test_the_parts_of_the_downtime_fill_the_bar_by_their_share() -> None:
    parts = Downtime(20.0, 0.0, 0.0, 5.0, 0.0, 10.0, 0.0, 0.0)
    text = shown(downtime(parts))
    title, drawn, legend = text.splitlines()[:3]
    assert title.strip() == "downtime 20.0 ms"
    assert drawn.strip() == "█" * 60
    for words in ("last pages 5.00 ms", "load state 10.0 ms", "other 5.00 ms"):
        assert words in text
    assert "stop 0.00 ms" in legend


def test_a_summary_has_rounds_faults_changes_and_timeline(report: Report) -> None:
    text = shown(summary(report))
    assert "/run/vmferry/web.qmp" in text
    assert line_with(text, "28,000")[:6] == [
        "1", "28,000", "70.0 MiB", "1.00 s", "73 MB/s", "2,000",
    ]  # fmt: skip
    assert "12 network faults (250 µs median, 900 µs p99, 1200 µs at most)" in text
    assert "stalled for 5.50 ms" in text
    assert "┃ stopped" in text


def test_a_summary_of_little_is_short(report: Report) -> None:
    failed = msgspec.structs.replace(
        report, outcome="failed", error="No.", changes=[], downtime=None, rounds=[],
        faults=Faults(), timeline=[],
    )  # fmt: skip
    assert shown(summary(failed)).strip() == headline(failed)
