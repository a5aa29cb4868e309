"""A link between two hosts: bandwidth, latency, and urgent messages ahead of bulk."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from dataclasses import dataclass

URGENT, BULK = 0, 1


@dataclass(frozen=True)
class LinkModel:
    """What the link can do, each way."""

    bytes_per_s: float = 125e6
    latency_s: float = 0.0001
    """One way, after the last byte has left."""


class SimulatedLink:
    """The way from the source to the destination.

    One message at a time is on the wire. Those that wait go by priority, then by age; a message
    that has begun is not interrupted, so an urgent one waits for at most one bulk message.
    """

    def __init__(self, model: LinkModel) -> None:
        self.model = model
        self.sent_bytes = 0
        self._busy = False
        self._order = itertools.count()
        self._waiting: list[tuple[int, int, asyncio.Event]] = []

    async def send(self, size: int, priority: int = BULK) -> float:
        """Waits for its turn and puts `size` bytes on the wire; the loop's time at which the last
        of them arrives."""
        await self.turn(priority)
        return await self.transmit(size)

    async def turn(self, priority: int) -> None:
        """Returns when the wire is this caller's, who must `transmit` next."""
        if self._busy:
            event = asyncio.Event()
            heapq.heappush(self._waiting, (priority, next(self._order), event))
            await event.wait()
        self._busy = True

    async def transmit(self, size: int) -> float:
        """Puts `size` bytes on the wire; the loop's time at which the last of them arrives."""
        self.sent_bytes += size
        await asyncio.sleep(size / self.model.bytes_per_s)
        if self._waiting:
            # The wire stays busy: it is handed on.
            heapq.heappop(self._waiting)[2].set()
        else:
            self._busy = False
        return asyncio.get_running_loop().time() + self.model.latency_s
