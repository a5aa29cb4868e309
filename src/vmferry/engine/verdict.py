"""How a move ended, told on a new connection when the move's own connection broke near the commit.

The destination, once it has said Loaded, may not decide alone: the source may have been fenced a
moment later. It holds the guest paused, without a lock on anything, until the verdict comes.
"""

from __future__ import annotations

import asyncio

from vmferry.engine.ports import PeerLink
from vmferry.errors import FerryError
from vmferry.wire import messages as m

PERSISTENCE_S = 600.0
"""For how long the source goes on trying to deliver a verdict."""
RETRY_S = 0.5


async def deliver_verdict(peer: PeerLink, move: str, *, committed: bool) -> m.Resumed | None:
    """Tries until the destination has answered; None when it did not, or knows of no such move."""
    loop = asyncio.get_running_loop()
    end = loop.time() + PERSISTENCE_S
    while loop.time() < end:
        try:
            channel = await peer.open_control()
            try:
                await channel.send(m.Verdict(move=move, committed=committed))
                answer = await channel.receive(30)
            finally:
                await channel.close()
        except FerryError:
            await asyncio.sleep(RETRY_S)
            continue
        return answer if isinstance(answer, m.Resumed) else None
    return None
