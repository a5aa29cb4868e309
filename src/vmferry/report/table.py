"""Tables of a move and of several side by side, for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vmferry.report.bars import Segment, bar, stacked
from vmferry.report.records import Downtime, Faults, Report, Verification
from vmferry.report.timeline import timeline
from vmferry.report.units import milliseconds, rate, seconds, size

BAR_WIDTH = 60
_ROUND_BAR_WIDTH = 16
_LEGEND_COLUMNS = 4


@dataclass(frozen=True)
class Row:
    """One move in a comparison, vmferry's or another's. None is what nobody measured."""

    label: str
    downtime_ms: float
    blackout_ms: float | None
    total_s: float
    bytes_on_wire: int
    pages: int | None
    memory: str
    """`equal`, `7 pages differ`, `not compared`."""


def row(report: Report, label: str | None = None) -> Row:
    """The row of a report; its label is the strategy's name unless another is given."""
    return Row(
        label=label or report.strategy,
        downtime_ms=report.downtime_ms,
        blackout_ms=report.blackout_ms,
        total_s=report.total_s,
        bytes_on_wire=report.bytes_on_wire,
        pages=report.pages_transferred,
        memory=verdict(report.verification),
    )


def verdict(verification: Verification | None) -> str:
    """What a whole-memory comparison found, in a word or three."""
    if verification is None:
        return "not compared"
    differing = verification.pages_differing
    if differing == 0:
        return "equal"
    return f"{differing} page{'' if differing == 1 else 's'} differ{'s' if differing == 1 else ''}"


def comparison(rows: Sequence[Row], title: str = "") -> Table:
    """Moves side by side; the best figure of each column stands in bold."""
    table = Table(title=title or None, title_justify="left")
    table.add_column("move")
    for name in ("downtime", "blackout", "total", "on the wire", "pages"):
        table.add_column(name, justify="right")
    table.add_column("memory")
    columns: list[tuple[list[float | None], Callable[[float], str]]] = [
        ([r.downtime_ms for r in rows], milliseconds),
        ([r.blackout_ms for r in rows], milliseconds),
        ([r.total_s for r in rows], seconds),
        ([r.bytes_on_wire for r in rows], size),
        ([r.pages for r in rows], lambda pages: f"{pages:,.0f}"),
    ]
    written = [_column(values, form) for values, form in columns]
    for index, entry in enumerate(rows):
        memory = Text(entry.memory, style="red" if "differ" in entry.memory else "")
        table.add_row(entry.label, *(column[index] for column in written), memory)
    return table


def _column(values: Sequence[float | None], form: Callable[[float], str]) -> list[Text]:
    known = [value for value in values if value is not None]
    best = min(known) if len(known) > 1 else None
    return [
        Text("-") if value is None else Text(form(value), style="bold" if value == best else "")
        for value in values
    ]


def summary(report: Report) -> RenderableType:
    """One report in full: what happened, the downtime in its parts, rounds, faults, timeline."""
    parts: list[RenderableType] = [Text(headline(report))]
    parts += [Text(f"  {change}") for change in report.changes]
    if report.downtime is not None:
        parts += [Text(), downtime(report.downtime)]
    if report.rounds:
        parts += [Text(), rounds(report)]
    if report.faults != Faults():
        parts += [Text(), Text(faults(report.faults))]
    if report.timeline:
        parts += [Text(), Text(timeline(report))]
    return Group(*parts)


def headline(report: Report) -> str:
    """One sentence or two on the whole move."""
    way = f"{report.guest}: {report.source} to {report.destination} by {report.strategy}"
    if report.outcome != "moved":
        return f"{way}: {report.outcome}. {report.error}".rstrip()
    blackout = ""
    if report.blackout_ms is not None:
        blackout = f", blackout {milliseconds(report.blackout_ms)}"
    return (
        f"{way}: moved in {seconds(report.total_s)}, downtime {milliseconds(report.downtime_ms)}"
        f"{blackout}; {report.pages_transferred:,} pages of {report.pages_total:,}, "
        f"{size(report.bytes_on_wire)} on the wire; memory {verdict(report.verification)}."
    )


def downtime(parts: Downtime) -> Group:
    """The parts of the downtime as one bar with a legend.

    The device state is saved beside the last scan and push, so the parts may sum up to more than
    the downtime; what no part accounts for is shown as `other`.
    """
    segments = [
        Segment("stop", parts.stop_ms, "blue"),
        Segment("scan", parts.scan_ms, "cyan"),
        Segment("last pages", parts.push_ms, "green"),
        Segment("save state", parts.device_state_ms, "yellow"),
        Segment("load state", parts.load_ms, "red"),
        Segment("commit", parts.commit_ms, "magenta"),
        Segment("start", parts.start_ms, "white"),
    ]
    other = parts.total_ms - sum(segment.value for segment in segments)
    if other > parts.total_ms * 0.01:
        segments.append(Segment("other", other, "bright_black"))
    legend = Table.grid(padding=(0, 3, 0, 0))
    keys = [
        Text.assemble(("█ ", segment.style), f"{segment.label} {milliseconds(segment.value)}")
        for segment in segments
    ]
    for start in range(0, len(keys), _LEGEND_COLUMNS):
        legend.add_row(*keys[start : start + _LEGEND_COLUMNS])
    title = Text(f"downtime {milliseconds(parts.total_ms)}")
    return Group(title, stacked(segments, BAR_WIDTH), legend)


def rounds(report: Report) -> Table:
    """Each push of the strategy: how much, how fast, and what was dirty after it."""
    table = Table(title="pushes", title_justify="left")
    for name in ("", "pages", "on the wire", "took", "rate", "dirty after"):
        table.add_column(name, justify="right")
    table.add_column("")
    most = max(entry.dirty_pages for entry in report.rounds)
    for number, entry in enumerate(report.rounds, start=1):
        table.add_row(
            str(number),
            f"{entry.pages:,}",
            size(entry.wire_bytes),
            seconds(entry.seconds),
            rate(entry.wire_bytes, entry.seconds),
            f"{entry.dirty_pages:,}",
            bar(entry.dirty_pages, most, _ROUND_BAR_WIDTH),
        )
    return table


def faults(counted: Faults) -> str:
    """Demand paging in one sentence."""
    latency = (
        f"{counted.fault_latency_us_p50:.0f} µs median, {counted.fault_latency_us_p99:.0f} µs p99, "
        f"{counted.fault_latency_us_max:.0f} µs at most"
    )
    return (
        f"demand paging: {counted.network_faults:,} network faults ({latency}), "
        f"{counted.prefetch_hits:,} met a page under way, {counted.zero_faults:,} were zero; "
        f"the guest stalled for {milliseconds(counted.guest_stall_ms)} in all."
    )
