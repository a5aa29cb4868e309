"""Draws a guest's traffic to this host at once (guests.md 4).

An announcement alone is not enough: this host's own bridge has learned the guest's MAC on its
uplink and drops what comes in there for it. So first the bridge is told that the MAC is behind the
tap, then the frames that move everybody else's tables leave by the uplinks. Done at the stop and
not at the resume: what arrives before the guest runs waits in the tap's queue.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Self

from vmferry.network import frames, taps

_ADDRESSES_MAX = 32
_NETLINK_ANSWER_S = 0.1

_RTM_NEWNEIGH = 28
_NLM_F_REQUEST_ACK = 0x1 | 0x4
_NLM_F_REPLACE_CREATE = 0x100 | 0x400
_NLMSG_ERROR = 2
_NUD_REACHABLE = 2
_NTF_MASTER = 4
_NDA_LLADDR = 2


class Announcer:
    """The sockets are made beforehand, so that `draw` at the stop costs less than a millisecond.

    Made with `await Announcer.prepare(...)`; `close()` it, or use it in a `with` block.
    """

    def __init__(self, mac: str, tap: str, uplinks: Sequence[str]) -> None:
        """OSError when an interface is missing or the right to raw sockets (CAP_NET_RAW)."""
        self._mac = frames.mac_bytes(mac)
        self._tap = tap
        self._ports: list[tuple[str, socket.socket]] = []
        self._forwarding = _forwarding_entry(self._mac, socket.if_nametoindex(tap))
        self._netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        try:
            self._netlink.settimeout(_NETLINK_ANSWER_S)
            for uplink in uplinks:
                # Protocol 0: nothing is ever received, so nothing is ever queued.
                port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
                self._ports.append((uplink, port))
                port.setblocking(False)
                port.bind((uplink, 0))
        except BaseException:
            self.close()
            raise

    @classmethod
    async def prepare(cls, *, mac: str, tap: str, bridge: str) -> Self:
        """For a tap that is a port of `bridge` on this host. GuestError: no such bridge."""
        return cls(mac, tap, await taps.uplinks(bridge))

    def draw(self, addresses: Sequence[str] = ()) -> list[str]:
        """Tells the bridge and the network that the guest is behind this host's tap.

        `addresses` are its IPv4 and IPv6 addresses; without any, switches still learn its port
        (RARP). Never raises, since nothing of it may stop a switch-over: it returns what did not
        work, a sentence each. May be called again.
        """
        problems = []
        try:
            self._add_forwarding_entry()
        except OSError as error:
            problems.append(f"No forwarding entry for {self._tap}: {error.strerror or error}.")
        words = self._frames(addresses)
        for uplink, port in self._ports:
            try:
                for frame in words:
                    port.send(frame)
            except OSError as error:
                problems.append(f"No announcement on {uplink}: {error.strerror or error}.")
        return problems

    def close(self) -> None:
        """Twice is harmless."""
        self._netlink.close()
        for _, port in self._ports:
            port.close()
        self._ports = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _add_forwarding_entry(self) -> None:
        self._netlink.send(self._forwarding)
        while True:
            answer = self._netlink.recv(4096)
            kind, _, sequence = struct.unpack_from("=HHI", answer, 4)
            if kind == _NLMSG_ERROR and sequence == 1:
                break
        (negative_errno,) = struct.unpack_from("=i", answer, 16)
        if negative_errno:
            raise OSError(-negative_errno, os.strerror(-negative_errno))

    def _frames(self, addresses: Sequence[str]) -> list[bytes]:
        words = [frames.rarp(self._mac)]
        for text in list(addresses)[:_ADDRESSES_MAX]:
            address: IPv4Address | IPv6Address = ip_address(text)
            if isinstance(address, IPv4Address):
                words.extend(frames.gratuitous_arp(self._mac, address))
            else:
                words.append(frames.neighbour_advertisement(self._mac, address))
        return words


def _forwarding_entry(mac: bytes, port_index: int) -> bytes:
    """`bridge fdb replace MAC dev PORT master dynamic`.

    Not permanent, that command's default: a permanent entry means the host's own address, and the
    guest would be cut off.
    """
    body = struct.pack(
        "=BxHiHBB", socket.AF_BRIDGE, 0, port_index, _NUD_REACHABLE, _NTF_MASTER, 0
    ) + struct.pack("=HH6sxx", 10, _NDA_LLADDR, mac)
    flags = _NLM_F_REQUEST_ACK | _NLM_F_REPLACE_CREATE
    return struct.pack("=IHHII", 16 + len(body), _RTM_NEWNEIGH, flags, 1, 0) + body
