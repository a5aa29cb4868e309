"""Ethernet frames that say where a machine is: gratuitous ARP (RFC 826, 5227), RARP (RFC 903)
and the unsolicited neighbour advertisement (RFC 4861, 7.2.6). Bytes in, bytes out.
"""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv6Address

ETHERTYPE_IPV4 = 0x0800
ETHERTYPE_ARP = 0x0806
ETHERTYPE_RARP = 0x8035
ETHERTYPE_IPV6 = 0x86DD

ARP_REQUEST = 1
ARP_REPLY = 2
RARP_REQUEST = 3

_BROADCAST = b"\xff" * 6
_ALL_NODES_MAC = bytes.fromhex("333300000001")
_ALL_NODES = IPv6Address("ff02::1")
_SHORTEST_FRAME = 60
_NEIGHBOUR_ADVERTISEMENT = 136
_OVERRIDE = 0x20000000
_TARGET_LINK_LAYER_ADDRESS = 2


def mac_bytes(mac: str) -> bytes:
    """Six bytes of `52:54:00:12:34:56`; ValueError when it is none."""
    raw = bytes.fromhex(mac.replace(":", "").replace("-", ""))
    if len(raw) != 6:
        raise ValueError(f"{mac} is no Ethernet address")
    return raw


def gratuitous_arp(mac: bytes, address: IPv4Address) -> tuple[bytes, bytes]:
    """The request form (as `arping -U`) and the reply form (as `arping -A`): some stacks update
    their tables on the one only, some on the other."""
    ip = address.packed
    return (
        _arp(ETHERTYPE_ARP, ARP_REQUEST, mac=mac, sender=ip, target_mac=_BROADCAST, target=ip),
        _arp(ETHERTYPE_ARP, ARP_REPLY, mac=mac, sender=ip, target_mac=mac, target=ip),
    )


def rarp(mac: bytes) -> bytes:
    """What QEMU itself announces: it teaches switches the port and says nothing of addresses."""
    nobody = bytes(4)
    return _arp(ETHERTYPE_RARP, RARP_REQUEST, mac=mac, sender=nobody, target_mac=mac, target=nobody)


def neighbour_advertisement(mac: bytes, address: IPv6Address) -> bytes:
    """Unsolicited, to all nodes, with the override flag."""
    body = struct.pack(
        "!BBHI16sBB6s",
        _NEIGHBOUR_ADVERTISEMENT,
        0,
        0,
        _OVERRIDE,
        address.packed,
        _TARGET_LINK_LAYER_ADDRESS,
        1,
        mac,
    )
    pseudo_header = address.packed + _ALL_NODES.packed + struct.pack("!IxxxB", len(body), 58)
    checksum = internet_checksum(pseudo_header + body)
    body = body[:2] + struct.pack("!H", checksum) + body[4:]
    header = struct.pack("!IHBB", 6 << 28, len(body), 58, 255) + address.packed + _ALL_NODES.packed
    return _ALL_NODES_MAC + mac + struct.pack("!H", ETHERTYPE_IPV6) + header + body


def internet_checksum(data: bytes) -> int:
    """RFC 1071; zero over data that holds its own checksum."""
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _arp(
    ethertype: int, operation: int, *, mac: bytes, sender: bytes, target_mac: bytes, target: bytes
) -> bytes:
    body = struct.pack(
        "!HHBBH6s4s6s4s", 1, ETHERTYPE_IPV4, 6, 4, operation, mac, sender, target_mac, target
    )
    frame = _BROADCAST + mac + struct.pack("!H", ethertype) + body
    return frame.ljust(_SHORTEST_FRAME, b"\0")
