"""The check of truth: strategies that would lose a page, planted, are caught."""

from __future__ import annotations

import asyncio

import pytest

from vmferry.simulator import (
    BrokenStrategy,
    GuestModel,
    LinkModel,
    Pattern,
    VirtualDeadlock,
    simulate,
)
from vmferry.strategies import Method, Session, Strategy

GUEST = GuestModel(2048, 2048, 16, Pattern(1024, 2000.0, 500.0, firmware_writes_per_s=200.0))
LINK = LinkModel(50e6, 0.0002)


async def no_scan_after_the_stop(session: Session) -> None:
    await session.push(await session.scan())
    await session.stop()
    await session.push(session.owed)
    await session.switch_over()


async def pushes_before_scanning(session: Session) -> None:
    await session.push(await session.scan())
    await session.stop()
    await session.push(session.owed)
    await session.scan()
    await session.switch_over()


async def pushes_a_round_that_is_too_old(session: Session) -> None:
    first = await session.scan()
    await session.push(first)
    dirty = await session.scan()
    await session.push(dirty)
    await session.stop()
    await session.scan()
    await session.push(dirty)
    await session.switch_over()


async def never_stops(session: Session) -> None:
    await session.push(await session.scan())
    await session.switch_over()


async def never_switches(session: Session) -> None:
    await session.stop()
    await session.push(await session.scan())


async def waits_for_ever(session: Session) -> None:
    await session.scan()
    await asyncio.Event().wait()


async def forgets_the_firmware(session: Session) -> None:
    await session.stop()
    await session.scan()
    await session.switch_over()
    await session.pull()


async def pushes_stale_firmware(session: Session) -> None:
    await session.scan()
    await session.push(session.owed & session.eager)
    await asyncio.sleep(0.1)
    await session.stop()
    await session.switch_over()
    await session.pull()


async def never_pulls(session: Session) -> None:
    await session.stop()
    await session.scan()
    await session.push(session.owed & session.eager)
    await session.switch_over()


@pytest.mark.parametrize(
    ("strategy", "why"),
    [
        (no_scan_after_the_stop, "nobody owes it"),
        (pushes_before_scanning, "are owed"),
        (pushes_a_round_that_is_too_old, "are owed"),
        (never_stops, "a guest that runs"),
        (never_switches, "without a switch-over"),
    ],
)
def test_a_broken_strategy_is_caught(strategy: Strategy, why: str) -> None:
    method = Method("broken", strategy, demand_paging=False)
    with pytest.raises(BrokenStrategy, match=why):
        simulate(method, GUEST, LINK)


@pytest.mark.parametrize(
    ("strategy", "why"),
    [
        (forgets_the_firmware, "are owed"),
        (pushes_stale_firmware, "block 1 .* nobody owes it"),
        (never_pulls, "pages are owed at the end"),
    ],
)
def test_a_broken_demand_paging_strategy_is_caught(strategy: Strategy, why: str) -> None:
    method = Method("broken", strategy, demand_paging=True)
    with pytest.raises(BrokenStrategy, match=why):
        simulate(method, GUEST, LINK)


def test_a_strategy_that_waits_for_ever_is_caught() -> None:
    method = Method("broken", waits_for_ever, demand_paging=False)
    with pytest.raises(VirtualDeadlock):
        simulate(method, GUEST, LINK)


def test_the_same_strategies_pass_where_nothing_is_written() -> None:
    """The planted faults are faults of timing: on an idle guest no page is lost by them."""
    idle = GuestModel(2048, 2048, 16)
    for strategy in (no_scan_after_the_stop, pushes_before_scanning):
        report = simulate(Method("lucky", strategy, demand_paging=False), idle, LINK)
        assert report.pages_transferred == 2064
