"""The same engine, daemons and command on the synthetic guest: quick, and without QEMU or network.

Every page of it has a number and a generation that are checked when it is rewritten and, at the
end, in one sweep over all of them.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest
from tests.cli.host_processes import HostProcess

from vmferry import _core
from vmferry.guest.process import read_process
from vmferry.lab import synthetic
from vmferry.report.records import Report

STRATEGIES = ("pre-copy", "post-copy", "stop-and-copy")


@pytest.fixture
def hosts(tmp_path: Path):
    """Two paired daemons on this machine."""
    both = [HostProcess(tmp_path / name, name) for name in ("ha", "hb")]
    token = both[0].run("invite").out.strip().splitlines()[-1]
    assert both[1].run("pair", token).code == 0
    yield both
    for host in both:
        if host.process.poll() is None:
            host.end()


def move(source: HostProcess, guest: str, to: HostProcess, *more: str) -> Report:
    """Moves by command; the report must say that it worked."""
    outcome = source.run("move", guest, to.name, "--json", *more)
    assert outcome.code == 0, outcome.err
    return msgspec.json.decode(outcome.out, type=Report)


def guest_at(host: HostProcess) -> int:
    """The pid of the one guest that was started by this host's daemon."""
    (socket,) = (host.state / "guests").glob("*/vmferry.qmp")
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            try:
                words = (process / "cmdline").read_bytes()
                if str(socket).encode() in words and read_process(int(process.name)):
                    return int(process.name)
            except Exception:
                continue
    raise AssertionError(f"no guest at {host.name}")


@pytest.mark.parametrize("pattern", ["text", "random", "zero"])
def test_a_guest_that_checks_every_page_goes_round(
    hosts: list[HostProcess], tmp_path: Path, pattern: str
) -> None:
    async def run() -> None:
        guest = await synthetic.start(
            tmp_path, name=f"round-{pattern}", rate=80.0, vcpus=2, pattern=pattern
        )
        (here, there), pid = hosts, guest.pid
        try:
            for strategy in STRATEGIES:
                report = await asyncio.to_thread(
                    move, here, str(pid), there, "--strategy", strategy, "--verify"
                )
                assert report.verification is not None
                assert report.verification.pages_differing == 0
                here, there = there, here
                pid = await asyncio.to_thread(guest_at, here)
                assert _core.find_userfaultfd(pid) == []
                (check_socket,) = (here.state / "guests").glob("*/qmp-1.sock")
                verdict = await synthetic.check(check_socket, sweep=True)
                assert verdict.corrupt == verdict.differing == 0
                assert verdict.swept > 0
        finally:
            await guest.end()
            for left in (here, there):
                await asyncio.to_thread(end_guests, left)

    asyncio.run(run())


def end_guests(host: HostProcess) -> None:
    """Kills what a test has left at a host."""
    import os
    import signal

    try:
        os.kill(guest_at(host), signal.SIGKILL)
    except (AssertionError, ValueError, ProcessLookupError):
        return


def test_a_guest_that_cannot_be_moved_is_refused_untouched(
    hosts: list[HostProcess], tmp_path: Path
) -> None:
    async def run() -> None:
        guest = await synthetic.start(
            tmp_path, name="blocked", extra=["-blocked", "it is glued on"]
        )
        try:
            outcome = await asyncio.to_thread(hosts[0].run, "move", str(guest.pid), "hb")
            assert outcome.code == 1
            assert "it is glued on" in outcome.err
            assert "Traceback" not in outcome.err
            assert _core.find_userfaultfd(guest.pid) == []
            assert not list((hosts[1].state / "guests").glob("*"))
        finally:
            await guest.end()

    asyncio.run(run())


def test_a_destination_that_does_not_load_leaves_the_guest_here(
    hosts: list[HostProcess], tmp_path: Path
) -> None:
    async def run() -> None:
        guest = await synthetic.start(tmp_path, name="unloved", extra=["-fail", "load"])
        try:
            outcome = await asyncio.to_thread(hosts[0].run, "move", str(guest.pid), "hb")
            assert outcome.code == 1
            assert "runs on at ha as before" in outcome.err + outcome.out
            before = await synthetic.check(guest.check_path)
            await asyncio.sleep(0.2)
            after = await synthetic.check(guest.check_path, sweep=True)
            assert after.writes > before.writes
            assert after.corrupt == after.differing == 0
            assert _core.find_userfaultfd(guest.pid) == []
            assert not list((hosts[1].state / "guests").glob("*"))
        finally:
            await guest.end()

    asyncio.run(run())
