"""Two guests are compared by what they are made of."""

from __future__ import annotations

import asyncio

from vmferry.guest.monitor import Monitor
from vmferry.guest.process import GuestProcess
from vmferry.guest.qemu import Qemu
from vmferry.guest.tree import Tree, differences, object_tree

from .firmware_guests import Guests

FURNISHED = (
    *("-M", "q35", "-device", "pcie-root-port,id=p1,chassis=1", "-smp", "2"),
    *("-netdev", "user,id=n0", "-device", "virtio-net-pci,netdev=n0"),
    *("-object", "iothread,id=io", "-blockdev", "driver=null-co,node-name=d0,size=1048576"),
    *("-device", "virtio-blk-pci,drive=d0,iothread=io,id=v0", "-vga", "std", "-usb"),
    *("-drive", "driver=null-co,size=1M,if=ide", "-chardev", "null,id=c0"),
    *("-device", "virtio-balloon-pci"),
)


async def tree_of(guest: GuestProcess) -> Tree:
    monitor = await Monitor.connect(guest.qmp)
    tree = await object_tree(monitor)
    await monitor.disconnect()
    return tree


def test_a_waiting_destination_equals_its_source(guests: Guests) -> None:
    source = guests.start(*FURNISHED)
    waiting = guests.start(
        *FURNISHED,
        *("-incoming", "defer", "-S"),
        monitor=("-qmp", "unix:old,server=on,wait=off", "-qmp", "unix:m.sock,server=on,wait=off"),
    )

    async def scenario() -> None:
        qemu = await Qemu.attach(source)
        await qemu.drain()
        ours, theirs = await object_tree(qemu.monitor), await tree_of(waiting)
        assert differences(ours, theirs) == []
        assert differences(theirs, ours) == []
        await qemu.close()
        assert "v0 (virtio-blk-pci)" in ours["device"]
        assert "d0 (null-co)" in ours["disk node"]
        assert ours["CPUs"] == ["(2)"]

    asyncio.run(scenario())


def test_what_was_plugged_in_later_shows(guests: Guests) -> None:
    source, other = guests.start(*FURNISHED), guests.start(*FURNISHED)

    async def scenario() -> None:
        before, monitor = await tree_of(other), await Monitor.connect(source.qmp)
        await monitor.execute("netdev_add", {"type": "user", "id": "n9"})
        await monitor.execute(
            "device_add",
            {
                "driver": "virtio-net-pci",
                "id": "hot",
                "netdev": "n9",
                "mac": "52:54:00:00:00:99",
                "bus": "p1",
            },
        )
        await monitor.execute(
            "blockdev-add", {"driver": "null-co", "node-name": "d9", "size": 4096}
        )
        await monitor.execute(
            "object-add", {"qom-type": "memory-backend-ram", "id": "m9", "size": 1 << 20}
        )
        await monitor.execute("chardev-add", {"id": "c9", "backend": {"type": "null", "data": {}}})
        after = await object_tree(monitor)
        told = differences(after, before)
        for part in (
            "device hot (virtio-net-pci)",
            "object m9 (memory-backend-ram)",
            "character device c9",
            "disk node d9 (null-co)",
            "n9 (user)",
            "macaddr=52:54:00:00:00:99",
        ):
            assert [line for line in told if part in line and "only at the source" in line], part
        assert all("only at the destination" in line for line in differences(before, after))
        await monitor.disconnect()

    asyncio.run(scenario())


def test_a_section_that_one_side_lacks_is_not_compared() -> None:
    assert differences({"CPUs": ["(1)"], "device": ["a"]}, {"CPUs": ["(2)"]}) == [
        "CPUs (1) is only at the source",
        "CPUs (2) is only at the destination",
    ]
