"""`make demo`: one guest under load, moved by vmferry three ways and by QEMU two, side by side."""

from __future__ import annotations

from rich.console import Console

from vmferry.errors import FerryError
from vmferry.host.probe import OPTIONAL, Capability, probe
from vmferry.lab.baseline import QemuMode
from vmferry.lab.client import OutsideClient
from vmferry.lab.guests import WORKING, LabGuest
from vmferry.lab.lab import Lab, QemuOutcome
from vmferry.report.table import Row, comparison, row

LINK_MBIT = 1000
STRATEGIES = ("pre-copy", "post-copy", "stop-and-copy")
QEMU_MODES: tuple[QemuMode, ...] = ("pre-copy", "post-copy")
_NEEDED_BY_THE_LAB = ("root", "namespaces", "bridge", "tap", "shaping", "qemu")


async def run() -> int:
    """0 when every promise held: memory equal, nothing corrupt, the client's connection intact."""
    console = Console()
    missing = _missing()
    if missing:
        _say_what_works(console, missing)
        return 1
    try:
        async with Lab(lambda line: console.print(f"  {line}", highlight=False)) as lab:
            return await _show(lab, console)
    except FerryError as error:
        console.print(f"The demo ended early: {error}")
        return 1


async def _show(lab: Lab, console: Console) -> int:
    console.print("Two hosts, a switch, an outside client, a migration link of 1 Gbit/s.")
    await lab.start_hosts()
    await lab.shape(LINK_MBIT)
    console.print(
        f"Booting a Linux guest on host a; a program in it rewrites random pages of "
        f"{WORKING.area_mib} MiB at {WORKING.megabytes_per_s} MB/s and checks each before."
    )
    guest = await lab.boot_guest()
    console.print(f"It runs after {guest.booted_s:.0f} s (QEMU {guest.spec.binary.name}, TCG).")
    client = await lab.start_client(guest)
    rows: list[Row] = []
    for strategy in STRATEGIES:
        here, _ = guest.locate()
        console.print(f"\nvmferry move {guest.name} --strategy {strategy} (from host {here})")
        outcome = await lab.move(guest, strategy, verify=True, client=client, show_progress=True)
        rows.append(row(outcome.report, f"vmferry {strategy}"))
    for mode in QEMU_MODES:
        console.print(f"\nQEMU's own {mode}")
        rows.append(_row_of_qemu(await lab.migrate_with_qemu(guest, mode, client=client)))
    console.print()
    console.print(comparison(rows, title="the same guest, load and link"))
    return await _promises(console, guest, client, rows)


async def _promises(
    console: Console, guest: LabGuest, client: OutsideClient, rows: list[Row]
) -> int:
    counts = await guest.counts()
    window = await client.window(0)
    kept = (
        counts.corrupt == counts.disk_bad == counts.died == 0
        and window.tcp_intact
        and all(r.memory == "equal" for r in rows if r.label.startswith("vmferry"))
    )
    console.print(
        f"The guest rewrote {counts.pages_written:,} pages and checked each before: "
        f"{counts.corrupt} corrupt; {counts.disk_operations:,} disk operations, "
        f"{counts.disk_bad} bad."
    )
    console.print(
        f"The client's TCP connection: {window.tcp_replies:,} replies, {window.tcp_wrong} wrong, "
        f"{window.tcp_doubled} doubled, {window.tcp_losses} lost connections."
    )
    console.print(
        "downtime: STOP at one side to RESUME at the other. blackout: the longest time without an "
        "echo at the client, the time of the memory comparison taken out; under emulation (TCG) it "
        "contains 50 to 120 ms in which the new QEMU translates the guest's code anew."
    )
    if not kept:
        console.print("[bold red]A promise was broken: see above.[/]")
    return 0 if kept else 1


def _row_of_qemu(outcome: QemuOutcome) -> Row:
    migration = outcome.migration
    return Row(
        label=f"QEMU {migration.mode}",
        downtime_ms=migration.downtime_ms,
        blackout_ms=outcome.window.blackout_ms if outcome.window else None,
        total_s=migration.total_s,
        bytes_on_wire=migration.bytes_transferred,
        pages=migration.pages_transferred,
        memory="-",
    )


def _missing() -> list[Capability]:
    return [
        capability
        for capability in probe()
        if not capability.ok
        and (capability.name in _NEEDED_BY_THE_LAB or capability.name not in OPTIONAL)
    ]


def _say_what_works(console: Console, missing: list[Capability]) -> None:
    from vmferry.simulator.run import demonstration

    console.print("The demo moves a real guest, and this machine lacks what that takes:")
    for capability in missing:
        console.print(f"  {capability.name}: {capability.detail}. {capability.remedy}")
    console.print(
        "What works here all the same: the simulator (the same strategy files, below), and, where "
        "attaching is possible, the synthetic guest (`make test`).\n"
    )
    rows = [row(report) for report in demonstration()]
    console.print(comparison(rows, title="simulated: 512 MiB, 40 MB/s rewritten, 1 Gbit/s"))
