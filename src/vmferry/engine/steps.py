"""The steps of a move: the lines of its timeline, and the points at which a test may hold it.

A fault test must act at an exact step: kill a daemon when the guest has just been stopped, cut the
link when the state has been sent. `VMFERRY_HOLD=side:step[,side:step...]` makes a daemon wait at
these steps: it creates `held-SIDE-STEP` in its state directory and goes on when that file is gone.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path

from vmferry.report.records import Event


class Step(StrEnum):
    """Every named step, in the order in which a move takes them."""

    ATTACHED = "attached"
    OFFERED = "offered"
    STREAMS_OPEN = "streams-open"
    QEMU_STARTED = "qemu-started"
    READY = "ready"
    PUSHED = "pushed"
    KEEPER_MADE = "keeper-made"
    STOPPED = "stopped"
    STATE_SAVED = "state-saved"
    VERIFIED = "verified"
    PAGING_ARMED = "paging-armed"
    STATE_SENT = "state-sent"
    LOADED = "loaded"
    FENCED = "fenced"
    COMMITTED = "committed"
    RESUMED = "resumed"
    PULLED = "pulled"
    FINISHED = "finished"
    UNDONE = "undone"


class Timeline:
    """The events of one side of one move."""

    def __init__(self, side: str, state_dir: Path, tell: Callable[[Event], None]) -> None:
        self.events: list[Event] = []
        self._side = side
        self._state_dir = state_dir
        self._tell = tell
        self._start = time.monotonic()
        wanted = os.environ.get("VMFERRY_HOLD", "").split(",")
        self._holds = {
            step for entry in wanted for s, _, step in [entry.partition(":")] if s == side
        }

    def elapsed_s(self) -> float:
        """Seconds since the move began."""
        return time.monotonic() - self._start

    def note(self, step: Step, detail: str = "") -> None:
        """Writes a line."""
        event = Event(round(self.elapsed_s(), 6), step.value, self._side, detail)
        self.events.append(event)
        self._tell(event)

    def adopt(self, event: Event) -> None:
        """A line of the other side's."""
        self.events.append(event)

    async def reach(self, step: Step, detail: str = "") -> None:
        """Writes a line, and waits there if a test holds this step."""
        self.note(step, detail)
        if step in self._holds:
            held = self._state_dir / f"held-{self._side}-{step}"
            held.touch()
            while held.exists():  # noqa: ASYNC110 - a file that another process removes
                await asyncio.sleep(0.005)
