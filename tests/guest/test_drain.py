"""The drain: it waits for what disks are still writing into memory, and never hangs a guest."""

from __future__ import annotations

import asyncio

import pytest

from vmferry.guest.qemu import DRAIN_NODE, Qemu

from .bench import READS_DISK, Bench, counts_beyond, memory_of


@pytest.mark.parametrize("aio", ["threads", "native", "io_uring"])
def test_disks_under_an_iothread_do_not_hang(bench: Bench, aio: str) -> None:
    """Naming such a disk itself deadlocks QEMU 7.2 for good."""

    async def run() -> None:
        disk = f"driver=file,filename={bench.disk()},node-name=f0,cache.direct=on,aio={aio}"
        argv = bench.argv(
            "q35",
            *("-object", "iothread,id=io0", "-blockdev", disk),
            *("-blockdev", "driver=qcow2,file=f0,node-name=d0"),
            *("-device", "virtio-blk-pci,drive=d0,iothread=io0,bootindex=0"),
        )
        async with bench.started(argv) as process:
            guest = await Qemu.attach(process)
            memory = await memory_of(guest, process)
            count = await counts_beyond(memory, 0)
            for _ in range(20):
                await guest.drain()
            await counts_beyond(memory, count)
            nodes = await guest.monitor.rows("query-named-block-nodes")
            assert [n["node-name"] for n in nodes].count(DRAIN_NODE) == 1
            await guest.close()

    asyncio.run(run())


@pytest.mark.parametrize("iothread", [(), (",iothread=io0",)])
def test_it_waits_for_the_request_in_flight(bench: Bench, iothread: tuple[str, ...]) -> None:
    """A disk takes a second for every read, and the guest always has one in flight."""

    async def run() -> None:
        slow = "driver=null-aio,node-name=slow,size=1048576,latency-ns=1000000000,read-zeroes=on"
        argv = bench.argv(
            "q35",
            *("-object", "iothread,id=io0"),
            *("-blockdev", f"driver=file,filename={bench.disk(READS_DISK)},node-name=f0"),
            *("-blockdev", "driver=qcow2,file=f0,node-name=d0", "-blockdev", slow),
            *("-device", "virtio-blk-pci,drive=d0,bootindex=0"),
            *("-device", "".join(("virtio-blk-pci,drive=slow,bootindex=1,id=v1", *iothread))),
        )

        async def reads(guest: Qemu) -> int:
            devices = await guest.monitor.rows("query-blockstats")
            stats = next(d["stats"] for d in devices if "v1" in str(d.get("qdev")))
            assert isinstance(stats, dict)
            return int(stats["rd_operations"])

        async with bench.started(argv) as process:
            guest = await Qemu.attach(process)
            await counts_beyond(await memory_of(guest, process), 1)
            before = await reads(guest)
            await guest.drain()
            assert await reads(guest) > before
            await guest.close()

    asyncio.run(run())


def test_a_node_that_is_there_already_is_used_and_taken_away(bench: Bench) -> None:
    """Left by a daemon that died, or added by another of our connections, or removed by it."""

    async def run() -> None:
        async with bench.started(bench.argv("pc")) as process:
            guest = await Qemu.attach(process)
            node = {"driver": "null-co", "node-name": DRAIN_NODE, "size": 4096}
            await guest.monitor.execute("blockdev-add", node)
            await guest.drain()
            await guest.monitor.execute("blockdev-del", {"node-name": DRAIN_NODE})
            await guest.drain()
            await guest.close()
            after = await Qemu.attach(process)
            assert await after.monitor.rows("query-named-block-nodes") == []
            await after.close()

    asyncio.run(run())
