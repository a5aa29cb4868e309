"""After the commit the guest is the destination's, whatever fails then.

Each test is one or more rows of docs/failure-contract.md.
"""

from __future__ import annotations

import asyncio

import pytest
from tests.faults.conftest import Play
from tests.faults.stage import Stage

LONG = pytest.mark.long


@pytest.mark.parametrize(
    "step", ["source:fenced", pytest.param("destination:committed", marks=LONG)]
)
def test_the_link_is_cut(play: Play, step: str) -> None:
    async def scene(stage: Stage) -> None:
        async with stage.attempt(hold=step) as attempt:
            await attempt.cut()
            attempt.release(step)
            await attempt.silence()
            await attempt.restore()
            report = await attempt.end()
            assert report is not None
            assert report.outcome == "moved"
            await attempt.assert_moved()

    play(scene)


@pytest.mark.parametrize("strategy", ["pre-copy", "post-copy"])
def test_cancel_comes_too_late(play: Play, strategy: str) -> None:
    async def scene(stage: Stage) -> None:
        async with stage.attempt(strategy, "source:fenced") as attempt:
            attempt.interrupt()
            cancelling = asyncio.create_task(attempt.source.run("cancel", stage.guest.name))
            await attempt.phase("cancelling")
            attempt.release("source:fenced")
            cancelled = await cancelling
            assert cancelled.code == 1
            assert "past its commit" in cancelled.err
            report = await attempt.end()
            assert report is not None
            assert report.outcome == "moved"
            await attempt.assert_moved()

    play(scene)


def test_the_sources_daemon_is_asked_to_end(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        async with stage.attempt(hold="source:fenced") as attempt:
            ending = asyncio.create_task(attempt.source.end())
            attempt.release("source:fenced")
            report = await attempt.end()
            await ending
            assert report is not None
            assert report.outcome == "moved"
            await attempt.assert_moved()

    play(scene)


def test_the_destinations_daemon_is_killed_when_it_has_heard_the_commit(play: Play) -> None:
    """The dead man's switch runs the guest; the next daemon answers the source."""

    async def scene(stage: Stage) -> None:
        async with stage.attempt(hold="destination:committed") as attempt:
            await attempt.destination.kill()
            await attempt.runs_at_the_destination()
            await stage.restart(attempt.there)
            report = await attempt.end()
            assert report is not None
            assert report.outcome == "moved"
            await attempt.assert_moved()

    play(scene)


def test_the_destinations_daemon_is_killed_before_it_hears_the_commit(play: Play) -> None:
    """The next daemon hears it, and runs the guest that it finds."""

    async def scene(stage: Stage) -> None:
        async with stage.attempt(hold="source:fenced") as attempt:
            await attempt.destination.kill()
            attempt.release("source:fenced")
            await stage.restart(attempt.there)
            report = await attempt.end()
            assert report is not None
            assert report.outcome == "moved"
            await attempt.assert_moved()

    play(scene)


def test_the_sources_daemon_is_killed_before_it_says_the_commit(play: Play) -> None:
    """The next daemon says it: the dead man's switch has seen that the kill was done."""

    async def scene(stage: Stage) -> None:
        async with stage.attempt(hold="source:fenced") as attempt:
            await attempt.source.kill()
            await stage.restart(attempt.here)
            await attempt.assert_moved()

    play(scene)
