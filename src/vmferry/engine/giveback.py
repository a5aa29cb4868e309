"""Leaves a guest as a dead daemon found it: running if it ran, and reached by its network."""

from __future__ import annotations

import asyncio

from vmferry.engine.fence import has_ended
from vmferry.errors import FerryError, GuestError
from vmferry.guest.process import read_process
from vmferry.guest.qemu import Qemu
from vmferry.network.cards import SourceNetwork

ATTEMPTS = 50
"""A monitor is free again only when the dead daemon's socket has been closed; and a disk's lock
only when the destination's QEMU has gone."""
RETRY_S = 0.1


async def leave_as_it_was(qmp: str, pid: int, start_time: int, *, resume: bool) -> bool:
    """Whether it could be done; False if the guest's process has ended, or never answers."""
    for _ in range(ATTEMPTS):
        if has_ended(pid, start_time):
            return False
        try:
            guest = await Qemu.attach(read_process(pid), qmp)
            if resume and not await guest.running():
                await guest.cont()
                await _draw_back(guest)
            await guest.close()
        except GuestError:
            await asyncio.sleep(RETRY_S)
            continue
        except FerryError:
            return False
        return True
    return False


async def _draw_back(guest: Qemu) -> None:
    """The other host may have drawn the guest's traffic already, at the stop."""
    try:
        network = await SourceNetwork.watch(guest.nics())
    except FerryError:
        # The guest's own next frame does the same.
        return
    network.draw_back()
    await network.close()
