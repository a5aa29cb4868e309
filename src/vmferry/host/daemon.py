"""The daemon of a host: one port for its peers, one local socket for commands, its moves.

Its end never ends a guest. A signal makes it undo the moves under way and then end; further signals
change nothing about that.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vmferry.errors import FerryError, PeerError, Refused
from vmferry.host.channel import Channel
from vmferry.host.checks import machine_findings
from vmferry.host.commands import Commands
from vmferry.host.desk import StreamDesk
from vmferry.host.greeting import own_hello
from vmferry.host.identity import load_or_create
from vmferry.host.links import Link
from vmferry.host.listener import Listener
from vmferry.host.moves import Moves
from vmferry.host.pairing import PairingDesk, check_host_name, format_address
from vmferry.host.peers import Peer, PeerBook
from vmferry.host.place import Place
from vmferry.host.state import occupy, socket_path
from vmferry.wire.messages import Hello, Offer, Refuse, Survey, Surveyed, Verdict

if TYPE_CHECKING:
    from vmferry.engine.deadman import DeadMan

FIRST_MESSAGE_LIMIT_S = 10.0
"""For a peer to say what its control connection is for, after the Hello."""
CLIENTS_LEAVE_LIMIT_S = 5.0
"""For commands to take their last answer when the daemon ends."""
WORKER_THREADS = 64
"""For calls into the core, which wait in their thread: some three for each move under way."""
ENDING_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What the user says at the start."""

    state_dir: Path
    name: str
    listen_address: str
    listen_port: int
    advertised: str = ""


class Daemon:
    """Assembled by `start`; `run` is its whole life."""

    def __init__(self, settings: Settings, hello: Hello | None = None) -> None:
        """`hello` is another than this version's own in tests only. Refused."""
        name = check_host_name(settings.name)
        self._settings = settings
        self._socket_path = socket_path(settings.state_dir)
        self._lock = occupy(settings.state_dir)
        self.identity = load_or_create(settings.state_dir, name)
        self.hello = hello or own_hello(name)
        self.book = PeerBook(settings.state_dir, self.identity)
        self.desk = StreamDesk()
        self.pairing = PairingDesk(self.identity, self.book, log.info)
        self.moves = Moves()
        self.place: Place | None = None
        self._listener = Listener(
            identity=self.identity,
            book=self.book,
            desk=self.desk,
            pairing=self.pairing,
            hello=self.hello,
            handler=self.serve_peer,
        )
        self._commands: asyncio.Server | None = None
        self._clients: set[asyncio.Task[None]] = set()
        self._deadman: DeadMan | None = None
        self._verdicts: asyncio.Task[None] | None = None

    async def run(self, ready: Callable[[str], None]) -> None:
        """Serves until a signal; `ready` is given a line when both sockets listen. Refused."""
        ending = asyncio.Event()
        loop = asyncio.get_running_loop()

        def on_signal(number: signal.Signals) -> None:
            if ending.is_set():
                log.warning("%s again: still undoing what is under way.", number.name)
            ending.set()

        loop.set_default_executor(ThreadPoolExecutor(WORKER_THREADS, "core"))
        for number in ENDING_SIGNALS:
            loop.add_signal_handler(number, on_signal, number)
        try:
            ready(await self.start())
            # Now, and not in the first move: it takes most of a second.
            await asyncio.to_thread(_load_engine)
            await ending.wait()
            log.info("Ending.")
        finally:
            await self.end()

    async def start(self) -> str:
        """Listens on both sockets; the line that says where. Refused."""
        settings = self._settings
        address, port = await self._listener.start(settings.listen_address, settings.listen_port)
        self.place = Place(address, port, settings.advertised)
        # Imported late, here and below: the engine needs the compiled core.
        from vmferry.engine.deadman import DeadMan

        self._deadman = await DeadMan.arm(settings.state_dir)
        self._verdicts = asyncio.create_task(self._settle_the_past())
        commands = Commands(
            identity=self.identity,
            book=self.book,
            pairing=self.pairing,
            moves=self.moves,
            hello=self.hello,
            place=self.place,
            state_dir=settings.state_dir,
            deadman=self._deadman,
        )

        def on_client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.create_task(commands.serve(reader, writer))
            self._clients.add(task)
            task.add_done_callback(self._clients.discard)

        old_mask = os.umask(0o177)
        try:
            # It takes the place of a socket that is there: a dead daemon's, since the lock is ours.
            self._commands = await asyncio.start_unix_server(on_client, self._socket_path)
        except OSError as error:
            raise Refused(
                f"the socket {self._socket_path} cannot be made ({error.strerror}); "
                "choose another state directory with --state"
            ) from error
        finally:
            os.umask(old_mask)
        return (
            f"{self.identity.name} listens on {format_address(address, port)}, "
            f"state in {settings.state_dir}"
        )

    async def end(self) -> None:
        """Undoes the moves under way, then closes everything."""
        await self._listener.stop_accepting()
        if self._commands is not None:
            self._commands.close()
            self._socket_path.unlink(missing_ok=True)
        await self.moves.end()
        await self._listener.close()
        if self._clients:
            _, late = await asyncio.wait(self._clients, timeout=CLIENTS_LEAVE_LIMIT_S)
            for task in late:
                task.cancel()
        if self._verdicts is not None:
            self._verdicts.cancel()
            await asyncio.gather(self._verdicts, return_exceptions=True)
        if self._deadman is not None:
            await self._deadman.close()
        os.close(self._lock)

    async def _settle_the_past(self) -> None:
        """What earlier daemons left undecided, and what this one will."""
        from vmferry.engine import doubt
        from vmferry.engine.verdict import deliver_owed

        state_dir = self._settings.state_dir
        await asyncio.to_thread(doubt.forget_the_dead, doubt.folder(state_dir))

        def link(peer: str) -> Link:
            return Link(self.identity, self.book.find(peer), self.hello)

        await deliver_owed(state_dir, link)

    async def serve_peer(self, channel: Channel, peer: Peer) -> None:
        """One control connection of a paired host, by its first message."""
        try:
            first = await channel.receive(FIRST_MESSAGE_LIMIT_S)
        except PeerError as error:
            if isinstance(error.__cause__, asyncio.IncompleteReadError):
                log.debug("%s only looked whether this host is there.", peer.name)
                return
            raise
        match first:
            case Offer():
                from vmferry.engine.destination import receive
                from vmferry.engine.ports import DestinationHost

                assert self._deadman is not None
                host = DestinationHost(self.identity.name, self._settings.state_dir, self._deadman)
                with self.moves.arrival(first.guest, peer.name):
                    await receive(channel, first, self.desk, host)
            case Verdict():
                from vmferry.engine.destination import settle

                await settle(channel, first, self._settings.state_dir)
            case Survey():
                await channel.send(Surveyed(findings=await asyncio.to_thread(machine_findings)))
            case _:
                reason = f"{self.identity.name} expected an offer first"
                await channel.send(Refuse(reason=reason))


def _load_engine() -> None:
    import vmferry.engine.destination
    import vmferry.engine.source  # noqa: F401


def run(settings: Settings, ready: Callable[[str], None]) -> None:
    """The daemon in the foreground, until a signal. Refused when it cannot start."""
    try:
        daemon = Daemon(settings)
    except OSError as error:
        raise FerryError(f"the daemon cannot start: {error}") from error
    asyncio.run(daemon.run(ready))
