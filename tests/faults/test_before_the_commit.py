"""Whatever fails before the commit: the guest goes on at the source, as if nothing had been tried.

Each test is one or more rows of docs/failure-contract.md.
"""

from __future__ import annotations

import asyncio
import os
import signal

import pytest
from tests.faults.conftest import Play
from tests.faults.stage import Stage

LONG = pytest.mark.long


@pytest.mark.parametrize(
    ("strategy", "step"),
    [
        ("pre-copy", "offered"),
        ("pre-copy", "pushed"),
        ("pre-copy", "stopped"),
        ("pre-copy", "state-saved"),
        ("pre-copy", "loaded"),
        ("post-copy", "loaded"),
        pytest.param("stop-and-copy", "stopped", marks=LONG),
        pytest.param("pre-copy", "attached", marks=LONG),
        pytest.param("pre-copy", "ready", marks=LONG),
        pytest.param("pre-copy", "streams-open", marks=LONG),
        pytest.param("pre-copy", "keeper-made", marks=LONG),
        pytest.param("pre-copy", "state-sent", marks=LONG),
        pytest.param("post-copy", "paging-armed", marks=LONG),
    ],
)
def test_the_sources_daemon_is_killed(play: Play, strategy: str, step: str) -> None:
    async def scene(stage: Stage) -> None:
        async with stage.attempt(strategy, f"source:{step}") as attempt:
            await attempt.source.kill()
            await attempt.assert_goes_on()
            # From `loaded` on the destination may not decide: it is told by the next daemon.
            await stage.restart(attempt.here)
            await attempt.assert_untouched()

    play(scene)


@pytest.mark.parametrize(
    ("strategy", "step"),
    [
        ("pre-copy", "destination:ready"),
        ("pre-copy", "source:pushed"),
        ("pre-copy", "source:stopped"),
        ("pre-copy", "source:loaded"),
        ("post-copy", "source:loaded"),
        pytest.param("pre-copy", "destination:qemu-started", marks=LONG),
        pytest.param("pre-copy", "destination:streams-open", marks=LONG),
        pytest.param("stop-and-copy", "source:stopped", marks=LONG),
        pytest.param("post-copy", "source:paging-armed", marks=LONG),
    ],
)
def test_the_destinations_daemon_is_killed(play: Play, strategy: str, step: str) -> None:
    async def scene(stage: Stage) -> None:
        async with stage.attempt(strategy, step) as attempt:
            await attempt.destination.kill()
            attempt.release(step)
            report = await attempt.end()
            assert report is not None
            assert report.outcome == "failed"
            assert "runs on at" in report.error
            await attempt.assert_goes_on()
            # From `loaded` on only a verdict may end what waits there.
            await stage.restart(attempt.there)
            await attempt.assert_untouched()

    play(scene)


@pytest.mark.parametrize(
    ("strategy", "step"),
    [
        ("pre-copy", "source:stopped"),
        ("pre-copy", "source:loaded"),
        pytest.param("pre-copy", "source:pushed", marks=LONG),
        pytest.param("post-copy", "source:loaded", marks=LONG),
        pytest.param("stop-and-copy", "source:stopped", marks=LONG),
    ],
)
def test_the_link_is_cut(play: Play, strategy: str, step: str) -> None:
    async def scene(stage: Stage) -> None:
        async with stage.attempt(strategy, step) as attempt:
            await attempt.cut()
            if step == "source:loaded":
                await attempt.silence()
            attempt.release(step)
            report = await attempt.end()
            assert report is not None
            assert report.outcome == "failed"
            assert "runs on at" in report.error
            await attempt.assert_goes_on()
            await attempt.restore()
            await attempt.assert_untouched()

    play(scene)


@pytest.mark.parametrize(
    ("strategy", "step"),
    [
        ("pre-copy", "destination:ready"),
        ("pre-copy", "source:pushed"),
        ("pre-copy", "source:loaded"),
        pytest.param("pre-copy", "source:stopped", marks=LONG),
        pytest.param("post-copy", "source:loaded", marks=LONG),
    ],
)
def test_the_destinations_qemu_is_killed(play: Play, strategy: str, step: str) -> None:
    async def scene(stage: Stage) -> None:
        async with stage.attempt(strategy, step) as attempt:
            await attempt.kill_arriving()
            if step.startswith("destination"):
                attempt.release(step)
            await attempt.arrival_is_over()
            attempt.release(step)
            report = await attempt.end()
            assert report is not None
            assert report.outcome == "failed"
            assert "QEMU ended" in report.error
            await attempt.assert_untouched()

    play(scene)


