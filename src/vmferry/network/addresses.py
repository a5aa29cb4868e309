"""Learns a guest's IP addresses from outside: from the frames that it sends and from this host's
neighbour table. The guest is asked nothing.
"""

from __future__ import annotations

import asyncio
import ctypes
import socket
import struct
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Self

from pyroute2.iproute.linux import AsyncIPRoute

from vmferry.network import frames

_ADDRESSES_MAX = 32
_RECEIVE_BUFFER_BYTES = 64 << 10
_SAMPLE_EVERY_S = 0.1
_SAMPLE_FRAMES_MAX = 128
_SNAPSHOT_BYTES = 96
_ETH_P_ALL = 3
_SO_ATTACH_FILTER = 26


class AddressWatch:
    """Watches what `mac` sends on `tap` from `start()` to `close()`.

    The work is bounded whatever the traffic: the kernel filters by source MAC, a small buffer
    drops the rest, and at most 128 frames are looked at every 0.1 s.
    """

    def __init__(self, tap: str, mac: str) -> None:
        """OSError when the tap is missing or the right to raw sockets (CAP_NET_RAW)."""
        self._mac = mac.lower()
        self._seen: dict[IPv4Address | IPv6Address, None] = {}
        self._task: asyncio.Task[None] | None = None
        # Protocol 0 until the filter is in place, so that not one foreign frame is queued.
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        try:
            self._socket.setblocking(False)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER_BYTES)
            _attach_filter(self._socket, frames.mac_bytes(mac))
            self._socket.bind((tap, _ETH_P_ALL))
        except BaseException:
            self._socket.close()
            raise

    async def start(self) -> Self:
        """Reads the neighbour table once and begins to listen."""
        async with AsyncIPRoute() as netlink:
            async for neighbour in await netlink.get_neighbours():
                if str(neighbour.get("lladdr")).lower() == self._mac and neighbour.get("dst"):
                    self._note(ip_address(neighbour.get("dst")))
        self._task = asyncio.create_task(self._sample_forever())
        return self

    def addresses(self) -> list[str]:
        """All addresses seen until now, IPv4 first."""
        self._sample()
        return [str(a) for a in sorted(self._seen, key=lambda a: (a.version, int(a)))]

    async def close(self) -> None:
        """Twice is harmless."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
            self._task = None
        self._socket.close()

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _sample_forever(self) -> None:
        while True:
            self._sample()
            await asyncio.sleep(_SAMPLE_EVERY_S)

    def _sample(self) -> None:
        for _ in range(_SAMPLE_FRAMES_MAX):
            try:
                frame = self._socket.recv(_SNAPSHOT_BYTES)
            except OSError:
                # Nothing more, or the tap has just gone: what was seen stays.
                return
            address = sender(frame)
            if address is not None:
                self._note(address)

    def _note(self, address: IPv4Address | IPv6Address) -> None:
        if len(self._seen) < _ADDRESSES_MAX and not (
            address.is_unspecified or address.is_multicast or address.is_loopback
        ):
            self._seen.setdefault(address)


def sender(frame: bytes) -> IPv4Address | IPv6Address | None:
    """Who sent this Ethernet frame: ARP sender, IPv4 or IPv6 source; None when it does not say."""
    if len(frame) < 14:
        return None
    (ethertype,) = struct.unpack_from("!H", frame, 12)
    if ethertype == frames.ETHERTYPE_ARP and len(frame) >= 32:
        return IPv4Address(frame[28:32])
    if ethertype == frames.ETHERTYPE_IPV4 and len(frame) >= 30:
        return IPv4Address(frame[26:30])
    if ethertype == frames.ETHERTYPE_IPV6 and len(frame) >= 38:
        return IPv6Address(frame[22:38])
    return None


def _attach_filter(listener: socket.socket, mac: bytes) -> None:
    """Classic BPF: source MAC is `mac`, and ARP, IPv4 or IPv6."""
    load_word, load_half, jump_if_equal, give = 0x20, 0x28, 0x15, 0x06
    program = [
        (load_word, 0, 0, 8),
        (jump_if_equal, 0, 7, int.from_bytes(mac[2:], "big")),
        (load_half, 0, 0, 6),
        (jump_if_equal, 0, 5, int.from_bytes(mac[:2], "big")),
        (load_half, 0, 0, 12),
        (jump_if_equal, 2, 0, frames.ETHERTYPE_ARP),
        (jump_if_equal, 1, 0, frames.ETHERTYPE_IPV4),
        (jump_if_equal, 0, 1, frames.ETHERTYPE_IPV6),
        (give, 0, 0, _SNAPSHOT_BYTES),
        (give, 0, 0, 0),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    prog = struct.pack("@HP", len(program), ctypes.addressof(code))
    listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, prog)
