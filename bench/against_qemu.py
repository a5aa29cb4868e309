"""vmferry's moves beside QEMU's own migration of the same guest, over the same link, in pairs.

    python bench/against_qemu.py [--runs N] [--json FILE]

Cells: {idle, 128 MiB rewritten at 40 MB/s} x {unshaped, 1 Gbit/s} x {pre-copy, post-copy}. In each
run vmferry moves the guest there and QEMU moves it back, so both meet the same guest, link and
state of the machine. Every move of vmferry compares the whole memory; the guest checks each page
before it rewrites it. Prints a table of medians (and spans), and the median of the ratios pair by
pair: below 1 vmferry is ahead.

QEMU's total runs from its `migrate` command; starting the destination's QEMU, which vmferry's total
includes, is counted apart (`start`).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from vmferry import __version__
from vmferry.errors import FerryError
from vmferry.lab.baseline import QemuMode
from vmferry.lab.client import OutsideClient
from vmferry.lab.guests import IDLE, WORKING, LabGuest, Load
from vmferry.lab.lab import Lab, MoveOutcome, QemuOutcome

LOADS: dict[str, Load] = {"idle": IDLE, "40 MB/s": WORKING}
LINKS: dict[str, int | None] = {"unshaped": None, "1 Gbit/s": 1000}
MODES: tuple[QemuMode, ...] = ("pre-copy", "post-copy")


class Sample(msgspec.Struct, frozen=True):
    """One move, by either."""

    downtime_ms: float
    blackout_ms: float
    total_s: float
    start_s: float
    """Start of the destination's QEMU: inside `total_s` for vmferry (0 here), apart for QEMU."""
    wire_mb: float
    client_gap_ms: float
    """How far the machine disturbed the client itself."""


class Cell(msgspec.Struct, frozen=True):
    """All pairs of one load, link and mode."""

    load: str
    link: str
    mode: str
    vmferry: list[Sample]
    qemu: list[Sample]


class Result(msgspec.Struct, frozen=True):
    """What the JSON file holds."""

    vmferry_version: str
    qemu: str
    kernel: str
    machine: str
    cells: list[Cell]


FIGURES: tuple[tuple[str, Callable[[Sample], float], str], ...] = (
    ("downtime ms", lambda s: s.downtime_ms, "{:.0f}"),
    ("blackout ms", lambda s: s.blackout_ms, "{:.0f}"),
    ("total s", lambda s: s.total_s, "{:.2f}"),
    ("total incl. start s", lambda s: s.total_s + s.start_s, "{:.2f}"),
    ("wire MB", lambda s: s.wire_mb, "{:.0f}"),
)


async def run(runs: int, say: Callable[[str], None]) -> Result:
    """All cells; FerryError when a promise was broken."""
    cells: list[Cell] = []
    async with Lab(say) as lab:
        await lab.start_hosts()
        binary = ""
        for load_name, load in LOADS.items():
            guest = await lab.boot_guest(load=load, disk_load=False)
            binary = guest.spec.binary.name
            client = await lab.start_client(guest)
            for link_name, rate in LINKS.items():
                await lab.shape(rate)
                for mode in MODES:
                    cell = Cell(load_name, link_name, mode, [], [])
                    for number in range(runs):
                        await _pair(lab, guest, client, cell)
                        say(f"{load_name}, {link_name}, {mode}: pair {number + 1} of {runs}")
                    cells.append(cell)
            counts, window = await guest.counts(), await client.window(0)
            if counts.corrupt or counts.died or not window.tcp_intact:
                raise FerryError(f"a promise was broken: {counts}, {window}")
            await client.close()
            await lab.end_guest(guest)
    machine = f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores"
    return Result(__version__, binary, platform.release(), machine, cells)


async def _pair(lab: Lab, guest: LabGuest, client: OutsideClient, cell: Cell) -> None:
    outcome = await lab.move(guest, cell.mode, verify=True, client=client)
    verification = outcome.report.verification
    if verification is None or verification.pages_differing:
        raise FerryError(f"memory differs: {verification}")
    cell.vmferry.append(_sample_of_vmferry(outcome))
    mode: QemuMode = "post-copy" if cell.mode == "post-copy" else "pre-copy"
    cell.qemu.append(_sample_of_qemu(await lab.migrate_with_qemu(guest, mode, client=client)))


def _sample_of_vmferry(outcome: MoveOutcome) -> Sample:
    report, window = outcome.report, outcome.window
    assert window is not None
    assert report.blackout_ms is not None
    return Sample(
        downtime_ms=report.downtime_ms,
        blackout_ms=report.blackout_ms,
        total_s=report.total_s,
        start_s=0.0,
        wire_mb=report.bytes_on_wire / 1e6,
        client_gap_ms=window.send_gap_ms,
    )


def _sample_of_qemu(outcome: QemuOutcome) -> Sample:
    window = outcome.window
    assert window is not None
    return Sample(
        downtime_ms=outcome.migration.downtime_ms,
        blackout_ms=window.blackout_ms,
        total_s=outcome.migration.total_s,
        start_s=outcome.start_s,
        wire_mb=outcome.migration.bytes_transferred / 1e6,
        client_gap_ms=window.send_gap_ms,
    )


def table(result: Result) -> Table:
    """Medians with spans, and the median ratio pair by pair."""
    shown = Table(title=f"vmferry {result.vmferry_version} beside {result.qemu}")
    for name in ("load", "link", "mode", "figure", "vmferry", "QEMU", "ratio"):
        shown.add_column(name, justify="left" if name in ("load", "link", "mode") else "right")
    for cell in result.cells:
        for name, figure, form in FIGURES:
            ours, theirs = [figure(s) for s in cell.vmferry], [figure(s) for s in cell.qemu]
            ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
            mark = "[bold]" if ratio < 1 else "[red]"
            shown.add_row(
                cell.load,
                cell.link,
                cell.mode,
                name,
                _span(ours, form),
                _span(theirs, form),
                f"{mark}{ratio:.2f}[/]",
            )
        shown.add_section()
    return shown


def _span(values: Sequence[float], form: str) -> str:
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{form.format(middle)} ({form.format(low)}-{form.format(high)})"


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    console = Console(width=110)
    try:
        result = asyncio.run(run(arguments.runs, lambda line: print(line, file=sys.stderr)))
    except FerryError as error:
        print(f"the bench ended early: {error}", file=sys.stderr)
        return 1
    console.print(table(result))
    if arguments.json is not None:
        arguments.json.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
