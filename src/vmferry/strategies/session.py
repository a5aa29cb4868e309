"""The one interface that strategies are written against.

It has two implementations: the engine (`vmferry.engine.session`, real guests) and the simulator
(`vmferry.simulator.session`, virtual time). A strategy is an `async` function over a `Session`; it
holds no clock, socket or process of its own, so the same file runs in both.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from vmferry._core import PageSet


@dataclass(frozen=True)
class Bounds:
    """What the user asked of a move."""

    max_downtime_s: float = 0.05
    """Stop when what is left is expected to take no longer than this."""
    max_rounds: int = 30
    """Rounds of pre-copy after which it stops whatever is left."""
    max_total_factor: float = 3.0
    """Stop when this many times the guest's memory has been pushed (Clark et al. 2005, 5.1)."""


@dataclass(frozen=True)
class Push:
    """What one push did."""

    pages: int
    wire_bytes: int
    seconds: float


class Session(Protocol):
    """One move, as its strategy sees it.

    `owed` is the heart of it: the pages that the destination does not have as they are at the
    source now, as far as the last scan knows. `scan` adds to it, `push` and `pull` take from it.
    """

    bounds: Bounds
    owed: PageSet
    eager: PageSet
    """All pages of the blocks that must be in place before the device state is loaded (firmware,
    video, tables): demand paging covers the other blocks only."""
    total_pages: int
    """Pages of the guest's memory, populated or not."""
    pushed_pages: int
    """Pages pushed so far, duplicates included."""

    async def scan(self) -> PageSet:
        """Pages written since the last scan (the first time: all populated ones); re-arms, waits
        for disk DMA begun before to end, and adds them to `owed`."""
        ...

    async def push(self, pages: PageSet) -> Push:
        """Sends these pages; when it returns the destination has installed them and they are
        no longer owed."""
        ...

    def push_time(self, pages: PageSet) -> float:
        """Seconds that pushing these pages is expected to take, by the rate of the last push."""
        ...

    async def stop(self) -> None:
        """Stops the guest at the source: the downtime begins."""
        ...

    async def switch_over(self) -> None:
        """Hands over the device state, commits, and resumes the guest at the destination: the
        downtime ends. Whatever is still owed is paged on demand from here on; owed pages of
        eager blocks are an error of the strategy."""
        ...

    async def pull(self) -> None:
        """Active push of everything still owed, while faults are served first; returns when the
        destination depends on nothing here."""
        ...


Strategy = Callable[[Session], Awaitable[None]]
