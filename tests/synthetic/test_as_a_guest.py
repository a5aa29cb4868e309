"""The guest room on the synthetic guest: the very code that handles a QEMU, on its stand-in."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from vmferry import _core
from vmferry.errors import GuestError
from vmferry.guest.commandline import Places, rewrite
from vmferry.guest.launch import launch
from vmferry.guest.process import GuestProcess, find
from vmferry.guest.qemu import Qemu
from vmferry.lab import synthetic


async def destination(source: GuestProcess, directory: Path) -> GuestProcess:
    directory.mkdir()
    rewritten = rewrite(source.argv, Places(directory, machine="synthetic"))
    return await launch(
        rewritten.argv,
        exe=source.exe,
        cwd=source.cwd,
        uid=source.uid,
        gid=source.gid,
        log=directory / "log",
    )


def copy(source: _core.Memory, target: _core.Memory) -> None:
    pages = source.populated()
    for block in range(len(source.shape)):
        for start, stop in pages.ranges(block):
            offset, length = start * _core.PAGE_SIZE, (stop - start) * _core.PAGE_SIZE
            target.write(block, offset, source.read(block, offset, length))


def test_it_is_found_attached_to_and_moved_by_its_own_command_line(tmp_path: Path) -> None:
    async def run() -> None:
        guest = await synthetic.start(
            tmp_path, name="stand-in", area_mib=4, memory_mib=40, vcpus=2, pattern="zero"
        )
        target_pid = 0
        try:
            process = find(str(guest.qmp_path))
            assert (process.pid, process.name) == (guest.pid, "stand-in")
            source = await Qemu.attach(process)
            assert (source.version, source.machine) == ("10.0.2", "synthetic")
            assert source.nics() == []
            assert await source.blockers() == []
            await source.drain()
            blocks = await source.ram()
            names = [block.block.name for block in blocks]
            assert names == ["synthetic.ram", "synthetic.rom"]

            started = await destination(process, tmp_path / "there")
            target_pid = started.pid
            target = await Qemu.attach(started)
            theirs = await target.ram()
            assert [b.used for b in theirs] == [b.used for b in blocks]

            stopped_ns = await source.stop()
            state = await source.save_device_state()
            copy(
                _core.Memory(guest.pid, [b.block for b in blocks]),
                _core.Memory(started.pid, [b.block for b in theirs]),
            )
            await target.load_device_state(state, 10)
            assert not await target.running()
            assert await target.cont() > stopped_ns
            verdict = await target.monitor.table("x-synthetic-check", {"sweep": True})
            assert (verdict["corrupt"], verdict["differing"]) == (0, 0)

            # The way back: the source goes on as if nothing had been.
            await source.cont()
            await source.close()
            await target.close()
            assert (await synthetic.check(guest.check_path, sweep=True)).corrupt == 0
        finally:
            await guest.end()
            if target_pid:
                os.kill(target_pid, signal.SIGKILL)

    asyncio.run(run())


@pytest.mark.parametrize("fail", ["load", "crash"])
def test_it_fails_to_load_when_told_to(tmp_path: Path, fail: str) -> None:
    """`-fail` is for tests of the way back: it has no effect at the source."""

    async def run() -> None:
        guest = await synthetic.start(tmp_path, area_mib=1, extra=("-fail", fail))
        started: GuestProcess | None = None
        try:
            process = find(str(guest.pid))
            source = await Qemu.attach(process)
            started = await destination(process, tmp_path / "there")
            target = await Qemu.attach(started)
            await source.stop()
            state = await source.save_device_state()
            with pytest.raises(GuestError, match="load"):
                await target.load_device_state(state, 10)
            await target.close()
            await source.cont()
            await source.close()
            assert (await synthetic.check(guest.check_path, sweep=True)).differing == 0
        finally:
            await guest.end()
            if started is not None and fail == "load":
                os.kill(started.pid, signal.SIGKILL)

    asyncio.run(run())


def test_a_save_fails_when_told_to(tmp_path: Path) -> None:
    async def run() -> None:
        guest = await synthetic.start(tmp_path, area_mib=1, extra=("-fail", "save"))
        try:
            source = await Qemu.attach(find(str(guest.pid)))
            await source.stop()
            with pytest.raises(GuestError, match="as asked for"):
                await source.save_device_state()
            await source.cont()
            await source.close()
        finally:
            await guest.end()

    asyncio.run(run())
