"""The promise, on a real Linux guest: every strategy moves it, and nobody who uses it notices.

Its own program rewrites memory and checks each page before; another writes and re-reads its disk
past the page cache; an outside client holds one TCP connection and counts the replies. After each
move both whole memories were compared.
"""

from __future__ import annotations

import asyncio

import pytest

from vmferry import _core
from vmferry.guest.monitor import Monitor
from vmferry.lab.client import OutsideClient
from vmferry.lab.guests import GuestCounts, LabGuest
from vmferry.lab.lab import Lab, MoveOutcome
from vmferry.lab.qemus import QemuBinary

STRATEGIES = ("pre-copy", "post-copy", "stop-and-copy")


async def moved(
    lab: Lab, guest: LabGuest, client: OutsideClient, strategy: str
) -> tuple[MoveOutcome, GuestCounts]:
    """One move, and every promise that holds for each."""
    before = await guest.counts()
    outcome = await lab.move(guest, strategy, verify=True, client=client)
    after = await guest.counts()
    report, window = outcome.report, outcome.window
    assert report.outcome == "moved"
    assert report.verification is not None
    assert report.verification.pages_differing == 0
    assert report.verification.pages_compared == report.pages_total
    assert after.ticks > before.ticks
    assert after.pages_written > before.pages_written
    assert after.corrupt == after.disk_bad == after.died == 0
    assert window is not None
    assert window.tcp_intact
    return outcome, after


async def reboots(guest: LabGuest) -> None:
    """The guest starts anew where it is: its firmware came along."""
    host, process = guest.locate()
    boots = guest.console().count("LOAD-READY")
    monitor = await Monitor.connect(process.qmp, guest=guest.name)
    await monitor.execute("system_reset")
    await monitor.disconnect()
    async with asyncio.timeout(120):
        # There is no event for a line on a console.
        while guest.console().count("LOAD-READY") == boots:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    assert guest.locate()[0] == host


@pytest.mark.parametrize("machine_type", ["q35", "pc"])
@pytest.mark.timeout(400)
def test_every_strategy_moves_a_guest_that_nobody_prepared(
    binary: QemuBinary, machine_type: str
) -> None:
    async def run() -> None:
        async with Lab() as lab:
            await lab.start_hosts()
            guest = await lab.boot_guest(binary=binary, machine=machine_type)
            client = await lab.start_client(guest)
            at = guest.locate()[0]
            for strategy in STRATEGIES:
                outcome, _ = await moved(lab, guest, client, strategy)
                here, process = guest.locate()
                assert here != at, "it is at the other host now"
                at = here
                assert _core.find_userfaultfd(process.pid) == []
                check_report(outcome, strategy)
            if machine_type == "q35":
                await reboots(guest)

    asyncio.run(run())


def check_report(outcome: MoveOutcome, strategy: str) -> None:
    """What the report must show, of the strategy's own kind."""
    report = outcome.report
    assert report.downtime is not None
    assert report.downtime_ms > 0
    assert report.device_state_bytes > 10_000
    names = [event.name for event in report.timeline if event.side == "source"]
    for earlier, later in zip(
        ("offered", "stopped", "loaded", "fenced"),
        ("stopped", "loaded", "fenced", "resumed"),
        strict=True,
    ):
        assert names.index(earlier) < names.index(later)
    if strategy == "post-copy":
        assert report.faults.network_faults > 0
        assert report.recover_s > 0
        missing = report.pages_transferred
        assert missing <= report.pages_total, "every page travels once"
    else:
        assert report.faults.network_faults == 0
        assert report.recover_s == 0


def test_a_paused_guest_moves_and_stays_paused(machine: None) -> None:
    async def run() -> None:
        async with Lab() as lab:
            await lab.start_hosts()
            guest = await lab.boot_guest()
            _, process = guest.locate()
            monitor = await Monitor.connect(process.qmp, guest=guest.name)
            await monitor.stop()
            await monitor.disconnect()
            outcome = await lab.move(guest, "pre-copy", verify=True)
            assert outcome.report.verification is not None
            assert outcome.report.verification.pages_differing == 0
            _, process = guest.locate()
            monitor = await Monitor.connect(process.qmp, guest=guest.name)
            assert not await monitor.running()
            await monitor.cont()
            await monitor.disconnect()
            counts = await guest.counts()
            assert counts.corrupt == counts.died == 0

    asyncio.run(run())


@pytest.mark.long
@pytest.mark.timeout(900)
def test_twenty_moves_there_and_back(machine: None) -> None:
    async def run() -> None:
        async with Lab() as lab:
            await lab.start_hosts()
            guest = await lab.boot_guest()
            client = await lab.start_client(guest)
            lengths = []
            for number in range(20):
                await moved(lab, guest, client, STRATEGIES[number % len(STRATEGIES)])
                lengths.append(len(guest.locate()[1].argv))
            assert len(set(lengths)) == 1, "its command line grows with every move"

    asyncio.run(run())
