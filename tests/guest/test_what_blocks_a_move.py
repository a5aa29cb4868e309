"""Guests that cannot be moved are told so, and are alive afterwards."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import replace

import pytest

from vmferry.errors import GuestError, Refused
from vmferry.guest.process import find
from vmferry.guest.qemu import Qemu

from .bench import Bench


def test_an_nvme_disk_is_named_and_the_guest_survives(bench: Bench) -> None:
    """Saving the state of such a guest ends both versions of QEMU by a segmentation fault."""

    async def run() -> None:
        argv = bench.argv(
            "q35",
            *("-blockdev", "driver=null-co,node-name=d0,size=1048576"),
            *("-device", "nvme,drive=d0,serial=1"),
        )
        async with bench.started(argv) as process:
            guest = await Qemu.attach(process)
            (only,) = [b for b in await guest.blockers() if "nvme" in b]
            assert "non-migratable" in only
            await guest.close()
            # Nobody has asked this one: it asks by itself.
            hasty = await Qemu.attach(process)
            await hasty.stop()
            with pytest.raises(Refused, match="nvme"):
                await hasty.save_device_state()
            await hasty.cont()
            assert await hasty.running()
            await hasty.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("-snapshot",), "-snapshot"),
        (("-icount", "shift=7,rr=record,rrfile=/dev/null"), "record/replay (mode record)"),
    ],
)
def test_what_a_command_line_rules_out(bench: Bench, words: tuple[str, ...], said: str) -> None:
    async def run() -> None:
        argv = bench.argv("pc", *(word.format(bench.folder) for word in words))
        async with bench.started(argv) as process:
            guest = await Qemu.attach(process)
            assert any(said in blocker for blocker in await guest.blockers())
            await guest.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("option", "value", "name"),
    [
        ("-device", "vfio-pci,host=01:00.0,id=h0", "h0"),
        ("-device", '{"driver":"vfio-pci","host":"01:00.0","id":"h0"}', "h0"),
        ("-device", "vhost-user-fs-pci,chardev=c,tag=t", "vhost-user-fs-pci"),
        ("-device", "vhost-scsi-pci,wwpn=naa.1", "vhost-scsi-pci"),
        ("-netdev", "vhost-user,id=n1,chardev=c", "n1"),
        ("-netdev", "type=vhost-vdpa,id=n1,vhostdev=/dev/vhost-vdpa-0", "n1"),
    ],
)
def test_memory_that_others_write_is_not_tracked(
    bench: Bench, option: str, value: str, name: str
) -> None:
    """These need hardware or other processes to start, so only the command line is told."""

    async def run() -> None:
        async with bench.started(bench.argv("pc")) as process:
            claimed = replace(process, argv=[*process.argv, option, value])
            guest = await Qemu.attach(claimed)
            (blocker,) = await guest.blockers()
            assert blocker.startswith(f"device {name} (v")
            assert "nobody can track" in blocker
            await guest.close()

    asyncio.run(run())


def test_only_a_guest_that_runs_or_is_paused_is_moved(bench: Bench) -> None:
    async def run() -> None:
        argv = [*bench.argv("pc"), "-incoming", "defer"]
        async with bench.started(argv) as process:
            guest = await Qemu.attach(process)
            assert any("inmigrate" in b for b in await guest.blockers())
            await guest.close()

    asyncio.run(run())


def test_a_guest_whose_socket_was_taken_over_is_not_mistaken(bench: Bench) -> None:
    """A second QEMU of the same command line takes the path from the first without a word."""

    async def run() -> None:
        argv = bench.argv("pc")
        async with bench.started(argv) as first, bench.started(argv, log="second.log") as second:
            assert first.qmp == second.qmp
            assert find(first.qmp) == second
            with pytest.raises(Refused, match=f"several guests are called {bench.name}"):
                find(bench.name)
            with pytest.raises(Refused, match=f"leads to process {second.pid}"):
                await Qemu.attach(first)
            newer = await Qemu.attach(second)
            assert await newer.running()
            await newer.close()

    asyncio.run(run())


def test_a_daemonized_guest_is_its_sockets_owner(bench: Bench) -> None:
    async def run() -> None:
        pidfile = bench.folder / "pid"
        command = [*bench.argv("pc"), "-daemonize", "-pidfile", str(pidfile)]
        starter = await asyncio.create_subprocess_exec(*command)
        assert await starter.wait() == 0
        pid = int(pidfile.read_text())
        try:
            process = find(bench.name)
            assert process.pid == pid
            guest = await Qemu.attach(process)
            assert await guest.running()
            await guest.close()
        finally:
            os.kill(pid, signal.SIGKILL)

    asyncio.run(run())


def test_many_in_line_at_a_held_monitor(bench: Bench) -> None:
    """The kernel lets a few more clients in, and then lets none connect: the same is wrong."""

    async def run() -> None:
        async with bench.started(bench.argv("pc")) as process:
            holder = await Qemu.attach(process)
            waiting = [await asyncio.open_unix_connection(process.qmp) for _ in range(2)]
            with pytest.raises(GuestError, match="in use by somebody else"):
                await Qemu.attach(process)
            for _, writer in waiting:
                writer.close()
            await holder.close()

    asyncio.run(run())
