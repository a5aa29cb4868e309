"""The strategies' session on a real guest: what each of its steps does at the source.

The strategy decides what to push and when to stop (`vmferry.strategies`); this file knows how a
page set is scanned, pushed and handed over, and keeps the books of what is owed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from vmferry._core import PageSet, Sender
from vmferry.engine.attachment import Attachment, eager_pages
from vmferry.engine.progress import Pulse
from vmferry.engine.steps import Step, Timeline
from vmferry.guest.qemu import Qemu
from vmferry.report.records import Round
from vmferry.strategies import Bounds, Push

RATE_SAMPLE_PAGES = 256
"""A push smaller than this says nothing about the link."""


@dataclass
class Clock:
    """Instants of a move in seconds on this host's monotonic clock, and its costs."""

    stopped: float = 0.0
    stop_s: float = 0.0
    scan_s: float = 0.0
    push_s: float = 0.0
    save_s: float = 0.0
    load_s: float = 0.0
    commit_s: float = 0.0
    verify_s: float = 0.0
    start_s: float = 0.0
    resumed: float = 0.0
    pulled: float = 0.0


@dataclass
class EngineSession:
    """One move of a real guest (`vmferry.strategies.session.Session`)."""

    guest: Qemu
    attachment: Attachment
    sender: Sender
    bounds: Bounds
    timeline: Timeline
    pulse: Pulse
    before_stop: Callable[[], Awaitable[None]]
    """Readies whatever must be in place before the guest may stop."""
    hand_over: Callable[[], Awaitable[None]]
    """Device state, load, commit: the source's side of the switch-over."""
    announce_stop: Callable[[], Awaitable[None]]
    """Tells the destination that the guest has stopped."""
    clock: Clock = field(default_factory=Clock)
    rounds: list[Round] = field(default_factory=list)
    saving: asyncio.Task[bytes] | None = None
    stopping: bool = False
    """Whether the guest may have been stopped: a cancelled call may have got through."""
    stopped: bool = False

    def __post_init__(self) -> None:
        memory = self.attachment.memory
        self.owed = PageSet(memory.shape)
        self.sent = PageSet(memory.shape)
        self.eager = eager_pages(memory)
        self.total_pages = sum(memory.shape)
        self.pushed_pages = 0
        self._page_s = 0.0
        self._unscanned = False
        """Whether the last round's dirty pages are not known yet."""

    async def scan(self) -> PageSet:
        began = time.monotonic()
        dirty = await asyncio.to_thread(self.attachment.tracker.scan)
        if self.stopped:
            # QEMU has drained its disks by stopping.
            await self._drop_holes(dirty)
        else:
            # A disk read under O_DIRECT marks its pages when they are pinned, not when the data
            # lands: only what is read after a drain that follows the scan is complete.
            await self.guest.drain()
        self.owed = self.owed | dirty
        if self._unscanned:
            self._unscanned = False
            last = self.rounds[-1]
            self.rounds[-1] = Round(last.pages, last.wire_bytes, last.seconds, len(dirty))
        if self.stopped:
            self.clock.scan_s += time.monotonic() - began
        return dirty

    async def _drop_holes(self, dirty: PageSet) -> None:
        # Pages that the guest gave back are holes that no scan reports: what was sent of them must
        # read as zeros over there, and what is owed of them is owed no more.
        populated = await asyncio.to_thread(self.attachment.memory.populated)
        holes = self.sent - populated
        self.owed = self.owed & populated
        if holes:
            await asyncio.to_thread(self.sender.discard, holes)
            self.sent = self.sent - holes

    async def push(self, pages: PageSet) -> Push:
        began = time.monotonic()
        before = self.sender.progress().wire_bytes
        name = "last pages" if self.stopped else f"round {len(self.rounds) + 1}"
        async with self.pulse.during(name):
            await asyncio.to_thread(self.sender.push, pages)
        seconds = time.monotonic() - began
        wire_bytes = self.sender.progress().wire_bytes - before
        self.owed = self.owed - pages
        self.sent = self.sent | pages
        self.pushed_pages += len(pages)
        self.rounds.append(Round(len(pages), wire_bytes, seconds, 0))
        self._unscanned = True
        if len(pages) >= RATE_SAMPLE_PAGES or not self._page_s:
            self._page_s = seconds / max(1, len(pages))
        if self.stopped:
            self.clock.push_s += seconds
        await self.timeline.reach(Step.PUSHED, f"{len(pages)} pages, {wire_bytes} bytes")
        return Push(len(pages), wire_bytes, seconds)

    def push_time(self, pages: PageSet) -> float:
        return len(pages) * self._page_s

    async def stop(self) -> None:
        await self.before_stop()
        began = time.monotonic()
        self.stopping = True
        stopped_ns = await self.guest.stop()
        self.stopped = True
        self.clock.stopped = time.monotonic() - (time.time_ns() - stopped_ns) / 1e9
        self.clock.stop_s = time.monotonic() - began
        # Saving the state writes no guest memory, so it may run beside the last scan and push.
        self.saving = asyncio.create_task(self._save())
        await self.announce_stop()
        await self.timeline.reach(Step.STOPPED)

    async def _save(self) -> bytes:
        began = time.monotonic()
        state = await self.guest.save_device_state()
        self.clock.save_s = time.monotonic() - began
        return state

    async def switch_over(self) -> None:
        if self.owed & self.eager:
            raise AssertionError("a strategy switched over while pages of eager blocks are owed")
        await self.hand_over()

    async def pull(self) -> None:
        async with self.pulse.during("pulling"):
            await asyncio.to_thread(self.sender.pull)
        self.sent = self.sent | self.owed
        self.pushed_pages += len(self.owed)
        self.owed = PageSet(self.attachment.memory.shape)
        self.clock.pulled = time.monotonic()
        await self.timeline.reach(Step.PULLED)
