"""Demand paging at the destination: the guest runs, stalls on what is missing, and is served."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from vmferry._core import PageSet
from vmferry.report.records import Faults
from vmferry.simulator.guest import RAM, SimulatedGuest
from vmferry.simulator.link import BULK, URGENT, SimulatedLink

BATCH_PAGES = 16
"""Pages of one bulk message of the active push: what an urgent page may have to wait for."""
QUANTUM_S = 0.001
"""The guest's accesses are drawn for this long at once."""
REQUEST_BYTES = 32


@dataclass
class Counts:
    """What demand paging cost."""

    network_faults: int = 0
    served_under_way: int = 0
    latencies_s: list[float] = field(default_factory=list)

    def faults(self) -> Faults:
        """As the report wants them."""
        ordered = sorted(self.latencies_s)

        def percentile_us(share: float) -> float:
            return ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1e6

        if not ordered:
            return Faults(self.network_faults, self.served_under_way)
        return Faults(
            network_faults=self.network_faults,
            prefetch_hits=self.served_under_way,
            fault_latency_us_p50=percentile_us(0.5),
            fault_latency_us_p99=percentile_us(0.99),
            fault_latency_us_max=ordered[-1] * 1e6,
            guest_stall_ms=sum(ordered) * 1e3,
        )


class DemandPaging:
    """From the resume at the destination until nothing is missing there."""

    def __init__(
        self, guest: SimulatedGuest, link: SimulatedLink, owed: PageSet, page_wire_bytes: int
    ) -> None:
        self.counts = Counts()
        self.frozen = [versions[:] for versions in guest.versions]
        """The source's versions at the switch-over."""
        self._guest, self._link, self._page_wire_bytes = guest, link, page_wire_bytes
        self._loop = asyncio.get_running_loop()
        self._missing = {page for start, stop in owed.ranges(RAM) for page in range(start, stop)}
        self._to_send = set(self._missing)
        self._waited_for: dict[int, asyncio.Event] = {}
        self._installed: list[tuple[int, int]] = []
        self._all_here = asyncio.Event()
        self._runs: asyncio.Task[None] | None = None

    def start(self) -> None:
        """The guest runs at the destination until nothing is missing: later accesses cost
        nothing and change nothing that a move is about."""
        if self._missing:
            self._runs = asyncio.create_task(self._run_guest())
        else:
            self._all_here.set()

    async def pull(self) -> list[tuple[int, int]]:
        """The active push of what is still missing; returns (page, version) in the order in which
        they arrived, whoever asked for them."""
        for page in sorted(self._to_send):
            if page not in self._to_send:
                continue
            await self._link.turn(BULK)
            batch = [p for p in range(page, page + BATCH_PAGES) if p in self._to_send]
            await self._send(batch)
        await self._all_here.wait()
        if self._runs is not None:
            self._runs.cancel()
        return self._installed

    async def _send(self, batch: list[int]) -> None:
        """Puts pages on the wire, which is this caller's; they arrive by themselves."""
        self._to_send.difference_update(batch)
        versions = [self.frozen[RAM][page] for page in batch]
        arrives_at = await self._link.transmit(len(batch) * self._page_wire_bytes)
        self._loop.call_at(arrives_at, self._install, batch, versions)

    def _install(self, batch: list[int], versions: list[int]) -> None:
        self._installed.extend(zip(batch, versions, strict=True))
        self._missing.difference_update(batch)
        for page in batch:
            if (waits := self._waited_for.pop(page, None)) is not None:
                waits.set()
        if not self._missing:
            self._all_here.set()

    async def _run_guest(self) -> None:
        while self._missing:
            # One vCPU: while it waits for a page its own time stands still.
            for page in self._guest.next_accesses(QUANTUM_S):
                if page in self._missing:
                    await self._fault(page)
            await asyncio.sleep(QUANTUM_S)

    async def _fault(self, page: int) -> None:
        """Waits for a missing page."""
        began = self._loop.time()
        arrived = self._waited_for.setdefault(page, asyncio.Event())
        if page in self._to_send:
            self.counts.network_faults += 1
            await asyncio.sleep(
                self._link.model.latency_s + REQUEST_BYTES / self._link.model.bytes_per_s
            )
        else:
            self.counts.served_under_way += 1
        if page in self._to_send:
            await self._link.turn(URGENT)
            await self._send([page] if page in self._to_send else [])
        if page in self._missing:
            await arrived.wait()
        self.counts.latencies_s.append(self._loop.time() - began)
