"""Announcement frames, decoded field by field."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv6Address

import pytest

from vmferry.network import frames
from vmferry.network.addresses import sender

MAC = bytes.fromhex("525400770010")
IPV4 = IPv4Address("10.77.0.2")
IPV6 = IPv6Address("fe80::5054:ff:fe77:10")


def decode_arp(frame: bytes) -> dict[str, object]:
    destination, source, ethertype = struct.unpack_from("!6s6sH", frame)
    hardware, protocol, hlen, plen, operation, *rest = struct.unpack_from(
        "!HHBBH6s4s6s4s", frame, 14
    )
    assert (hardware, protocol, hlen, plen) == (1, 0x0800, 6, 4)
    assert len(frame) == 60
    return {
        "to": destination,
        "from": source,
        "type": ethertype,
        "op": operation,
        "sender": (rest[0], rest[1]),
        "target": (rest[2], rest[3]),
    }


def test_gratuitous_arp_has_both_forms() -> None:
    request, reply = frames.gratuitous_arp(MAC, IPV4)
    common = {"to": b"\xff" * 6, "from": MAC, "type": 0x0806, "sender": (MAC, IPV4.packed)}
    assert decode_arp(request) == common | {"op": 1, "target": (b"\xff" * 6, IPV4.packed)}
    assert decode_arp(reply) == common | {"op": 2, "target": (MAC, IPV4.packed)}


def test_rarp_names_no_address() -> None:
    assert decode_arp(frames.rarp(MAC)) == {
        "to": b"\xff" * 6,
        "from": MAC,
        "type": 0x8035,
        "op": 3,
        "sender": (MAC, bytes(4)),
        "target": (MAC, bytes(4)),
    }


def test_neighbour_advertisement() -> None:
    frame = frames.neighbour_advertisement(MAC, IPV6)
    assert struct.unpack_from("!6s6sH", frame) == (bytes.fromhex("333300000001"), MAC, 0x86DD)
    first, length, next_header, hop_limit, source, destination = struct.unpack_from(
        "!IHBB16s16s", frame, 14
    )
    assert first >> 28 == 6
    assert next_header == 58
    assert hop_limit == 255, "RFC 4861: others are dropped"
    assert source == IPV6.packed
    assert destination == IPv6Address("ff02::1").packed
    body = frame[54:]
    assert len(body) == length == 32
    kind, code, _, flags, target, option, units, mac = struct.unpack("!BBHI16sBB6s", body)
    assert (kind, code, flags) == (136, 0, 0x20000000)
    assert target == IPV6.packed
    assert (option, units, mac) == (2, 1, MAC)
    pseudo = source + destination + struct.pack("!IxxxB", length, 58)
    assert frames.internet_checksum(pseudo + body) == 0


def test_internet_checksum_of_rfc_1071() -> None:
    assert frames.internet_checksum(bytes.fromhex("0001f203f4f5f6f7")) == ~0xDDF2 & 0xFFFF


def test_sender_of_each_kind() -> None:
    assert sender(frames.gratuitous_arp(MAC, IPV4)[0]) == IPV4
    assert sender(frames.neighbour_advertisement(MAC, IPV6)) == IPV6
    ipv4 = bytes(12) + b"\x08\x00" + bytes(12) + IPV4.packed + bytes(4)
    assert sender(ipv4) == IPV4
    assert sender(ipv4[:20]) is None
    assert sender(frames.rarp(MAC)) is None
    assert sender(b"") is None


def test_bad_mac_is_refused() -> None:
    with pytest.raises(ValueError, match="no Ethernet address"):
        frames.mac_bytes("52:54:00")
