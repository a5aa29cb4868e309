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
