"""The daemon's port under strangers, impostors and hosts of another version."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl

import pytest
from tests.host.daemons_in_process import Hosts

from vmferry.errors import PeerError
from vmferry.host import greeting, listener
from vmferry.host.channel import Channel
from vmferry.host.daemon import Daemon
from vmferry.host.greeting import Kind, own_hello, preamble
from vmferry.host.links import Link
from vmferry.host.peers import Peer
from vmferry.wire.messages import PROTOCOL_VERSION, Aborted, Hello, Refuse


def _place(daemon: Daemon) -> tuple[str, int]:
    assert daemon.place is not None
    return daemon.place.address, daemon.place.port


def _peer(daemon: Daemon) -> Peer:
    return Peer(daemon.identity.name, *_place(daemon), daemon.identity.certificate.decode())


def _link(source: Daemon, target: Daemon) -> Link:
    return Link(source.identity, _peer(target), source.hello)


async def _answers_its_peer(source: Daemon, target: Daemon) -> None:
    """`target` goes on serving."""
    channel = await _link(source, target).open_control()
    await channel.send(Aborted())
    assert isinstance(await channel.receive(5), Refuse)
    await channel.close()


async def _closed(sock: socket.socket) -> bytes:
    """What comes until the other side closes."""
    loop = asyncio.get_running_loop()
    received = b""
    async with asyncio.timeout(10):
        while piece := await _receive(loop, sock):
            received += piece
    sock.close()
    return received


async def _receive(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> bytes:
    try:
        return await loop.sock_recv(sock, 4096)
    except ConnectionResetError:
        return b""


async def _connect(daemon: Daemon, said: bytes = b"") -> socket.socket:
    sock = socket.socket()
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(sock, _place(daemon))
    await loop.sock_sendall(sock, said)
    return sock


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01" + bytes(200),
        b"vmferry\x02c",
        b"vmferry\x01x",
        preamble(Kind.CONTROL) + b"no TLS at all, and long enough to be looked at as a record",
        preamble(Kind.JOIN) + b"no TLS",
        preamble(Kind.PAGES) + b"no TLS",
    ],
)
def test_garbage_is_closed_and_others_are_served(hosts: Hosts, said: bytes) -> None:
    async def scenario() -> None:
        async with hosts.running():
            a, b = await hosts.start("a"), await hosts.start("b")
            await hosts.pair(a, b)
            await _closed(await _connect(b, said))
            await _answers_its_peer(a, b)

    asyncio.run(scenario())


@pytest.mark.parametrize("said", [b"", b"vmf", preamble(Kind.CONTROL), preamble(Kind.PAGES)])
def test_who_says_nothing_is_closed_within_the_limit(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    monkeypatch.setattr(greeting, "PREAMBLE_LIMIT_S", 0.2)
    monkeypatch.setattr(listener, "HANDSHAKE_LIMIT_S", 0.2)

    async def scenario() -> None:
        async with hosts.running():
            a, b = await hosts.start("a"), await hosts.start("b")
            await hosts.pair(a, b)
            silent = await _connect(b, said)
            await _answers_its_peer(a, b)
            assert await _closed(silent) == b""

    asyncio.run(scenario())


def test_a_flood_of_half_open_connections_keeps_nobody_out(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that only giving way can close one.
    monkeypatch.setattr(greeting, "PREAMBLE_LIMIT_S", 1000.0)

    async def scenario() -> None:
        async with hosts.running():
            a, b = await hosts.start("a"), await hosts.start("b")
            await hosts.pair(a, b)
            silent = [await _connect(b) for _ in range(listener.HALF_OPEN_MAX + 40)]
            await _answers_its_peer(a, b)
            # The oldest gave way.
            assert await _closed(silent[0]) == b""
            for sock in silent:
                sock.close()

    asyncio.run(scenario())


def test_a_third_certificate_is_told_that_it_is_not_paired(
    hosts: Hosts, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with hosts.running():
            a, b, c = [await hosts.start(name) for name in "abc"]
            await hosts.pair(a, b)
            with pytest.raises(PeerError, match="is c still paired there"):
                await _link(c, b).open_control()
            await _answers_its_peer(a, b)

    asyncio.run(scenario())
    assert "its certificate is not one of a paired host" in caplog.text


def test_an_unpaired_host_is_out_at_once(hosts: Hosts) -> None:
    async def scenario() -> None:
        async with hosts.running():
            a, b = await hosts.start("a"), await hosts.start("b")
            await hosts.pair(a, b)
            await _answers_its_peer(a, b)
            b.book.remove("a")
            with pytest.raises(PeerError, match="is a still paired there"):
                await _link(a, b).open_control()

    asyncio.run(scenario())


def test_no_certificate_is_refused(hosts: Hosts, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with hosts.running():
            a, b = await hosts.start("a"), await hosts.start("b")
            await hosts.pair(a, b)
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            sock = await _connect(b, preamble(Kind.CONTROL))
            reader, writer = await asyncio.open_connection(
                sock=sock, ssl=context, server_hostname="vmferry"
            )
            with pytest.raises((ssl.SSLError, ConnectionError, asyncio.IncompleteReadError)):
                await asyncio.wait_for(reader.readexactly(1), 5)
            writer.transport.abort()
            await _answers_its_peer(a, b)

    asyncio.run(scenario())
    assert "it shows no certificate" in caplog.text


def test_an_old_tls_is_refused(hosts: Hosts) -> None:
    async def scenario() -> None:
        async with hosts.running():
            a, b = await hosts.start("a"), await hosts.start("b")
            await hosts.pair(a, b)
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.load_verify_locations(cadata=b.identity.certificate.decode())
            context.load_cert_chain(a.identity.certificate_file, a.identity.key_file)
            context.maximum_version = ssl.TLSVersion.TLSv1_2
            sock = await _connect(b, preamble(Kind.CONTROL))
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await asyncio.open_connection(sock=sock, ssl=context, server_hostname="vmferry")

    asyncio.run(scenario())


def test_an_impostor_at_the_address_is_found_out(hosts: Hosts) -> None:
    async def scenario() -> None:
        async with hosts.running():
            a, b, impostor = [await hosts.start(name) for name in ("a", "b", "impostor")]
            await hosts.pair(a, b)
            await hosts.pair(a, impostor)
            wrong = Peer("b", *_place(impostor), b.identity.certificate.decode())
            with pytest.raises(PeerError, match="its certificate is another"):
                await Link(a.identity, wrong, a.hello).open_control()

    asyncio.run(scenario())


def test_nobody_there_is_said_so(hosts: Hosts) -> None:
    async def scenario() -> None:
        async with hosts.running():
            a, b = await hosts.start("a"), await hosts.start("b")
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = free.getsockname()[1]
            gone = Peer("b", "127.0.0.1", port, b.identity.certificate.decode())
            with pytest.raises(PeerError, match=r"is `vmferry host` running there"):
                await Link(a.identity, gone, a.hello).open_control()

    asyncio.run(scenario())


def test_another_program_there_is_said_so(hosts: Hosts) -> None:
    async def chat(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH_9.2\r\n")
        await reader.read()
        writer.close()

    async def scenario() -> None:
        async with hosts.running(), await asyncio.start_server(chat, "127.0.0.1", 0) as server:
            a, b = await hosts.start("a"), await hosts.start("b")
            port = server.sockets[0].getsockname()[1]
            wrong = Peer("b", "127.0.0.1", port, b.identity.certificate.decode())
            with pytest.raises(PeerError, match="does not speak this version of vmferry"):
                await Link(a.identity, wrong, a.hello).open_control()

    asyncio.run(scenario())


def test_unlike_protocols_are_told_on_both_sides(
    hosts: Hosts, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    async def scenario() -> None:
        async with hosts.running():
            a = await hosts.start("a")
            newer = Hello(protocol=PROTOCOL_VERSION + 1, software="9.9", host="b")
            b = await hosts.start("b", newer)
            await hosts.pair(a, b)
            with pytest.raises(PeerError) as caught:
                await _link(a, b).open_control()
            assert f"b speaks protocol {PROTOCOL_VERSION + 1} (vmferry 9.9)" in str(caught.value)
            assert f"a speaks {PROTOCOL_VERSION}" in str(caught.value)
            with pytest.raises(PeerError, match="same version"):
                await _link(b, a).open_control()

    asyncio.run(scenario())
    told = [
        record.getMessage()
        for record in caplog.records
        if "speaks protocol" in record.msg % record.args
    ]
    assert any(f"a speaks protocol {PROTOCOL_VERSION}" in text for text in told)
    assert any(f"b speaks protocol {PROTOCOL_VERSION + 1}" in text for text in told)


def test_both_ends_notice_a_cut_link(hosts: Hosts) -> None:
    async def scenario() -> None:
        async with hosts.running():
            a, b = await hosts.start("a"), await hosts.start("b")
            await hosts.pair(a, b)
            ends = []
            arrived = asyncio.Event()

            async def keep(channel: Channel, peer: Peer) -> None:
                ends.append(channel)
                arrived.set()
                await channel.receive(5)

            b._listener._handler = keep
            ends.append(await _link(a, b).open_control())
            await arrived.wait()
            for channel in ends:
                sock = channel._writer.get_extra_info("socket")
                options = [
                    sock.getsockopt(socket.IPPROTO_TCP, option)
                    for option in (
                        socket.TCP_USER_TIMEOUT,
                        socket.TCP_KEEPIDLE,
                        socket.TCP_KEEPINTVL,
                        socket.TCP_KEEPCNT,
                        socket.TCP_NODELAY,
                    )
                ]
                assert options == [8000, 4, 1, 4, 1]
                assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            await ends[1].close()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "frame",
    [
        (1 << 31).to_bytes(4, "big"),
        (3).to_bytes(4, "big") + b"\xc1\xc1\xc1",
        (100_000).to_bytes(4, "big") + b"\x91" * 100_000,
    ],
)
def test_a_paired_host_that_talks_nonsense_is_closed(hosts: Hosts, frame: bytes) -> None:
    async def scenario() -> None:
        async with hosts.running():
            a, b = await hosts.start("a"), await hosts.start("b")
            await hosts.pair(a, b)
            channel = await _link(a, b).open_control()
            channel._writer.write(frame)
            with pytest.raises(PeerError, match=r"closed the connection|broke"):
                await channel.receive(5)
            await channel.close()
            await _answers_its_peer(a, b)

    asyncio.run(scenario())


def test_a_first_message_that_is_no_offer_is_answered(hosts: Hosts) -> None:
    async def scenario() -> None:
        async with hosts.running():
            a, b = await hosts.start("a"), await hosts.start("b")
            await hosts.pair(a, b)
            channel = await _link(a, b).open_control()
            await channel.send(own_hello("a"))
            answer = await channel.receive(5)
            assert isinstance(answer, Refuse)
            assert "expected an offer" in answer.reason
            await channel.close()

    asyncio.run(scenario())
