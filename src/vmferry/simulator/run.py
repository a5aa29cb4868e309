"""One simulated move, from a strategy's name to a report."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from vmferry.report.records import Downtime, Faults, Report
from vmferry.simulator.clock import VirtualLoop
from vmferry.simulator.guest import GuestModel, Pattern, SimulatedGuest
from vmferry.simulator.link import LinkModel, SimulatedLink
from vmferry.simulator.session import Costs, SimulatedSession
from vmferry.strategies import METHODS, Bounds, Method


def simulate(
    method: str | Method,
    guest: GuestModel,
    link: LinkModel,
    bounds: Bounds | None = None,
    *,
    seed: int = 0,
    costs: Costs | None = None,
) -> Report:
    """Moves a simulated guest; the same arguments give the same report, to the last digit.

    `method` is a name of `vmferry.strategies.METHODS` (KeyError), or a method of one's own. Raises
    BrokenStrategy where the strategy would have lost a page, VirtualDeadlock where it waits for
    ever. Starts an event loop of its own: inside a running one call it through a thread.
    """
    chosen = METHODS[method] if isinstance(method, str) else method
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        move = _Move(chosen, guest, link, bounds or Bounds(), seed, costs or Costs())
        return runner.run(move.report())


def demonstration() -> list[Report]:
    """Every strategy on the same guest: 512 MiB, a third of it in use, 128 MiB of that rewritten
    at 40 MB/s, over 1 Gbit/s."""
    guest = GuestModel(
        pages=131_072,
        populated_pages=45_000,
        pattern=Pattern.uniform(32_768, writes_per_s=40e6 / 4096),
    )
    return [simulate(name, guest, LinkModel(bytes_per_s=119e6, latency_s=1e-4)) for name in METHODS]


@dataclass(frozen=True)
class _Move:
    method: Method
    guest: GuestModel
    link: LinkModel
    bounds: Bounds
    seed: int
    costs: Costs

    async def report(self) -> Report:
        guest, link = SimulatedGuest(self.guest, self.seed), SimulatedLink(self.link)
        session = SimulatedSession(
            guest, link, self.bounds, self.costs, demand_paging=self.method.demand_paging
        )
        await self.method.run(session)
        session.check_end()
        parts = session.parts
        downtime_ms = (parts.resumed_at - parts.stopped_at) * 1e3
        end = asyncio.get_running_loop().time()
        paged = session.paging.counts.faults() if session.paging is not None else Faults()
        return Report(
            guest=f"simulated-{self.seed}",
            source="simulated source",
            destination="simulated destination",
            strategy=self.method.name,
            outcome="moved",
            downtime_ms=downtime_ms,
            downtime=Downtime(
                total_ms=downtime_ms,
                stop_ms=parts.stop_s * 1e3,
                scan_ms=parts.scan_s * 1e3,
                push_ms=parts.push_s * 1e3,
                device_state_ms=parts.save_s * 1e3,
                load_ms=parts.load_s * 1e3,
                commit_ms=parts.commit_s * 1e3,
                start_ms=parts.start_s * 1e3,
            ),
            readiness_s=parts.stopped_at,
            recover_s=end - parts.resumed_at,
            total_s=end,
            pages_transferred=session.pushed_pages,
            pages_total=session.total_pages,
            bytes_on_wire=link.sent_bytes,
            bytes_by_encoding={"raw": link.sent_bytes - self.costs.device_state_bytes},
            rounds=session.rounds,
            faults=paged,
            device_state_bytes=self.costs.device_state_bytes,
            timeline=session.timeline,
        )
