"""Virtual time: it passes at once, in order, and stands out where nothing can end a wait."""

from __future__ import annotations

import asyncio
import time

import pytest

from vmferry.simulator import VirtualDeadlock, VirtualLoop


def test_an_hour_of_sleep_takes_no_time() -> None:
    async def sleep() -> float:
        await asyncio.sleep(3600)
        return asyncio.get_running_loop().time()

    began = time.monotonic()
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        assert runner.run(sleep()) == 3600
    assert time.monotonic() - began < 1800


def test_timers_fire_in_the_order_of_their_times() -> None:
    fired: list[tuple[float, str]] = []

    async def wait(name: str, seconds: float) -> None:
        await asyncio.sleep(seconds)
        fired.append((asyncio.get_running_loop().time(), name))

    async def all_of_them() -> None:
        await asyncio.gather(wait("c", 3), wait("a", 1), wait("b", 2))

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(all_of_them())
    assert fired == [(1, "a"), (2, "b"), (3, "c")]


def test_a_limit_on_a_wait_strikes() -> None:
    async def wait() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(30):
                await asyncio.Event().wait()
        return asyncio.get_running_loop().time()

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        assert runner.run(wait()) == 30


def test_a_wait_that_nothing_can_end_is_an_error() -> None:
    async def wait() -> None:
        await asyncio.sleep(5)
        await asyncio.Event().wait()

    with (
        asyncio.Runner(loop_factory=VirtualLoop) as runner,
        pytest.raises(VirtualDeadlock, match="deadlock in virtual time"),
    ):
        runner.run(wait())
