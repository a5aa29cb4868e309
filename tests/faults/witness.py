"""Watches that at most one QEMU of a guest runs, through monitors that vmferry leaves free."""

from __future__ import annotations

import asyncio
import contextlib

from tests.faults.traces import processes_called

from vmferry.errors import FerryError
from vmferry.guest.monitor import Monitor
from vmferry.guest.options import qmp_sockets
from vmferry.guest.process import read_process
from vmferry.lab.network import HOSTS, Topology

EVERY_S = 0.03
ANSWER_LIMIT_S = 0.5
"""With pages missing a monitor may hang; that is no evidence of anything."""


class Witness:
    """`async with Witness(...) as witness:`; afterwards `witness.sightings` is empty, or says when
    two ran at a time."""

    def __init__(self, topology: Topology, name: str) -> None:
        self._topology = topology
        self._name = name
        self._monitors: dict[int, Monitor] = {}
        self._task: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()
        self.looks = 0
        self.sightings: list[list[int]] = []

    async def __aenter__(self) -> Witness:
        self._task = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        for monitor in self._monitors.values():
            await monitor.disconnect()

    async def look(self) -> list[int]:
        """The processes that ran at two looks each, all of the first before all of the second: so
        those that are returned ran at one and the same time."""
        async with self._turn:
            await self._find()
            once = await self._running()
            return sorted(once & await self._running()) if len(once) > 1 else sorted(once)

    async def _watch(self) -> None:
        while True:
            running = await self.look()
            self.looks += 1
            if len(running) > 1:
                self.sightings.append(running)
            await asyncio.sleep(EVERY_S)

    async def _find(self) -> None:
        for host in HOSTS:
            for pid in await asyncio.to_thread(processes_called, self._topology, host, self._name):
                if pid not in self._monitors:
                    with contextlib.suppress(FerryError, OSError):
                        process = read_process(pid)
                        first, *others = qmp_sockets(process.argv)
                        assert others, "one monitor is vmferry's; the guest needs a second one"
                        self._monitors[pid] = await Monitor.connect(first, ANSWER_LIMIT_S)

    async def _running(self) -> set[int]:
        found = set()
        for pid, monitor in list(self._monitors.items()):
            try:
                status = await monitor.execute("query-status", timeout_s=ANSWER_LIMIT_S)
            except FerryError:
                await self._monitors.pop(pid).disconnect()
                continue
            if isinstance(status, dict) and status.get("running"):
                found.add(pid)
        return found

    async def ask(self, pid: int, command: str) -> object:
        """A command for one of the QEMUs."""
        return await self._monitors[pid].execute(command)