@pytest.mark.parametrize(
    ("strategy", "step", "times"),
    [
        ("pre-copy", "pushed", 1),
        ("pre-copy", "stopped", 2),
        ("post-copy", "loaded", 2),
        pytest.param("pre-copy", "pushed", 2, marks=LONG),
        pytest.param("pre-copy", "stopped", 1, marks=LONG),
        pytest.param("post-copy", "loaded", 1, marks=LONG),
        pytest.param("stop-and-copy", "stopped", 2, marks=LONG),
    ],
)
def test_ctrl_c(play: Play, strategy: str, step: str, times: int) -> None:
    async def scene(stage: Stage) -> None:
        async with stage.attempt(strategy, f"source:{step}") as attempt:
            for _ in range(times):
                attempt.interrupt()
            report = await attempt.end()
            assert report is not None
            assert report.outcome == "cancelled"
            assert attempt.command.returncode == 130
            await attempt.assert_untouched()

    play(scene)


@pytest.mark.parametrize(
    "step",
    [
        "streams-open",
        "stopped",
        "loaded",
        pytest.param("offered", marks=LONG),
        pytest.param("attached", marks=LONG),
        pytest.param("keeper-made", marks=LONG),
        pytest.param("state-sent", marks=LONG),
    ],
)
def test_cancel(play: Play, step: str) -> None:
    async def scene(stage: Stage) -> None:
        async with stage.attempt(hold=f"source:{step}") as attempt:
            done = await attempt.source.run("cancel", stage.guest.name)
            assert done.code == 0
            assert "runs on at" in done.out
            report = await attempt.end()
            assert report is not None
            assert report.outcome == "cancelled"
            await attempt.assert_untouched()

    play(scene)


@pytest.mark.parametrize("strategy", ["pre-copy", pytest.param("stop-and-copy", marks=LONG)])
def test_cancel_while_pages_are_under_way(play: Play, strategy: str) -> None:
    async def scene(stage: Stage) -> None:
        await stage.lab.shape(50)
        try:
            async with stage.attempt(strategy) as attempt:
                await attempt.some_bytes_have_gone(2 << 20)
                done = await attempt.source.run("cancel", stage.guest.name)
                assert done.code == 0
                report = await attempt.end()
                assert report is not None
                assert report.outcome == "cancelled"
                await attempt.assert_untouched()
        finally:
            await stage.lab.shape(None)

    play(scene)


@pytest.mark.parametrize(
    ("host", "step"),
    [
        ("source", "source:stopped"),
        ("destination", "source:pushed"),
        pytest.param("source", "source:loaded", marks=LONG),
    ],
)
def test_a_daemon_is_asked_to_end(play: Play, host: str, step: str) -> None:
    async def scene(stage: Stage) -> None:
        async with stage.attempt(hold=step) as attempt:
            daemon = attempt.source if host == "source" else attempt.destination
            ending = asyncio.create_task(daemon.end())
            if host == "destination":
                await attempt.arrival_is_over()
                attempt.release(step)
            report = await attempt.end()
            await ending
            assert report is not None
            assert report.outcome == ("cancelled" if host == "source" else "failed")
            await attempt.assert_untouched()

    play(scene)


def test_a_refused_move_touches_nothing(play: Play) -> None:
    """The destination's QEMU does not start: the guest's disk cannot be seen there."""

    async def scene(stage: Stage) -> None:
        with stage.without_its_disk():
            async with stage.attempt() as attempt:
                report = await attempt.end()
                assert report is not None
                assert report.outcome == "failed"
                assert "does not start" in report.error
                assert "No such file" in report.error
                await attempt.assert_untouched()

    play(scene)


def test_cancel_while_the_guest_is_being_stopped(play: Play) -> None:
    """The order to stop is under way to a QEMU that does not answer yet: it is stopped later."""

    async def scene(stage: Stage) -> None:
        async with stage.attempt(hold="source:keeper-made") as attempt:
            os.kill(attempt.process.pid, signal.SIGSTOP)
            try:
                attempt.release("source:keeper-made")
                await asyncio.sleep(0.3)
                attempt.interrupt()
                await attempt.phase("cancelling")
            finally:
                os.kill(attempt.process.pid, signal.SIGCONT)
            report = await attempt.end()
            assert report is not None
            assert report.outcome == "cancelled"
            await attempt.assert_untouched()

    play(scene)


@pytest.mark.parametrize("step", [pytest.param("stopped", marks=LONG), "loaded"])
def test_both_daemons_are_killed(play: Play, step: str) -> None:
    async def scene(stage: Stage) -> None:
        async with stage.attempt(hold=f"source:{step}") as attempt:
            await asyncio.gather(attempt.source.kill(), attempt.destination.kill())
            await attempt.assert_goes_on()
            await asyncio.gather(stage.restart(attempt.here), stage.restart(attempt.there))
            await attempt.assert_untouched()

    play(scene)


def test_after_all_that_it_moves(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        for strategy in ("pre-copy", "post-copy"):
            here, _ = stage.guest.locate()
            assert (await stage.move(strategy)).outcome == "moved"
            assert stage.guest.locate()[0] != here

    play(scene)
