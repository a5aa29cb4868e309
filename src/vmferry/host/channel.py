"""Typed messages over a byte stream: frames of a 4-byte length and a MessagePack body.

The same frames serve the control connection between two hosts (`Channel`), pairing, and the local
socket of the daemon; each names its message types and its bound.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import Generic, TypeVar

import msgspec

from vmferry.errors import PeerError
from vmferry.wire.messages import MAX_MESSAGE_BYTES, PeerMessage

Sent = TypeVar("Sent")
Received = TypeVar("Received")

SEND_LIMIT_S = 30.0
"""For one message to leave: the largest is tens of MB; a cut link is noticed long before."""

PEER_SILENCE_S = 8
"""A peer that acknowledges nothing, or answers no keep-alive probe, for so long is gone."""

STREAM_BUFFER_BYTES = 1 << 20
"""What asyncio reads ahead: large enough that a device state takes few turns of the loop."""

CLOSE_LIMIT_S = 2.0


def notice_silence(sock: socket.socket) -> None:
    """No batching delay, and an error within about `PEER_SILENCE_S` when the link is cut.

    TCP_USER_TIMEOUT bounds unacknowledged data; keep-alive probes cover an idle connection.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, PEER_SILENCE_S // 2)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, PEER_SILENCE_S // 2)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, PEER_SILENCE_S * 1000)


class Frames(Generic[Sent, Received]):
    """Messages of a closed set each way over an asyncio stream. One task receives at a time."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        decoder: msgspec.msgpack.Decoder[Received],
        *,
        other: str,
        bound: int,
    ) -> None:
        """`other` names the other end in error messages; `bound` is the longest body in bytes."""
        self._reader = reader
        self._writer = writer
        self._decoder = decoder
        self._encoder = msgspec.msgpack.Encoder()
        self._bound = bound
        self._body_length: int | None = None
        self.other = other

    async def send(self, message: Sent) -> None:
        """Hands the message to the kernel. PeerError when the link is broken or stuck."""
        body = self._encoder.encode(message)
        if len(body) > self._bound:
            raise PeerError(
                f"a message of {len(body)} bytes for {self.other} is longer than {self._bound}"
            )
        try:
            async with asyncio.timeout(SEND_LIMIT_S) as limit:
                self._writer.write(len(body).to_bytes(4, "big") + body)
                await self._writer.drain()
        except (OSError, RuntimeError) as error:
            # A dead link's ETIMEDOUT is a TimeoutError, too.
            if limit.expired():
                raise PeerError(f"{self.other} took nothing for {SEND_LIMIT_S:.0f} s") from error
            raise self._broken(error) from error

    async def receive(self, timeout_s: float | None) -> Received:
        """The next message. PeerError when none comes in `timeout_s` (None: no limit), the link
        ends, or what comes is too long or not a message. After a time-out receiving may go on."""
        body = await self.receive_body(timeout_s, self._bound)
        try:
            return self._decoder.decode(body)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, OverflowError) as error:
            raise PeerError(f"{self.other} sent something that is not a message") from error

    async def receive_body(self, timeout_s: float | None, bound: int) -> bytes:
        """The next message as it came, of at most `bound` bytes. PeerError as for `receive`."""
        try:
            async with asyncio.timeout(timeout_s) as limit:
                # Kept across a time-out or cancellation between header and body.
                if self._body_length is None:
                    self._body_length = int.from_bytes(await self._reader.readexactly(4), "big")
                if self._body_length > bound:
                    raise PeerError(
                        f"{self.other} announced a message of {self._body_length} bytes; "
                        f"at most {bound} are taken"
                    )
                body = await self._reader.readexactly(self._body_length)
        except asyncio.IncompleteReadError as error:
            raise PeerError(f"{self.other} closed the connection") from error
        except OSError as error:
            if limit.expired():
                raise PeerError(f"{self.other} said nothing for {timeout_s:g} s") from error
            raise self._broken(error) from error
        self._body_length = None
        return body

    def _broken(self, error: Exception) -> PeerError:
        reason = error.reason if isinstance(error, ssl.SSLError) else str(error)
        return PeerError(f"the connection to {self.other} broke ({reason or 'no reason given'})")

    async def close(self) -> None:
        """Twice is harmless; never raises for a broken link."""
        try:
            self._writer.close()
            async with asyncio.timeout(CLOSE_LIMIT_S):
                await self._writer.wait_closed()
        except (OSError, RuntimeError, TimeoutError):
            self._writer.transport.abort()


_PEER_DECODER = msgspec.msgpack.Decoder(PeerMessage)


class Channel(Frames[PeerMessage, PeerMessage]):
    """The control connection to a peer."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, other: str
    ) -> None:
        super().__init__(reader, writer, _PEER_DECODER, other=other, bound=MAX_MESSAGE_BYTES)
