"""The strategies' session in virtual time, and the check that they move a guest whole.

In place of content each page has a version number at both sides. What arrives is the version that
the page had when it was read, so that a page written later is stale there, as it would be. At the
switch-over every page must be at the destination in the source's version, or be owed; at the end
nothing may be owed. A strategy that forgets a page fails here, whatever its timing.
"""

from __future__ import annotations

import asyncio
from array import array
from dataclasses import dataclass

from vmferry._core import PAGE_SIZE, PageSet
from vmferry.errors import FerryError
from vmferry.report.records import Event, Round
from vmferry.simulator.guest import FIRMWARE, RAM, SimulatedGuest
from vmferry.simulator.link import BULK, SimulatedLink
from vmferry.simulator.paging import DemandPaging
from vmferry.strategies.session import Bounds, Push

PAGE_WIRE_BYTES = PAGE_SIZE + 16
"""A page and its share of the frame around it."""
BATCH_PAGES = 64
RATE_SAMPLE_PAGES = 256
"""A push smaller than this says nothing about the link."""


class BrokenStrategy(FerryError):
    """A strategy that would have lost or damaged a guest, or that breaks the session's rules."""


@dataclass(frozen=True)
class Costs:
    """What hosts take for the steps that move no page (measured on QEMU 10.0 with one NIC)."""

    scan_s: float = 0.0005
    stop_s: float = 0.0005
    save_s: float = 0.003
    device_state_bytes: int = 80_000
    load_s: float = 0.009
    commit_s: float = 0.001
    start_s: float = 0.001


@dataclass
class Parts:
    """Seconds of the downtime, and the instants around it."""

    stopped_at: float = 0.0
    resumed_at: float = 0.0
    stop_s: float = 0.0
    scan_s: float = 0.0
    push_s: float = 0.0
    save_s: float = 0.0
    load_s: float = 0.0
    commit_s: float = 0.0
    start_s: float = 0.0


