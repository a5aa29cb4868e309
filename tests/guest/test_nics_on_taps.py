"""NICs that end in a tap are known by MAC and interface, however the tap was made."""

from __future__ import annotations

import asyncio
import fcntl
import os
import struct
import uuid
from collections.abc import Iterator

import pytest

from vmferry.guest.nics import parse_nics
from vmferry.guest.qemu import Qemu

from .firmware_guests import Guests

TUNSETIFF = 0x400454CA
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000


@pytest.fixture
def tap() -> Iterator[tuple[str, int]]:
    """A tap that ends with its descriptor: (name, descriptor)."""
    try:
        descriptor = os.open("/dev/net/tun", os.O_RDWR)
    except OSError:
        pytest.skip("/dev/net/tun cannot be opened")
    name = f"vft{uuid.uuid4().hex[:8]}"
    flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
    try:
        fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    except PermissionError:
        os.close(descriptor)
        pytest.skip("making a tap needs CAP_NET_ADMIN")
    yield name, descriptor
    os.close(descriptor)


def test_taps_by_name_and_by_descriptor(guests: Guests, tap: tuple[str, int]) -> None:
    name, descriptor = tap
    named = f"vfn{uuid.uuid4().hex[:8]}"
    guest = guests.start(
        *("-netdev", "user,id=u", "-device", "e1000,netdev=u"),
        *("-netdev", f"tap,id=a,ifname={named},script=no,downscript=no"),
        *("-device", "virtio-net-pci,netdev=a,mac=52:54:00:AB:CD:01"),
        *("-netdev", f"tap,id=b,fd={descriptor}", "-device", "virtio-net-pci,netdev=b"),
        "-S",
        pass_fds=[descriptor],
    )

    async def scenario() -> None:
        qemu = await Qemu.attach(guest)
        # The second default MAC: the card of the user network has the first.
        assert qemu.nics() == [("52:54:00:ab:cd:01", named), ("52:54:00:12:34:57", name)]
        await qemu.close()

    asyncio.run(scenario())


def test_queues_are_one_nic() -> None:
    text = (
        "n.0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:57\r\n"
        " \\ n1: index=0,type=tap,ifname=t1,script=no,downscript=no\r\n"
        "n.0: index=1,type=nic,\r\n"
        " \\ n1: index=1,type=tap,ifname=t1,script=no,downscript=no\r\n"
    )
    assert parse_nics(text, 1) == [("52:54:00:12:34:57", "t1")]


def test_none_at_all() -> None:
    assert parse_nics("", 1) == []
    assert parse_nics("unknown command: 'info'\r\n", 1) == []


def test_a_tap_without_a_name_of_ours_is_left_to_its_helper() -> None:
    """QEMU's bridge helper made it and joined it, and does so again at the destination."""
    no_tap = os.open(os.devnull, os.O_RDONLY)
    text = (
        "e.0: index=0,type=nic,model=e1000,macaddr=52:54:00:12:34:56\r\n"
        " \\ b: index=0,type=tap,helper=/usr/lib/qemu/qemu-bridge-helper,br=br0\r\n"
        "e.1: index=0,type=nic,model=e1000,macaddr=52:54:00:12:34:57\r\n"
        f" \\ d: index=0,type=tap,fd={no_tap}\r\n"
    )
    found = parse_nics(text, os.getpid())
    os.close(no_tap)
    assert found == []
