"""The whole of the room at once: a guest is moved with nothing but it and a plain copy of RAM."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from vmferry.errors import GuestError
from vmferry.guest.commandline import Places, rewrite
from vmferry.guest.process import GuestProcess, find
from vmferry.guest.qemu import DRAIN_NODE, Qemu

from .bench import Bench, copy, counted, counts_beyond, has_ended, memory_of

pytestmark = pytest.mark.parametrize("machine", ["pc", "q35"])


def test_it_goes_on_at_the_destination_where_it_was_stopped(bench: Bench, machine: str) -> None:
    async def run() -> None:
        async with bench.started(bench.furnished(machine, bench.disk())) as process:
            source = await Qemu.attach(process)
            assert await source.blockers() == []
            assert source.machine.startswith(f"pc-{'q35' if machine == 'q35' else 'i440fx'}-")
            ours = await memory_of(source, process)
            await counts_beyond(ours, 0)
            there = bench.folder / "there"
            there.mkdir()
            rewritten = rewrite(process.argv, Places(there, machine=source.machine))
            async with bench.started(rewritten.argv, log="there/log") as second:
                target = await Qemu.attach(second)
                theirs = await memory_of(target, second)
                assert [(b.name, b.length) for b in theirs.blocks] == [
                    (b.name, b.length) for b in ours.blocks
                ]
                stopped_ns = await source.stop()
                count = counted(ours)
                state = await source.save_device_state()
                copy(ours, theirs)
                assert counted(ours) == count
                await target.load_device_state(state, 30)
                assert not await target.running()
                assert counted(theirs) == count
                assert await target.cont() > stopped_ns
                assert await counts_beyond(theirs, count) > count
                with pytest.raises(GuestError, match="lock"):
                    # The disk is the destination's now.
                    await source.cont()
                said = (there / "log").read_text().splitlines()
                assert [line for line in said if "deprecated" not in line] == []
                await target.close()
            await source.close()

    asyncio.run(run())


def test_after_a_save_that_came_to_nothing_the_source_goes_on(bench: Bench, machine: str) -> None:
    async def run() -> None:
        async with bench.started(bench.furnished(machine, bench.disk())) as process:
            source = await Qemu.attach(process)
            memory = await memory_of(source, process)
            await counts_beyond(memory, 0)
            for _ in range(3):
                await source.drain()
                stopped_ns = await source.stop()
                assert not await source.running()
                count = counted(memory)
                assert (await source.save_device_state()).startswith(b"QEVM")
                assert counted(memory) == count
                assert await source.cont() >= stopped_ns
                assert await source.running()
                await counts_beyond(memory, count)
            await source.close()
            await nothing_is_left(process)

    asyncio.run(run())


def test_a_loaded_destination_has_no_hold_on_the_disks(bench: Bench, machine: str) -> None:
    """Up to the commit the source may go on, whatever the destination has loaded."""

    async def run() -> None:
        async with bench.started(bench.furnished(machine, bench.disk())) as process:
            source = await Qemu.attach(process)
            ours = await memory_of(source, process)
            await counts_beyond(ours, 0)
            there = bench.folder / "there"
            there.mkdir()
            rewritten = rewrite(process.argv, Places(there, machine=source.machine))
            async with bench.started(rewritten.argv, log="there/log") as second:
                target = await Qemu.attach(second)
                await source.stop()
                state = await source.save_device_state()
                copy(ours, await memory_of(target, second))
                await target.load_device_state(state, 30)
                count = counted(ours)
                await source.cont()
                await counts_beyond(ours, count)
                with pytest.raises(GuestError, match="lock"):
                    await target.cont()
                assert not await target.running()
                await target.close()
            await source.close()

    asyncio.run(run())


def test_a_paused_guest_stays_paused(bench: Bench, machine: str) -> None:
    async def run() -> None:
        async with bench.started(bench.furnished(machine, bench.disk())) as process:
            source = await Qemu.attach(process)
            memory = await memory_of(source, process)
            await counts_beyond(memory, 0)
            await source.stop()
            count = counted(memory)
            # As a move finds it: stopped by somebody else.
            assert await source.blockers() == []
            await source.stop()
            state = await source.save_device_state()
            assert state.startswith(b"QEVM")
            assert not await source.running()
            assert counted(memory) == count
            await source.close()
            again = await Qemu.attach(process)
            assert await again.blockers() == []
            await again.cont()
            await counts_beyond(memory, count)
            await again.close()

    asyncio.run(run())


def test_a_state_that_does_not_fit_is_told(bench: Bench, machine: str) -> None:
    """The destination lacks the source's disk: its QEMU says so, or dies and has said so."""

    async def run() -> None:
        async with bench.started(bench.furnished(machine, bench.disk())) as process:
            source = await Qemu.attach(process)
            ours = await memory_of(source, process)
            other = [*bench.argv(machine, name="other"), "-incoming", "defer", "-S"]
            async with bench.started(other, log="other.log") as second:
                target = await Qemu.attach(second)
                await source.stop()
                state = await source.save_device_state()
                theirs = await memory_of(target, second)
                named = {b.name: i for i, b in enumerate(ours.blocks)}
                for index, block in enumerate(theirs.blocks):
                    content = ours.read(named[block.name], 0, block.length)
                    theirs.write(index, 0, content)
                with pytest.raises(GuestError, match=r"other.* (load|loaded) "):
                    await target.load_device_state(state, 30)
                assert has_ended(second) is bench.old
                said = (bench.folder / "other.log").read_text()
                assert "nknown" in said
                await target.close()
                await source.cont()
            await source.close()

    asyncio.run(run())


async def nothing_is_left(process: GuestProcess) -> None:
    guest = await Qemu.attach(process)
    nodes = await guest.monitor.rows("query-named-block-nodes")
    assert DRAIN_NODE not in [node["node-name"] for node in nodes]
    assert await guest.monitor.rows("query-fdsets") == []
    descriptors = [str(fd.readlink()) for fd in Path(f"/proc/{process.pid}/fd").iterdir()]
    assert not [d for d in descriptors if "vmferry" in d]
    await guest.close()


def test_the_guest_is_found_again_by_all_its_names(bench: Bench, machine: str) -> None:
    async def run() -> None:
        async with bench.started(bench.argv(machine)) as process:
            for reference in (str(process.pid), bench.name, process.qmp):
                assert find(reference) == process

    asyncio.run(run())
