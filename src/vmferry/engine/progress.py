"""Tells an observer how a running move goes, ten times a second."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from vmferry._core import Sender
from vmferry.engine.ports import Observer
from vmferry.report.records import Progress

INTERVAL_S = 0.1


class Pulse:
    """Samples the sender while a phase runs; the rate is that of the phase so far."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._start = time.monotonic()
        self.sender: Sender | None = None

    def say(self, phase: str) -> None:
        """One sample now, for a phase that sends no pages."""
        self._sample(phase, self._start, 0)

    @asynccontextmanager
    async def during(self, phase: str) -> AsyncGenerator[None]:
        """Samples for as long as the block runs, and once at its end."""
        began = time.monotonic()
        before = self.sender.progress().wire_bytes if self.sender else 0
        beating = asyncio.create_task(self._beat(phase, began, before))
        try:
            yield
        finally:
            beating.cancel()
            self._sample(phase, began, before)

    async def _beat(self, phase: str, began: float, before: int) -> None:
        while True:
            await asyncio.sleep(INTERVAL_S)
            self._sample(phase, began, before)

    def _sample(self, phase: str, began: float, before: int) -> None:
        now = time.monotonic()
        if self.sender is None:
            self._observer.progress(Progress(phase, now - self._start, 0, 0, 0, 0.0, None))
            return
        at = self.sender.progress()
        rate = (at.wire_bytes - before) / max(now - began, 1e-6)
        bytes_a_page = at.wire_bytes / max(1, at.pages)
        expected = at.remaining * bytes_a_page / rate if rate > 0 else None
        self._observer.progress(
            Progress(
                phase, now - self._start, at.pages, at.remaining, at.wire_bytes, rate, expected
            )
        )
