"""The moves under way at this host: outgoing ones as tasks of their own, and guests that arrive.

A move belongs to the daemon, not to the command that asked for it: a closed terminal ends nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmferry.errors import Cancelled, FerryError, InDoubt, MoveFailed, Refused
from vmferry.host.api import Answer, Happened, Moment
from vmferry.report.records import Event, Progress, Report

if TYPE_CHECKING:
    from vmferry.engine.ports import MoveOrder, PeerLink

log = logging.getLogger(__name__)

Watcher = Callable[[Answer], None]


class RunningMove:
    """One outgoing move; `vmferry.engine.ports.Observer` of itself."""

    def __init__(self, order: MoveOrder, watcher: Watcher) -> None:
        self.order = order
        self.phase = "starting"
        self._watcher = watcher
        self._events: list[Event] = []
        self.task: asyncio.Task[Report] | None = None

    def progress(self, progress: Progress) -> None:
        self.phase = progress.phase
        self._watcher(Moment(progress=progress))

    def event(self, event: Event) -> None:
        self._events.append(event)
        log.info("%s: %s %s %s", self.order.guest.name, event.side, event.name, event.detail)
        self._watcher(Happened(event=event))

    def cancel(self) -> None:
        """Asks it to undo itself; without effect after the commit."""
        self.phase = "cancelling"
        if self.task is not None:
            self.task.cancel()

    async def wait(self) -> Report:
        """The report, of whatever outcome. Refused when nothing was touched. Cancelling this
        waits no longer, and does not cancel the move."""
        assert self.task is not None
        await asyncio.wait({self.task})
        order = self.order
        try:
            return self.task.result()
        except Refused:
            raise
        except (asyncio.CancelledError, Cancelled) as error:
            outcome, reason = "cancelled", str(error) or "it was cancelled before it began"
        except (MoveFailed, InDoubt) as error:
            outcome, reason = "failed", str(error)
        except FerryError as error:
            outcome, reason = "failed", str(error)
        except Exception:
            log.exception("The move of %s ended by a fault of vmferry's own.", order.guest.name)
            outcome = "failed"
            reason = (
                f"the move of {order.guest.name} to {order.destination_host} ended by a fault of "
                f"vmferry's own; the log of {order.source_host}'s daemon has the details, and "
                "`vmferry ls` shows where the guest runs"
            )
        return Report(
            guest=order.guest.name,
            source=order.source_host,
            destination=order.destination_host,
            strategy=order.method.name,
            outcome=outcome,
            error=reason,
            total_s=self._events[-1].at_s if self._events else 0.0,
            timeline=self._events,
        )


@dataclass(frozen=True)
class Arrival:
    """A guest on its way here."""

    guest: str
    source: str


class Moves:
    """Who moves now. Used from the event loop alone."""

    def __init__(self) -> None:
        self._outgoing: dict[int, RunningMove] = {}
        self._arriving: list[Arrival] = []
        self._closed = False

    @property
    def outgoing(self) -> list[RunningMove]:
        return list(self._outgoing.values())

    @property
    def arriving(self) -> list[Arrival]:
        return list(self._arriving)

    def start(self, order: MoveOrder, link: PeerLink, watcher: Watcher) -> RunningMove:
        """Starts a move as a task. Refused when this guest moves already or still arrives."""
        from vmferry.engine.source import move

        guest = order.guest
        if self._closed:
            raise Refused(f"the daemon of {order.source_host} is ending; start it again first")
        self.refuse_if_moving(str(guest.pid))
        for arrival in self._arriving:
            if arrival.guest == guest.name:
                raise Refused(
                    f"guest {guest.name} is still arriving from {arrival.source}; "
                    "wait until it depends on nothing there"
                )
        starting = RunningMove(order, watcher)
        starting.task = asyncio.create_task(move(order, link, starting))
        self._outgoing[guest.pid] = starting
        starting.task.add_done_callback(lambda _: self._outgoing.pop(guest.pid))
        return starting

    def refuse_if_moving(self, guest: str) -> None:
        """Refused when the guest of this name, PID or monitor path moves. Asked before the guest
        is looked for: while it moves, the one that waits for it may bear the same name here."""
        running = self._named(guest)
        if running is not None:
            name = running.order.guest.name
            raise Refused(
                f"guest {name} is already moving to {running.order.destination_host} "
                f"({running.phase}); wait for it, or run `vmferry cancel {name}`"
            )

    def _named(self, guest: str) -> RunningMove | None:
        for running in self._outgoing.values():
            process = running.order.guest
            if guest in (process.name, str(process.pid), process.qmp):
                return running
        return None

    def find(self, guest: str) -> RunningMove:
        """By the guest's name, PID or monitor path. Refused when it does not move."""
        running = self._named(guest)
        if running is not None:
            return running
        moving = ", ".join(running.order.guest.name for running in self._outgoing.values())
        raise Refused(f"no move of guest {guest} runs here (moving: {moving or 'none'})")

    @contextmanager
    def arrival(self, guest: str, source: str) -> Generator[None]:
        """For as long as a guest arrives."""
        arrival = Arrival(guest, source)
        self._arriving.append(arrival)
        log.info("Guest %s is arriving from %s.", guest, source)
        try:
            yield
        finally:
            self._arriving.remove(arrival)
            log.info("The arrival of guest %s from %s is over.", guest, source)

    async def end(self) -> None:
        """Asks all outgoing moves to undo themselves, and waits until they have."""
        self._closed = True
        running = self.outgoing
        for one in running:
            log.info("Ending the move of %s; it is undone first.", one.order.guest.name)
            one.cancel()
        tasks = {one.task for one in running if one.task is not None}
        if tasks:
            await asyncio.wait(tasks)
