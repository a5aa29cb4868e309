"""The monitor: every failure is one sentence, and no wait is without a limit."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import pytest

from vmferry.errors import GuestError
from vmferry.guest.monitor import CommandFailed, Monitor

from .firmware_guests import Guests


def test_held_by_another_client(guests: Guests) -> None:
    guest = guests.start("-S")

    async def scenario() -> None:
        first = await Monitor.connect(guest.qmp)
        with pytest.raises(GuestError, match="in use by somebody else"):
            await Monitor.connect(guest.qmp, 0.3, "held")
        await first.disconnect()
        second = await Monitor.connect(guest.qmp)
        await second.disconnect()

    asyncio.run(scenario())


def test_nobody_listens() -> None:
    with pytest.raises(GuestError, match="does not answer"):
        asyncio.run(Monitor.connect("/nowhere/at.all"))


def test_an_unknown_command(guests: Guests) -> None:
    guest = guests.start("-S")

    async def scenario() -> CommandFailed:
        monitor = await Monitor.connect(guest.qmp, guest=guest.name)
        with pytest.raises(CommandFailed, match=f"guest {guest.name} refused no-such") as failed:
            await monitor.execute("no-such")
        await monitor.disconnect()
        return failed.value

    assert asyncio.run(scenario()).error_class == "CommandNotFound"


def test_the_guest_dies_during_a_command(guests: Guests) -> None:
    guest = guests.start()

    async def scenario() -> None:
        monitor = await Monitor.connect(guest.qmp)
        os.kill(guest.pid, signal.SIGSTOP)
        asking = asyncio.create_task(monitor.execute("query-status"))
        await asyncio.sleep(0)
        await asyncio.to_thread(guests.kill, guest)
        with pytest.raises(GuestError, match="is gone"):
            await asking
        with pytest.raises(GuestError, match="is gone"):
            await monitor.execute("query-status")
        await monitor.disconnect()
        await monitor.disconnect()

    asyncio.run(scenario())


def test_a_guest_that_hangs(guests: Guests) -> None:
    guest = guests.start()

    async def scenario() -> None:
        monitor = await Monitor.connect(guest.qmp)
        os.kill(guest.pid, signal.SIGSTOP)
        with pytest.raises(GuestError, match="did not answer query-status within"):
            await monitor.execute("query-status", timeout_s=0.2)
        os.kill(guest.pid, signal.SIGCONT)
        # The late answer goes to nobody; the connection is good.
        assert await monitor.running()
        await monitor.disconnect()

    asyncio.run(scenario())


def test_stop_and_cont_tell_when(guests: Guests) -> None:
    guest = guests.start()

    async def scenario() -> None:
        monitor = await Monitor.connect(guest.qmp)
        instants = [time.time_ns() // 1000 * 1000]
        for _ in range(3):
            instants += [await monitor.stop(), time.time_ns() // 1000 * 1000]
            assert not await monitor.running()
            instants += [await monitor.cont(), time.time_ns() // 1000 * 1000]
            assert await monitor.running()
        assert instants == sorted(instants)
        # Asked for twice: no event, and no wait for one.
        before = time.time_ns()
        assert await monitor.cont() >= before
        await monitor.stop()
        assert await monitor.stop() >= before
        await monitor.disconnect()

    asyncio.run(scenario())
