"""The guests of this machine, as commands name them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmferry.guest.process import GuestProcess


async def find(guest: str) -> GuestProcess:
    """By name, PID or path of the monitor's socket. Refused when there is no such guest."""
    from vmferry.guest import process

    return await asyncio.to_thread(process.find, guest)


async def all_guests() -> list[GuestProcess]:
    """Every QEMU of this machine that can be looked at."""
    from vmferry.guest import process

    return await asyncio.to_thread(process.find_all)


async def blockers(process: GuestProcess) -> list[str]:
    """What keeps this guest from being moved, a sentence each. GuestError, Refused when its
    monitor cannot be asked."""
    from vmferry.guest.qemu import Qemu

    qemu = await Qemu.attach(process)
    try:
        return await qemu.blockers()
    finally:
        await qemu.close()
