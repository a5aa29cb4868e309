"""The way to a paired host: control connections and page streams that this host opens."""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import TYPE_CHECKING

from vmferry.errors import PeerError
from vmferry.host.channel import STREAM_BUFFER_BYTES, Channel, notice_silence
from vmferry.host.greeting import Kind, exchange_hello, preamble
from vmferry.host.identity import SERVER_NAME, Identity
from vmferry.host.peers import Peer
from vmferry.host.tls import client_context
from vmferry.wire.messages import Hello

if TYPE_CHECKING:
    from vmferry._core import Stream

CONNECT_LIMIT_S = 10.0
HANDSHAKE_LIMIT_S = 10.0
BULK_STREAMS_MAX = 16


async def connect(address: str, port: int, kind: Kind, other: str) -> socket.socket:
    """A connected non-blocking socket that has said what it is for. PeerError names `other`."""
    loop = asyncio.get_running_loop()
    refused: OSError | None = None
    try:
        async with asyncio.timeout(CONNECT_LIMIT_S):
            for family, _, _, _, target in await loop.getaddrinfo(
                address, port, type=socket.SOCK_STREAM
            ):
                sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
                try:
                    sock.setblocking(False)
                    notice_silence(sock)
                    await loop.sock_connect(sock, target)
                    await loop.sock_sendall(sock, preamble(kind))
                except OSError as error:
                    sock.close()
                    refused = error
                except BaseException:
                    sock.close()
                    raise
                else:
                    return sock
    except TimeoutError as error:
        raise PeerError(
            f"{other} did not answer at {address}:{port} within {CONNECT_LIMIT_S:.0f} s; "
            "is it up, and is its port reachable?"
        ) from error
    except OSError as error:
        raise PeerError(f"the address {address} of {other} cannot be found out") from error
    reason = refused.strerror if refused is not None else "no address"
    raise PeerError(
        f"{other} does not answer at {address}:{port} ({reason}); is `vmferry host` running there?"
    ) from refused


async def start_tls(
    sock: socket.socket, context: ssl.SSLContext
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """The client's handshake, on a socket that is taken over (closed if it fails: OSError)."""
    return await asyncio.open_connection(
        sock=sock,
        ssl=context,
        server_hostname=SERVER_NAME,
        ssl_handshake_timeout=HANDSHAKE_LIMIT_S,
        limit=STREAM_BUFFER_BYTES,
    )


class Link:
    """`vmferry.engine.ports.PeerLink` over the network."""

    def __init__(self, identity: Identity, peer: Peer, hello: Hello) -> None:
        self.name = peer.name
        self._identity = identity
        self._peer = peer
        self._hello = hello

    async def open_control(self) -> Channel:
        """A new control connection, Hello exchanged; PeerError says why there is none."""
        peer = self._peer
        sock = await connect(peer.address, peer.port, Kind.CONTROL, peer.name)
        try:
            reader, writer = await start_tls(sock, client_context(self._identity, peer))
        except OSError as error:
            raise self._handshake_failed(error) from error
        channel = Channel(reader, writer, other=peer.name)
        try:
            await exchange_hello(channel, self._hello)
        except BaseException as error:
            await channel.close()
            # In TLS 1.3 a client that the server refuses has a finished handshake all the same:
            # the refusal shows only here, as an alert or as the end of the stream.
            if isinstance(error.__cause__, (asyncio.IncompleteReadError, OSError)):
                raise PeerError(
                    f"{peer.name} closed the connection without a word; is {self._identity.name} "
                    "still paired there? If not, run `vmferry invite` there and "
                    "`vmferry pair TOKEN` here"
                ) from error
            raise
        return channel

    async def open_streams(self, token: bytes, bulk: int) -> tuple[list[Stream], Stream]:
        """`bulk` page streams and the urgent one, for the move that `token` (16 bytes) names."""
        if not 1 <= bulk <= BULK_STREAMS_MAX:
            raise ValueError(f"{bulk} bulk streams: 1 to {BULK_STREAMS_MAX} are possible")
        opening = [
            asyncio.ensure_future(self._open_stream(token, urgent))
            for urgent in [*[False] * bulk, True]
        ]
        try:
            await asyncio.gather(*opening)
        except BaseException:
            # A handshake under way is in a thread, which a cancellation does not reach: it ends
            # by its own limit, and its stream is dropped unused, which closes it.
            for task in opening:
                if not task.done():
                    task.cancel()
                elif not task.cancelled() and task.exception() is None:
                    task.result().close()
            raise
        *streams, urgent_stream = [task.result() for task in opening]
        return streams, urgent_stream

    async def _open_stream(self, token: bytes, urgent: bool) -> Stream:
        from vmferry._core import CoreError, Credentials, Stream

        peer = self._peer
        sock = await connect(peer.address, peer.port, Kind.PAGES, peer.name)
        sock.setblocking(True)
        credentials = Credentials(
            self._identity.certificate, self._identity.key, [peer.certificate.encode()]
        )
        try:
            return await asyncio.to_thread(
                Stream.connect, sock.detach(), credentials, token, urgent
            )
        except (CoreError, OSError) as error:
            raise PeerError(
                f"{peer.name} did not open a page stream at {peer.address}:{peer.port}"
            ) from error

    def _handshake_failed(self, error: OSError) -> PeerError:
        where = f"{self._peer.address}:{self._peer.port}"
        if isinstance(error, ssl.SSLCertVerificationError):
            return PeerError(
                f"what answers at {where} is not the {self._peer.name} that "
                f"{self._identity.name} was paired with: its certificate is another. If it was "
                f"set up anew, run `vmferry unpair {self._peer.name}` here and pair them again"
            )
        if isinstance(error, ssl.SSLError):
            return PeerError(
                f"what answers at {where} does not speak this version of vmferry; "
                f"is {self._peer.name}'s vmferry of another version?"
            )
        return PeerError(
            f"{self._peer.name} closed the connection at {where} before it was secured; "
            "its log says why"
        )
