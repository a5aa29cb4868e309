"""How a connection between two hosts begins.

In clear: `vmferry`, a version byte (of this opening alone), and the kind of connection. Then TLS;
on a control connection each side's first message is its Hello, whatever the protocol it speaks.
"""

from __future__ import annotations

import asyncio
import socket
from enum import Enum

import msgspec

from vmferry import __version__
from vmferry.errors import PeerError
from vmferry.host.channel import Channel
from vmferry.wire.messages import PROTOCOL_VERSION, Hello

MAGIC = b"vmferry"
OPENING_VERSION = 1
PREAMBLE_BYTES = len(MAGIC) + 2

PREAMBLE_LIMIT_S = 5.0
HELLO_LIMIT_S = 10.0
HELLO_BYTES_MAX = 4096
"""Of a Hello: read before it is known whether the peer speaks this protocol."""


class Kind(Enum):
    """What a connection is for; the last byte of the preamble."""

    CONTROL = b"c"
    PAGES = b"p"
    JOIN = b"j"


def preamble(kind: Kind) -> bytes:
    return MAGIC + bytes([OPENING_VERSION]) + kind.value


async def read_preamble(sock: socket.socket) -> Kind:
    """Reads exactly the preamble from a non-blocking socket, and nothing of the TLS after it.

    PeerError when something else comes, or nothing in time.
    """
    loop = asyncio.get_running_loop()
    received = b""
    try:
        async with asyncio.timeout(PREAMBLE_LIMIT_S):
            while len(received) < PREAMBLE_BYTES:
                piece = await loop.sock_recv(sock, PREAMBLE_BYTES - len(received))
                if not piece:
                    raise PeerError("it was closed before it said what it wants")
                received += piece
                if not received.startswith(MAGIC[: len(received)]):
                    raise PeerError("it does not speak vmferry's protocol")
    except TimeoutError as error:
        raise PeerError(f"it did not say what it wants within {PREAMBLE_LIMIT_S:.0f} s") from error
    except OSError as error:
        raise PeerError("it broke before it said what it wants") from error
    if received[len(MAGIC)] != OPENING_VERSION:
        raise PeerError(
            f"it opens in version {received[len(MAGIC)]} of the protocol, this host in "
            f"{OPENING_VERSION}: bring both to the same version of vmferry"
        )
    try:
        return Kind(received[-1:])
    except ValueError as error:
        raise PeerError("it asks for a kind of connection unknown here") from error


def own_hello(host: str) -> Hello:
    return Hello(protocol=PROTOCOL_VERSION, software=__version__, host=host)


class _AnyHello(msgspec.Struct, tag="hello"):
    """A Hello of any protocol version: later ones may hold more."""

    protocol: int
    software: str = "?"
    host: str = "?"


_ANY_HELLO = msgspec.msgpack.Decoder(_AnyHello)


async def exchange_hello(channel: Channel, own: Hello) -> None:
    """Both sides send first and read then, so that each can tell its user what does not fit.

    PeerError when the peer does not answer, or speaks another protocol.
    """
    await channel.send(own)
    body = await channel.receive_body(HELLO_LIMIT_S, HELLO_BYTES_MAX)
    try:
        hello = _ANY_HELLO.decode(body)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, OverflowError) as error:
        raise PeerError(f"{channel.other} began with something that is not a Hello") from error
    if hello.protocol != own.protocol:
        raise PeerError(
            f"{channel.other} speaks protocol {hello.protocol} (vmferry {hello.software}), "
            f"{own.host} speaks {own.protocol} (vmferry {own.software}): "
            "bring both hosts to the same version of vmferry"
        )
