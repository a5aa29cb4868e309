"""Post-copy (Hines, Deshpande, Gopalan, VEE 2009 and OSR 2009, section 3)."""

from __future__ import annotations

from vmferry.strategies.session import Session


async def post_copy(session: Session) -> None:
    """Switch over at once; the destination pages on demand what it touches, while an active push
    sends everything else. Every page of the demand-paged blocks travels once.

    Firmware, video memory and tables go first, while the guest runs: they are small, and the load
    of the device state reads them.
    """
    await session.scan()
    await session.push(session.owed & session.eager)
    await session.stop()
    await session.scan()
    await session.push(session.owed & session.eager)
    await session.switch_over()
    await session.pull()
