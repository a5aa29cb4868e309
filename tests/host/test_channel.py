"""Frames of typed messages over a stream that may say anything."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmferry.errors import PeerError
from vmferry.host.channel import Channel
from vmferry.wire.messages import MAX_MESSAGE_BYTES, Aborted, DeviceState, Hello, Refuse


@asynccontextmanager
async def _channel() -> AsyncGenerator[tuple[Channel, asyncio.StreamWriter, asyncio.StreamReader]]:
    """A channel, and the raw other end of it."""
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=ours)
    raw_reader, raw_writer = await asyncio.open_connection(sock=theirs)
    channel = Channel(reader, writer, other="b")
    try:
        yield channel, raw_writer, raw_reader
    finally:
        await channel.close()
        await channel.close()
        raw_writer.close()


def _frame(body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + body


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"\x00" * 100,
        msgspec.msgpack.encode({"type": "no-such-message"}),
        msgspec.msgpack.encode({"type": "refuse"}),
        msgspec.msgpack.encode({"type": "refuse", "reason": 3}),
        msgspec.msgpack.encode({"type": "refuse", "reason": "r", "more": 1}),
        msgspec.msgpack.encode({"type": "aborted"})[:-1],
        b"\x91" * 100_000,
        b"\x82\xa4type\xa6refuse\xa6reason" + b"\x91" * 100_000,
        b"\x82\xa4type\xa6refuse\xa6reason\xa2\xff\xfe",
    ],
)
def test_what_is_not_a_message_is_an_error_of_the_peer(body: bytes) -> None:
    async def scenario() -> None:
        async with _channel() as (channel, raw, _):
            raw.write(_frame(body))
            with pytest.raises(PeerError, match="not a message"):
                await channel.receive(5)

    asyncio.run(scenario())


@given(st.binary(max_size=300))
def test_no_bytes_make_it_raise_anything_else(body: bytes) -> None:
    async def scenario() -> None:
        async with _channel() as (channel, raw, _):
            raw.write(_frame(body))
            raw.write_eof()
            with suppress(PeerError):
                await channel.receive(5)

    asyncio.run(scenario())


def test_a_longer_message_than_the_bound_is_refused_before_it_is_read() -> None:
    async def scenario() -> None:
        async with _channel() as (channel, raw, _):
            raw.write((MAX_MESSAGE_BYTES + 1).to_bytes(4, "big"))
            with pytest.raises(PeerError, match="at most"):
                await channel.receive(5)
            with pytest.raises(PeerError, match="longer"):
                await channel.send(DeviceState(data=bytes(MAX_MESSAGE_BYTES)))

    asyncio.run(scenario())


def test_the_end_of_the_stream_within_a_frame() -> None:
    async def scenario() -> None:
        async with _channel() as (channel, raw, _):
            raw.write(_frame(b"\x00" * 50)[:20])
            raw.write_eof()
            with pytest.raises(PeerError, match="b closed the connection"):
                await channel.receive(5)

    asyncio.run(scenario())


def test_a_time_out_within_a_frame_loses_nothing() -> None:
    async def scenario() -> None:
        async with _channel() as (channel, raw, _):
            frame = _frame(msgspec.msgpack.encode(Refuse(reason="no")))
            for piece in (frame[:2], frame[2:9]):
                raw.write(piece)
                with pytest.raises(PeerError, match="said nothing"):
                    await channel.receive(0.01)
            raw.write(frame[9:])
            assert await channel.receive(5) == Refuse(reason="no")

    asyncio.run(scenario())


def test_messages_keep_their_bounds_and_order() -> None:
    async def scenario() -> None:
        async with _channel() as (channel, raw, raw_reader):
            other = Channel(raw_reader, raw, other="a")
            messages = [
                Hello(protocol=1, software="x", host="a"),
                DeviceState(data=bytes(range(256)) * 16384),
                Aborted(),
            ]
            sending = asyncio.gather(*[channel.send(message) for message in messages])
            assert [await other.receive(5) for _ in messages] == messages
            await sending

    asyncio.run(scenario())


def test_a_dead_link_is_not_taken_for_a_silent_peer() -> None:
    """The kernel's ETIMEDOUT and the limit of a wait are both a TimeoutError."""

    async def scenario() -> None:
        async with _channel() as (channel, _, _):
            channel._reader.set_exception(TimeoutError(errno.ETIMEDOUT, "Connection timed out"))
            with pytest.raises(PeerError, match=r"broke .*Connection timed out"):
                await channel.receive(5)
            with pytest.raises(PeerError, match=r"broke .*Connection timed out"):
                await channel.send(Aborted())

    asyncio.run(scenario())


def test_a_broken_link_is_an_error_of_the_peer() -> None:
    async def scenario() -> None:
        async with _channel() as (channel, raw, _):
            raw.transport.abort()
            with pytest.raises(PeerError, match=r"connection"):
                await channel.receive(5)
            with pytest.raises(PeerError, match="broke"):
                await channel.send(DeviceState(data=bytes(1 << 22)))

    asyncio.run(scenario())
