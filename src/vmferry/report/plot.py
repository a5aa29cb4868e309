"""One figure of a move: pages sent and dirty over time, the downtime marked.

Needs matplotlib (the extra `plot`). The same report gives the same file, byte for byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vmferry.errors import Refused
from vmferry.report.records import Report
from vmferry.report.timeline import RESUMED, STOPPED
from vmferry.report.units import PAGE_BYTES, milliseconds, seconds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MIB_A_PAGE = PAGE_BYTES / (1 << 20)


@dataclass(frozen=True)
class Curves:
    """What the figure draws: points (seconds since the move began, pages)."""

    sent: list[tuple[float, int]]
    """Pages sent so far, duplicates included."""
    dirty: list[tuple[float, int]]
    """Pages found dirty by the scan after each push."""
    stopped_s: float | None
    resumed_s: float | None


def curves(report: Report) -> Curves:
    """Takes the curves from the timeline and the rounds."""
    at = {event.name: event.at_s for event in report.timeline}
    ends = [event.at_s for event in report.timeline if event.name == "pushed"]
    sent: list[tuple[float, int]] = [(0.0, 0)]
    dirty: list[tuple[float, int]] = []
    total = 0
    for end, entry in zip(ends, report.rounds, strict=False):
        sent.append((max(sent[-1][0], end - entry.seconds), total))
        total += entry.pages
        sent.append((end, total))
        dirty.append((end, entry.dirty_pages))
    if "pulled" in at and RESUMED in at:
        sent += [(at[RESUMED], total), (at["pulled"], report.pages_transferred)]
    sent.append((max(report.total_s, sent[-1][0]), sent[-1][1]))
    return Curves(sent, dirty, at.get(STOPPED), at.get(RESUMED))


def save_plot(report: Report, path: Path) -> None:
    """Writes the figure to `path`, whose suffix says the format: `.svg` or `.png`.

    Raises Refused for another suffix, and where matplotlib is missing.
    """
    kind = path.suffix.lstrip(".")
    if kind not in {"svg", "png"}:
        raise Refused(f"A plot is written as .svg or .png, not as {path.name}; name it so.")
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise Refused(
            "Plots need matplotlib, which is not installed; install vmferry[plot]."
        ) from error
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    with mpl.rc_context():
        # Whatever the user has set, the file is the same.
        mpl.rcdefaults()
        mpl.rcParams["svg.hashsalt"] = "vmferry"
        # Text stays text: it can be searched for, and does not depend on the fonts here.
        mpl.rcParams["svg.fonttype"] = "none"
        _figure(report).savefig(path, format=kind, dpi=120, metadata=metadata)


def _figure(report: Report) -> Figure:
    from matplotlib.figure import Figure

    drawn = curves(report)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(
        [t for t, _ in drawn.sent],
        [pages * _MIB_A_PAGE for _, pages in drawn.sent],
        color="#1f5fa8",
        label="sent",
    )
    if drawn.dirty:
        axes.plot(
            [t for t, _ in drawn.dirty],
            [pages * _MIB_A_PAGE for _, pages in drawn.dirty],
            color="#c0392b",
            marker="o",
            markersize=4,
            label="dirty after a push",
        )
    if drawn.stopped_s is not None and drawn.resumed_s is not None:
        label = f"downtime {milliseconds(report.downtime_ms)}"
        axes.axvspan(drawn.stopped_s, drawn.resumed_s, color="#888888", alpha=0.35, label=label)
        axes.axvline(drawn.stopped_s, color="#555555", linewidth=0.8)
    axes.axhline(
        report.pages_total * _MIB_A_PAGE, color="#999999", linewidth=0.8, linestyle=":",
        label="the guest's memory",
    )  # fmt: skip
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("seconds since the move began")
    axes.set_ylabel("MiB")
    axes.set_title(f"{report.guest} by {report.strategy}: {seconds(report.total_s)}")
    axes.grid(alpha=0.25)
    axes.legend(loc="best", frameon=False)
    return figure
