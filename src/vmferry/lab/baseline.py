"""QEMU's own live migration of a running guest: what vmferry is measured against.

Both modes without compression and with no bound on bandwidth; QEMU's defaults otherwise (300 ms of
downtime allowed). Post-copy has preemption (a channel of its own for urgent pages) and switches
over as soon as the migration is active.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass
from typing import Literal, Self

from qemu.qmp import EventListener, ExecuteError, Message, QMPClient, QMPError

from vmferry.errors import GuestError

QemuMode = Literal["pre-copy", "post-copy"]
PORT = 7460
UNLIMITED_BYTES_PER_S = 10**11
_CALL_LIMIT_S = 30.0
MIGRATION_LIMIT_S = 180.0


@dataclass(frozen=True)
class QemuMigration:
    """What QEMU's own migration cost."""

    mode: QemuMode
    total_s: float
    """From the command until both sides call it completed."""
    downtime_ms: float
    """STOP at the source to RESUME at the destination, by QEMU's own time stamps."""
    bytes_transferred: int
    """QEMU's count of what it has sent."""
    pages_transferred: int
    """Pages of content, duplicates included, zero pages not."""
    rounds: int


class Side:
    """One QEMU of a migration, with its events."""

    def __init__(self, client: QMPClient, events: EventListener) -> None:
        self._client = client
        self._events = events
        self.instants: dict[str, float] = {}
        """The last time of each event, in seconds since the epoch."""

    @classmethod
    async def connect(cls, path: str) -> Self:
        """GuestError when the monitor does not answer."""
        client, events = QMPClient("baseline"), EventListener()
        client.register_listener(events)
        try:
            async with asyncio.timeout(_CALL_LIMIT_S):
                await client.connect(path)
        except (QMPError, OSError, TimeoutError) as error:
            raise GuestError(f"The monitor {path} does not answer: {error}.") from error
        return cls(client, events)

    async def execute(self, command: str, **arguments: object) -> dict[str, object]:
        """GuestError when it fails or takes too long."""
        try:
            async with asyncio.timeout(_CALL_LIMIT_S):
                answer = await self._client.execute(
                    command, {key.replace("_", "-"): value for key, value in arguments.items()}
                )
        except (ExecuteError, QMPError, OSError, TimeoutError) as error:
            raise GuestError(f"QEMU's {command} failed: {error}.") from error
        return answer if isinstance(answer, dict) else {}

    async def wait_migration(self, *wanted: str) -> None:
        """Until its migration is in one of these states. GuestError when it fails instead."""
        while True:
            event = await self._events.get()
            name = str(event["event"])
            self.instants[name] = _instant_s(event)
            if name != "MIGRATION":
                continue
            status = _status(event)
            if status in wanted:
                return
            if status in ("failed", "cancelled", "postcopy-paused"):
                raise GuestError(f"QEMU's own migration is {status}.")

    async def wait_event(self, name: str) -> None:
        """Until the event has come, if it has not yet."""
        while name not in self.instants:
            event = await self._events.get()
            self.instants[str(event["event"])] = _instant_s(event)

    async def disconnect(self) -> None:
        """Never raises."""
        with contextlib.suppress(Exception):
            async with asyncio.timeout(_CALL_LIMIT_S):
                await self._client.disconnect()


async def migrate(source: Side, destination: Side, mode: QemuMode, address: str) -> QemuMigration:
    """Moves the guest to `destination`, which waits with `-incoming defer`.

    GuestError when it fails; the source then runs on if QEMU could keep it running.
    """
    post_copy = mode == "post-copy"
    names = {"events": True, "postcopy-ram": post_copy, "postcopy-preempt": post_copy}
    capabilities = [{"capability": name, "state": state} for name, state in names.items()]
    uri = f"tcp:{address}:{PORT}"
    try:
        async with asyncio.timeout(MIGRATION_LIMIT_S):
            for side in (source, destination):
                await side.execute("migrate-set-capabilities", capabilities=capabilities)
            await source.execute("migrate-set-parameters", max_bandwidth=UNLIMITED_BYTES_PER_S)
            await destination.execute("migrate-incoming", uri=uri)
            begin = time.time()
            await source.execute("migrate", uri=uri)
            if post_copy:
                await source.wait_migration("active")
                await source.execute("migrate-start-postcopy")
            await source.wait_migration("completed")
            await destination.wait_migration("completed")
            ends = [side.instants["MIGRATION"] for side in (source, destination)]
            await destination.wait_event("RESUME")
            info = await source.execute("query-migrate")
    except TimeoutError:
        raise GuestError(
            f"QEMU's own {mode} was not done within {MIGRATION_LIMIT_S:g} s."
        ) from None
    ram = info.get("ram")
    counts = ram if isinstance(ram, dict) else {}
    return QemuMigration(
        mode=mode,
        total_s=max(ends) - begin,
        downtime_ms=(destination.instants["RESUME"] - source.instants["STOP"]) * 1e3,
        bytes_transferred=int(counts.get("transferred", 0)),
        pages_transferred=int(counts.get("normal", 0)),
        rounds=int(counts.get("dirty-sync-count", 0)),
    )


def _status(event: Message) -> str:
    data = event.get("data")
    return str(data.get("status")) if isinstance(data, dict) else ""


def _instant_s(event: Message) -> float:
    stamp = event["timestamp"]
    assert isinstance(stamp, dict)
    return stamp["seconds"] + stamp["microseconds"] / 1e6
