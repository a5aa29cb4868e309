"""Page streams find the move that waits for them."""

from __future__ import annotations

import asyncio
import secrets
from typing import TYPE_CHECKING, cast

import pytest
from tests.host.daemons_in_process import Hosts

from vmferry.errors import PeerError
from vmferry.host.daemon import Daemon
from vmferry.host.desk import TOKEN_BYTES, StreamDesk
from vmferry.host.links import Link
from vmferry.host.peers import Peer

if TYPE_CHECKING:
    from vmferry._core import Stream

TOKEN = bytes(range(TOKEN_BYTES))


class FakeStream:
    """Remembers whether it was closed."""

    def __init__(self) -> None:
        self.closed = False

    def close(self) -> None:
        self.closed = True


def _deliver(desk: StreamDesk, token: bytes, urgent: bool, stream: FakeStream) -> bool:
    return desk.deliver(token, urgent, cast("Stream", stream))


def test_a_set_is_handed_over_when_it_is_whole() -> None:
    async def scenario() -> None:
        desk = StreamDesk()
        waiting = desk.expect(TOKEN, 2)
        bulk, urgent = [FakeStream(), FakeStream()], FakeStream()
        assert _deliver(desk, TOKEN, False, bulk[0])
        assert _deliver(desk, TOKEN, True, urgent)
        assert not waiting.done()
        assert _deliver(desk, TOKEN, False, bulk[1])
        assert await waiting == (bulk, urgent)
        assert not desk.expects_any()

    asyncio.run(scenario())


def test_what_nobody_waits_for_is_closed() -> None:
    async def scenario() -> None:
        desk = StreamDesk()
        waiting = desk.expect(TOKEN, 1)
        stray, second, urgent, more = [FakeStream() for _ in range(4)]
        assert not _deliver(desk, bytes(TOKEN_BYTES), False, stray)
        assert _deliver(desk, TOKEN, True, urgent)
        assert not _deliver(desk, TOKEN, True, second)
        assert _deliver(desk, TOKEN, False, FakeStream())
        assert not _deliver(desk, TOKEN, False, more)
        await waiting
        late = FakeStream()
        assert not _deliver(desk, TOKEN, False, late)
        assert [s.closed for s in (stray, second, more, late)] == [True] * 4
        assert not urgent.closed

    asyncio.run(scenario())


def test_a_time_out_closes_what_came() -> None:
    async def scenario() -> None:
        desk = StreamDesk()
        early = FakeStream()
        waiting = desk.expect(TOKEN, 2)
        _deliver(desk, TOKEN, False, early)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await waiting
        await asyncio.sleep(0)
        assert early.closed
        assert not desk.expects_any()

    asyncio.run(scenario())


def test_a_token_is_expected_once() -> None:
    async def scenario() -> None:
        desk = StreamDesk()
        desk.expect(TOKEN, 1)
        with pytest.raises(ValueError, match="once"):
            desk.expect(TOKEN, 1)
        with pytest.raises(ValueError, match="16 bytes"):
            desk.expect(b"short", 1)

    asyncio.run(scenario())


def _link(source: Daemon, target: Daemon) -> Link:
    assert target.place is not None
    certificate = target.identity.certificate.decode()
    peer = Peer(target.identity.name, target.place.address, target.place.port, certificate)
    return Link(source.identity, peer, source.hello)


def test_real_streams_come_through_the_port(hosts: Hosts) -> None:
    async def scenario() -> None:
        async with hosts.running():
            a, b = await hosts.start("a"), await hosts.start("b")
            await hosts.pair(a, b)
            token = secrets.token_bytes(TOKEN_BYTES)
            waiting = b.desk.expect(token, 3)
            bulk, urgent = await _link(a, b).open_streams(token, 3)
            async with asyncio.timeout(10):
                arrived, arrived_urgent = await waiting
            assert (len(bulk), len(arrived)) == (3, 3)
            for stream in (*bulk, urgent, *arrived, arrived_urgent):
                stream.close()

    asyncio.run(scenario())


def test_a_strangers_stream_is_refused_while_one_is_expected(hosts: Hosts) -> None:
    async def scenario() -> None:
        async with hosts.running():
            a, b, c = [await hosts.start(name) for name in "abc"]
            await hosts.pair(a, b)
            token = secrets.token_bytes(TOKEN_BYTES)
            waiting = b.desk.expect(token, 1)
            with pytest.raises(PeerError, match="did not open a page stream"):
                await _link(c, b).open_streams(token, 1)
            bulk, urgent = await _link(a, b).open_streams(token, 1)
            async with asyncio.timeout(10):
                arrived, arrived_urgent = await waiting
            for stream in (*bulk, urgent, *arrived, arrived_urgent):
                stream.close()

    asyncio.run(scenario())


def test_streams_without_anybody_waiting_are_refused(hosts: Hosts) -> None:
    async def scenario() -> None:
        async with hosts.running():
            a, b = await hosts.start("a"), await hosts.start("b")
            await hosts.pair(a, b)
            with pytest.raises(PeerError, match="did not open a page stream"):
                await _link(a, b).open_streams(bytes(TOKEN_BYTES), 2)

    asyncio.run(scenario())