class SimulatedSession:
    """One move of a simulated guest (`vmferry.strategies.session.Session`)."""

    def __init__(
        self,
        guest: SimulatedGuest,
        link: SimulatedLink,
        bounds: Bounds,
        costs: Costs,
        *,
        demand_paging: bool,
    ) -> None:
        self.guest, self.link, self.bounds, self.costs = guest, link, bounds, costs
        self.shape = guest.model.shape
        self.owed = PageSet(self.shape)
        self.eager = PageSet(self.shape)
        self.eager.add(FIRMWARE, 0, self.shape[FIRMWARE])
        if not demand_paging:
            self.eager.add(RAM, 0, self.shape[RAM])
        self.total_pages = sum(self.shape)
        self.pushed_pages = 0
        self.rounds: list[Round] = []
        self.timeline: list[Event] = []
        self.parts = Parts()
        self.arrived = [array("Q", bytes(8 * pages)) for pages in self.shape]
        self.paging: DemandPaging | None = None
        self._loop = asyncio.get_running_loop()
        self._guest_at = self._loop.time()
        self._scanned = False
        self._pushed = False
        self._stopped = False
        self._page_s = 0.0

    # --- the session -------------------------------------------------------------------------

    async def scan(self) -> PageSet:
        self._need(self.paging is None, "scan after the switch-over")
        self._catch_up()
        dirty = PageSet(self.shape)
        for block, ranges in enumerate(self.guest.take_written()):
            for start, stop in ranges:
                dirty.add(block, start, stop)
        if not self._scanned:
            dirty = dirty | self._populated()
            self._scanned = True
        self.owed = self.owed | dirty
        if self._pushed:
            # The first scan after a push says what was dirtied meanwhile; later ones are short.
            last = self.rounds[-1]
            self.rounds[-1] = Round(last.pages, last.wire_bytes, last.seconds, len(dirty))
            self._pushed = False
        await asyncio.sleep(self.costs.scan_s)
        if self._stopped:
            self.parts.scan_s += self.costs.scan_s
        return dirty

    async def push(self, pages: PageSet) -> Push:
        self._need(self.paging is None, "push after the switch-over")
        began, before = self._loop.time(), self.link.sent_bytes
        arrives_at = began
        for block in range(len(self.shape)):
            for start, stop in batches(pages.ranges(block)):
                # Read when the wire is free, not before: a page written while it waited is
                # sent as it is now.
                await self.link.turn(BULK)
                self._catch_up()
                versions = self.guest.versions[block][start:stop]
                arrives_at = await self.link.transmit((stop - start) * PAGE_WIRE_BYTES)
                self.arrived[block][start:stop] = versions
        if arrives_at > began:
            # The last batch travels, and so does the word that it is installed.
            await self._until(arrives_at + self.link.model.latency_s)
        count, seconds = len(pages), self._loop.time() - began
        wire_bytes = self.link.sent_bytes - before
        self.owed = self.owed - pages
        self.pushed_pages += count
        self.rounds.append(Round(count, wire_bytes, seconds, 0))
        self._pushed = True
        if count >= RATE_SAMPLE_PAGES or not self._page_s:
            self._page_s = seconds / max(1, count)
        if self._stopped:
            self.parts.push_s += seconds
        self.note("pushed", f"{count} pages, {wire_bytes} bytes")
        return Push(count, wire_bytes, seconds)

    def push_time(self, pages: PageSet) -> float:
        return len(pages) * self._page_s

    async def stop(self) -> None:
        self._need(not self._stopped, "stop of a guest that is stopped")
        self._catch_up()
        self._stopped = True
        self.parts.stopped_at = self._loop.time()
        self.parts.stop_s = self.costs.stop_s
        self.note("stopped")
        await asyncio.sleep(self.costs.stop_s)

    async def switch_over(self) -> None:
        self._need(self._stopped, "switch-over of a guest that runs")
        self._need(self.paging is None, "a second switch-over")
        self._need(
            not self.owed & self.eager, "switch-over while pages that must be there are owed"
        )
        self._check_versions()
        costs, parts = self.costs, self.parts
        await asyncio.sleep(costs.save_s)
        parts.save_s = costs.save_s
        self.note("state-saved")
        began = self._loop.time()
        await self._until(await self.link.send(costs.device_state_bytes))
        await asyncio.sleep(costs.load_s)
        parts.load_s = self._loop.time() - began
        self.note("loaded", side="destination")
        began = self._loop.time()
        await asyncio.sleep(costs.commit_s + self.link.model.latency_s)
        parts.commit_s = self._loop.time() - began
        self.note("committed")
        await asyncio.sleep(costs.start_s)
        parts.start_s = costs.start_s
        parts.resumed_at = self._loop.time()
        self.note("resumed", side="destination")
        self.paging = DemandPaging(self.guest, self.link, self.owed, PAGE_WIRE_BYTES)
        self.paging.start()

    async def pull(self) -> None:
        self._need(self.paging is not None, "pull before the switch-over")
        assert self.paging is not None
        installed = await self.paging.pull()
        self._need(len(installed) == len(self.owed), "a page was sent twice, or not at all")
        for page, version in installed:
            self.arrived[RAM][page] = version
        self.pushed_pages += len(self.owed)
        self.owed = PageSet(self.shape)
        self.note("pulled")

    # --- the check of truth ------------------------------------------------------------------

    def check_end(self) -> None:
        """After the strategy has returned: the guest moved, whole, and depends on nothing here."""
        self._need(self.paging is not None, "the strategy ended without a switch-over")
        self._need(not self.owed, f"{len(self.owed)} pages are owed at the end")
        self._check_versions()

    def _check_versions(self) -> None:
        """Each page at the destination is the source's, or owed. (After the switch-over the
        source's versions stand still: the guest at the destination counts its writes apart.)"""
        source = self.guest.versions if self.paging is None else self.paging.frozen
        for block, (theirs, ours) in enumerate(zip(self.arrived, source, strict=True)):
            if theirs == ours:
                continue
            for page, (there, here) in enumerate(zip(theirs, ours, strict=True)):
                if there != here and not self.owed.contains(block, page):
                    raise BrokenStrategy(
                        f"page {page} of block {block} is at version {there} at the destination "
                        f"and {here} at the source, and nobody owes it"
                    )

    # --- inside ------------------------------------------------------------------------------

    def note(self, name: str, detail: str = "", *, side: str = "source") -> None:
        """A line of the timeline."""
        self.timeline.append(Event(self._loop.time(), name, side, detail))

    def _need(self, holds: bool, what: str) -> None:
        if not holds:
            raise BrokenStrategy(what)

    def _catch_up(self) -> None:
        """The guest's own time is made up when somebody looks."""
        now = self._loop.time()
        if not self._stopped:
            self.guest.run(now - self._guest_at)
        self._guest_at = now

    async def _until(self, when: float) -> None:
        await asyncio.sleep(max(0.0, when - self._loop.time()))

    def _populated(self) -> PageSet:
        pages = PageSet(self.shape)
        pages.add(RAM, 0, self.guest.model.populated_pages)
        pages.add(FIRMWARE, 0, self.shape[FIRMWARE])
        return pages


def batches(ranges: list[tuple[int, int]], size: int = BATCH_PAGES) -> list[tuple[int, int]]:
    """Runs cut into pieces of at most `size` pages."""
    return [
        (start, min(start + size, stop))
        for begin, stop in ranges
        for start in range(begin, stop, size)
    ]
