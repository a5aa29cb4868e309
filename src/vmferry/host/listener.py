"""What comes in from other hosts: one TCP port for control, pages and pairing (greeting.py)."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

from vmferry.errors import FerryError, PeerError, Refused
from vmferry.host.channel import STREAM_BUFFER_BYTES, Channel, notice_silence
from vmferry.host.desk import StreamDesk
from vmferry.host.greeting import Kind, exchange_hello, read_preamble
from vmferry.host.identity import Identity
from vmferry.host.links import HANDSHAKE_LIMIT_S
from vmferry.host.pairing import PairingDesk
from vmferry.host.peers import Peer, PeerBook
from vmferry.host.tls import joining_server_context, server_context
from vmferry.wire.messages import Hello

HALF_OPEN_MAX = 64
"""Connections that have not proven who they are; the oldest gives way to a new one."""

STREAM_HANDSHAKES_MAX = 20
"""Page streams in their handshake, each in a thread of its own."""

BACKLOG = 64

Handler = Callable[[Channel, Peer], Awaitable[None]]
"""Serves one control connection to its end; the listener closes it then."""

log = logging.getLogger(__name__)


class Listener:
    """The daemon's port. Whatever a stranger sends ends that connection and nothing else."""

    def __init__(
        self,
        *,
        identity: Identity,
        book: PeerBook,
        desk: StreamDesk,
        pairing: PairingDesk,
        hello: Hello,
        handler: Handler,
    ) -> None:
        self._identity = identity
        self._book = book
        self._desk = desk
        self._pairing = pairing
        self._hello = hello
        self._handler = handler
        self._half_open: dict[asyncio.Task[None], None] = {}
        self._serving: set[asyncio.Task[None]] = set()
        self._threads = ThreadPoolExecutor(STREAM_HANDSHAKES_MAX, "page-stream")
        self._socket: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None

    async def start(self, address: str, port: int) -> tuple[str, int]:
        """Listens; the address and port it got. Refused when they cannot be had."""
        loop = asyncio.get_running_loop()
        try:
            family, _, _, _, target = (
                await loop.getaddrinfo(
                    address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
                )
            )[0]
            sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            try:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
                sock.bind(target)
                sock.listen(BACKLOG)
                sock.setblocking(False)
            except BaseException:
                sock.close()
                raise
        except OSError as error:
            raise Refused(
                f"cannot listen on {address}:{port} ({error.strerror or error}); "
                "choose another address or port with --listen"
            ) from error
        self._socket = sock
        self._accepting = asyncio.create_task(self._accept(sock))
        return sock.getsockname()[:2]

    async def stop_accepting(self) -> None:
        """No new connections; those that serve go on."""
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.wait({self._accepting})
        if self._socket is not None:
            self._socket.close()
        for task in list(self._half_open):
            task.cancel()

    async def close(self) -> None:
        """Ends everything; handlers are cancelled once and waited for."""
        await self.stop_accepting()
        for task in self._serving:
            task.cancel()
        pending = {*self._serving, *self._half_open}
        if pending:
            await asyncio.wait(pending)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, address = await loop.sock_accept(listening)
            except OSError as error:
                # Out of descriptors (or the like): those in use come free again by their limits.
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    log.warning("No connection can be accepted: %s.", error.strerror)
                    await asyncio.sleep(0.1)
                continue
            if len(self._half_open) >= HALF_OPEN_MAX:
                next(iter(self._half_open)).cancel()
            task = asyncio.create_task(self._greet(sock, address[0]))
            self._half_open[task] = None
            task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._half_open.pop(task, None)
        self._serving.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("A connection ended by a fault of vmferry's own.", exc_info=task.exception())

    async def _greet(self, sock: socket.socket, address: str) -> None:
        try:
            try:
                notice_silence(sock)
                kind = await read_preamble(sock)
            except BaseException:
                sock.close()
                raise
            # From here on the socket is its taker's, which closes it whatever happens.
            if kind is Kind.PAGES:
                await self._take_stream(sock)
            elif kind is Kind.JOIN:
                await self._let_join(sock)
            else:
                await self._serve_control(sock)
        except (FerryError, OSError) as error:
            log.warning("Connection from %s closed: %s", address, _reason(error))

    async def _serve_control(self, sock: socket.socket) -> None:
        reader, writer = await _secure(
            sock, lambda: server_context(self._identity, self._book.all())
        )
        peer = self._peer_of(writer)
        channel = Channel(reader, writer, other=peer.name)
        try:
            await exchange_hello(channel, self._hello)
            task = asyncio.current_task()
            assert task is not None
            self._half_open.pop(task)
            self._serving.add(task)
            await self._handler(channel, peer)
        finally:
            await channel.close()

    def _peer_of(self, writer: asyncio.StreamWriter) -> Peer:
        certificate = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        peer = self._book.by_fingerprint(hashlib.sha256(certificate).digest())
        if peer is None:
            writer.transport.abort()
            raise PeerError("its certificate is not one of a paired host any more")
        return peer

    async def _let_join(self, sock: socket.socket) -> None:
        if not self._pairing.is_open():
            sock.close()
            raise PeerError("it wants to pair, but no invitation is open here")
        reader, writer = await _secure(sock, lambda: joining_server_context(self._identity))
        await self._pairing.admit(reader, writer)

    async def _take_stream(self, sock: socket.socket) -> None:
        # Without somebody who waits, no thread is given to a stranger.
        if not self._desk.expects_any():
            sock.close()
            raise PeerError("it brings pages that nobody waits for")
        from vmferry._core import CoreError, Credentials, Stream

        peers = [peer.certificate.encode() for peer in self._book.all()]
        credentials = Credentials(self._identity.certificate, self._identity.key, peers)
        sock.setblocking(True)
        accepting = asyncio.get_running_loop().run_in_executor(
            self._threads, Stream.accept, sock.detach(), credentials
        )
        try:
            token, urgent, stream = await accepting
        except CoreError as error:
            raise PeerError(f"its page stream was refused ({error})") from error
        if not self._desk.deliver(token, urgent, stream):
            raise PeerError("it brought pages that nobody waits for any more")


async def _secure(
    sock: socket.socket, context: Callable[[], ssl.SSLContext]
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """The server's handshake on an accepted socket, which is taken over."""
    loop = asyncio.get_running_loop()
    try:
        server = context()
    except BaseException:
        sock.close()
        raise
    reader = asyncio.StreamReader(limit=STREAM_BUFFER_BYTES)
    protocol = asyncio.StreamReaderProtocol(reader)
    transport, _ = await loop.connect_accepted_socket(
        lambda: protocol, sock, ssl=server, ssl_handshake_timeout=HANDSHAKE_LIMIT_S
    )
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return "its certificate is not one of a paired host"
    if isinstance(error, ssl.SSLError) and "NOT_RETURN_A_CERTIFICATE" in (error.reason or ""):
        return "it shows no certificate"
    if isinstance(error, OSError):
        return f"it could not be secured ({getattr(error, 'reason', None) or error})"
    return str(error)
