"""The link: bandwidth, latency, one message at a time, urgent ones first."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest

from vmferry.simulator.clock import VirtualLoop
from vmferry.simulator.link import BULK, URGENT, LinkModel, SimulatedLink

T = TypeVar("T")


def run(work: Callable[[SimulatedLink], Awaitable[T]], model: LinkModel) -> T:
    async def inside() -> T:
        return await work(SimulatedLink(model))

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(inside())


def test_time_is_size_over_bandwidth_plus_latency() -> None:
    async def work(link: SimulatedLink) -> float:
        return await link.send(1_000_000)

    assert run(work, LinkModel(1e6, 0.25)) == pytest.approx(1.25)


def test_two_messages_share_the_wire() -> None:
    async def work(link: SimulatedLink) -> list[float]:
        return list(await asyncio.gather(link.send(100), link.send(100)))

    assert run(work, LinkModel(100.0, 0.0)) == pytest.approx([1.0, 2.0])


def test_an_urgent_message_waits_for_one_bulk_message_only() -> None:
    arrivals: list[tuple[str, float]] = []

    async def work(link: SimulatedLink) -> None:
        async def send(name: str, priority: int) -> None:
            arrivals.append((name, await link.send(100, priority)))

        first = [asyncio.create_task(send(f"bulk {i}", BULK)) for i in range(3)]
        await asyncio.sleep(0.5)
        await asyncio.gather(send("urgent", URGENT), *first)

    run(work, LinkModel(100.0, 0.0))
    assert [name for name, _ in arrivals] == ["bulk 0", "urgent", "bulk 1", "bulk 2"]
    assert [at for _, at in arrivals] == pytest.approx([1, 2, 3, 4])
