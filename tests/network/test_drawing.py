"""Taps, bridges and announcements against the kernel's own bridge."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import asynccontextmanager

import pytest
from pyroute2.iproute.linux import AsyncIPRoute

from vmferry.errors import GuestError
from vmferry.network import frames, taps
from vmferry.network.addresses import AddressWatch
from vmferry.network.announce import Announcer

InNamespace = Callable[[Callable[[], Coroutine[object, object, None]]], None]
OpenTap = Callable[[str], int]

MAC = "52:54:00:77:00:10"
RAW = frames.mac_bytes(MAC)
PEER = bytes.fromhex("525400770099")
ETH_P_ALL = 3
NTF_PERMANENT_STATE = 0x80


@asynccontextmanager
async def host(open_tap: OpenTap) -> AsyncGenerator[tuple[int, socket.socket]]:
    """br0 with port up0 (far end far0) and a tap vf0 beside it; gives (tap, socket on far0)."""
    async with AsyncIPRoute() as netlink:
        await netlink.link("add", ifname="br0", kind="bridge", br_forward_delay=0)
        await netlink.link("add", ifname="up0", kind="veth", peer="far0")
        bridge = (await netlink.link_lookup(ifname="br0"))[0]
        for name in ("br0", "up0", "far0"):
            index = (await netlink.link_lookup(ifname=name))[0]
            if name == "up0":
                await netlink.link("set", index=index, master=bridge)
            await netlink.link("set", index=index, state="up")
    tap = open_tap("vf0")
    far = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    far.bind(("far0", ETH_P_ALL))
    far.setblocking(False)
    try:
        yield tap, far
    finally:
        far.close()
        os.close(tap)


async def where_is(mac: str) -> tuple[str, int]:
    """Port that br0 forwards `mac` to, and the entry's state."""
    async with AsyncIPRoute() as netlink:
        names = {link["index"]: link.get("ifname") async for link in await netlink.get_links()}
        async for entry in await netlink.fdb("dump"):
            if entry.get("lladdr") == mac and entry.get("master"):
                return names[entry["ifindex"]], entry["state"]
    return "nowhere", 0


async def from_guest(far: socket.socket, count: int) -> list[bytes]:
    """`count` frames that the far end received from the guest's MAC."""
    loop = asyncio.get_running_loop()
    got: list[bytes] = []
    async with asyncio.timeout(5):
        while len(got) < count:
            frame, address = await loop.sock_recvfrom(far, 2048)
            if frame[6:12] == RAW and address[2] != socket.PACKET_OUTGOING:
                got.append(frame)
    return got


def test_taps_join_bridges(in_namespace: InNamespace, open_tap: OpenTap) -> None:
    async def scenario() -> None:
        async with host(open_tap):
            assert await taps.bridge_of("vf0") is None
            assert await taps.bridge_exists("br0")
            assert not await taps.bridge_exists("br1")
            assert not await taps.bridge_exists("up0"), "no bridge, though it is there"
            assert await taps.link_exists("up0")
            await taps.join("vf0", "br0")
            assert await taps.bridge_of("vf0") == "br0"
            assert await taps.uplinks("br0") == ["up0"]
            with pytest.raises(GuestError, match="no network interface br9"):
                await taps.join("vf0", "br9")
            with pytest.raises(GuestError, match="could not be put into bridge up0"):
                await taps.join("vf0", "up0")

    in_namespace(scenario)


def test_draw_moves_a_learned_address_to_the_tap(
    in_namespace: InNamespace, open_tap: OpenTap
) -> None:
    async def scenario() -> None:
        async with host(open_tap) as (tap, far):
            await taps.join("vf0", "br0")
            # The bridge learns the guest on its uplink, as a destination's bridge has.
            far.send(b"\xff" * 6 + RAW + b"\x08\x06".ljust(48, b"\0"))
            assert (await where_is(MAC))[0] == "up0"
            to_guest = RAW + PEER + b"\x88\xb5" + b"before".ljust(46, b"\0")
            far.send(to_guest)

            with await Announcer.prepare(mac=MAC, tap="vf0", bridge="br0") as announcer:
                assert announcer.draw(["10.77.0.2", "fe80::5054:ff:fe77:10"]) == []
                port, state = await where_is(MAC)
                assert port == "vf0"
                assert not state & NTF_PERMANENT_STATE, "would mean the host's own address"
                heard = await from_guest(far, 4)
                assert [f[12:14].hex() for f in heard] == ["8035", "0806", "0806", "86dd"]

                far.send(to_guest.replace(b"before", b"after "))
                seen = []
                while b"after" not in b"".join(seen):
                    seen.append(os.read(tap, 2048))
                assert b"before" not in b"".join(seen), "came in while the bridge knew better"
                assert announcer.draw([]) == [], "may be called again"

    in_namespace(scenario)


def test_draw_says_what_did_not_work(in_namespace: InNamespace, open_tap: OpenTap) -> None:
    async def scenario() -> None:
        async with host(open_tap):
            await taps.join("vf0", "br0")
            with await Announcer.prepare(mac=MAC, tap="vf0", bridge="br0") as announcer:
                async with AsyncIPRoute() as netlink:
                    index = (await netlink.link_lookup(ifname="up0"))[0]
                    await netlink.link("set", index=index, state="down")
                    index = (await netlink.link_lookup(ifname="vf0"))[0]
                    await netlink.link("set", index=index, nomaster=True, master=0)
                problems = announcer.draw(["10.77.0.2"])
            assert len(problems) == 2
            assert "vf0" in problems[0]
            assert "up0" in problems[1]

    in_namespace(scenario)


def test_addresses_are_learned_from_what_the_guest_sends(
    in_namespace: InNamespace, open_tap: OpenTap
) -> None:
    async def scenario() -> None:
        async with host(open_tap) as (tap, _):
            await taps.join("vf0", "br0")
            async with AddressWatch("vf0", MAC) as watch:
                assert watch.addresses() == []
                ipv6 = frames.IPv6Address("fe80::5054:ff:fe77:10")
                os.write(tap, frames.neighbour_advertisement(RAW, ipv6))
                os.write(tap, frames.gratuitous_arp(RAW, frames.IPv4Address("10.77.0.2"))[0])
                probe = frames.gratuitous_arp(RAW, frames.IPv4Address("0.0.0.0"))[0]
                os.write(tap, probe)
                stranger = frames.gratuitous_arp(PEER, frames.IPv4Address("10.77.0.9"))[0]
                os.write(tap, stranger)
                assert watch.addresses() == ["10.77.0.2", "fe80::5054:ff:fe77:10"]
            assert watch.addresses() == ["10.77.0.2", "fe80::5054:ff:fe77:10"]

    in_namespace(scenario)


def test_a_flood_does_not_hide_a_later_address(
    in_namespace: InNamespace, open_tap: OpenTap
) -> None:
    async def scenario() -> None:
        async with host(open_tap) as (tap, _):
            await taps.join("vf0", "br0")
            async with AddressWatch("vf0", MAC) as watch:
                first = frames.gratuitous_arp(RAW, frames.IPv4Address("10.77.0.2"))[0]
                for _ in range(5000):
                    os.write(tap, first)
                for _ in range(5000 // 128 + 1):
                    assert watch.addresses() == ["10.77.0.2"]
                os.write(tap, frames.gratuitous_arp(RAW, frames.IPv4Address("10.77.0.3"))[0])
                assert watch.addresses() == ["10.77.0.2", "10.77.0.3"]

    in_namespace(scenario)


def test_neighbour_table_is_read(in_namespace: InNamespace, open_tap: OpenTap) -> None:
    async def scenario() -> None:
        async with host(open_tap):
            await taps.join("vf0", "br0")
            async with AsyncIPRoute() as netlink:
                index = (await netlink.link_lookup(ifname="br0"))[0]
                await netlink.addr("add", index=index, address="10.77.0.7", prefixlen=24)
                await netlink.neigh(
                    "add", dst="10.77.0.2", lladdr=MAC, ifindex=index, state="reachable"
                )
            async with AddressWatch("vf0", MAC.upper()) as watch:
                assert watch.addresses() == ["10.77.0.2"]

    in_namespace(scenario)
