"""Answers the command line over the socket in the state directory (api.py)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vmferry.errors import FerryError, PeerError, Refused
from vmferry.host import guests
from vmferry.host.api import (
    API_VERSION,
    MESSAGE_BYTES_MAX,
    REQUEST_LIMIT_S,
    REQUESTS,
    Answer,
    Cancel,
    Check,
    Done,
    Ended,
    Failed,
    Findings,
    GuestLine,
    Happened,
    Invite,
    List,
    Listing,
    Move,
    Pair,
    PeerLine,
    Request,
    Unpair,
)
from vmferry.host.channel import Frames
from vmferry.host.checks import host_findings
from vmferry.host.identity import Identity
from vmferry.host.links import Link
from vmferry.host.moves import Moves, RunningMove
from vmferry.host.pairing import PairingDesk, Token, join
from vmferry.host.peers import PeerBook
from vmferry.host.place import Place
from vmferry.wire.messages import Hello

if TYPE_CHECKING:
    from vmferry.engine.deadman import DeadMan

ANSWERS_QUEUED_MAX = 1000
"""Answers that a client has not taken yet; progress beyond that is left out, events are not."""

log = logging.getLogger(__name__)

Client = Frames[Answer, Request]


@dataclass(frozen=True)
class Commands:
    """What requests act on."""

    identity: Identity
    book: PeerBook
    pairing: PairingDesk
    moves: Moves
    hello: Hello
    place: Place
    state_dir: Path
    deadman: DeadMan

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One client, from its request to the final answer."""
        client: Client = Frames(
            reader, writer, REQUESTS, other="the command line", bound=MESSAGE_BYTES_MAX
        )
        try:
            request = await client.receive(REQUEST_LIMIT_S)
            try:
                if request.version != API_VERSION:
                    raise Refused(
                        f"this command is of another version than the daemon of "
                        f"{self.identity.name}; start the daemon anew"
                    )
                await client.send(await self._answer(client, request))
            except PeerError as error:
                await client.send(Failed(kind="PeerError", sentence=str(error)))
            except FerryError as error:
                await client.send(Failed(kind=type(error).__name__, sentence=str(error)))
            except Exception:
                log.exception("A command ended by a fault of vmferry's own.")
                sentence = "the daemon failed by a fault of its own; its log has the details"
                await client.send(Failed(kind="FerryError", sentence=sentence))
        except PeerError:
            # The client is gone, or said nothing that can be understood.
            log.debug("A command went away.", exc_info=True)
        finally:
            await client.close()

    async def _answer(self, client: Client, request: Request) -> Answer:
        answer: Answer
        match request:
            case Move():
                answer = await self._move(client, request)
            case Cancel():
                answer = await self._cancel(request)
            case List():
                answer = await self._list()
            case Check():
                answer = await self._check(request)
            case Invite():
                address, port = self.place.reached_by()
                answer = Done(text=str(self.pairing.invite(request.address or address, port)))
            case Pair():
                answer = await self._pair(request)
            case Unpair():
                self.book.remove(request.host)
                answer = Done(
                    text=f"{self.identity.name} trusts {request.host} no more; "
                    f"run `vmferry unpair {self.identity.name}` there, too"
                )
        return answer

    async def _pair(self, request: Pair) -> Answer:
        address, port = self.place.told_to_peers()
        token = Token.parse(request.token)
        peer = await join(token, self.identity, self.book, address, port)
        log.info("Paired with %s.", peer.name)
        return Done(text=f"{self.identity.name} and {peer.name} are paired")

    async def _move(self, client: Client, request: Move) -> Answer:
        from vmferry.engine.ports import MoveOrder
        from vmferry.strategies import METHODS, Bounds

        method = METHODS.get(request.strategy)
        if method is None:
            raise Refused(
                f"there is no strategy {request.strategy}; there are {', '.join(sorted(METHODS))}"
            )
        link = Link(self.identity, self.book.find(request.host), self.hello)
        self.moves.refuse_if_moving(request.guest)
        order = MoveOrder(
            guest=await guests.find(request.guest),
            method=method,
            bounds=Bounds(max_downtime_s=request.max_downtime_s),
            verify=request.verify,
            source_host=self.identity.name,
            destination_host=request.host,
            state_dir=self.state_dir,
            deadman=self.deadman,
        )
        answers: asyncio.Queue[Answer] = asyncio.Queue()

        def tell(answer: Answer) -> None:
            if isinstance(answer, Happened) or answers.qsize() < ANSWERS_QUEUED_MAX:
                answers.put_nowait(answer)

        running = self.moves.start(order, link, tell)
        forwarding = asyncio.create_task(_forward(answers, client))
        listening = asyncio.create_task(_cancel_on_request(client, running))
        try:
            report = await running.wait()
            answers.put_nowait(Ended(report=report))
            # The final answer is the caller's to send, after all that came before it.
            await forwarding
            return Ended(report=report)
        finally:
            for task in (forwarding, listening):
                task.cancel()
            await asyncio.gather(forwarding, listening, return_exceptions=True)

    async def _cancel(self, request: Cancel) -> Answer:
        running = self.moves.find(request.guest)
        running.cancel()
        report = await running.wait()
        name = report.guest
        if report.outcome == "moved":
            raise Refused(
                f"the move of {name} to {report.destination} was past its commit; "
                f"{name} runs at {report.destination}"
            )
        return Done(text=report.error)

    async def _list(self) -> Answer:
        moving = {one.order.guest.pid: one for one in self.moves.outgoing}
        lines = []
        for guest in await guests.all_guests():
            one = moving.get(guest.pid)
            state = f"moving to {one.order.destination_host}: {one.phase}" if one else "here"
            lines.append(GuestLine(_printable(guest.name), guest.pid, state))
        lines += [
            GuestLine(_printable(arrival.guest), 0, f"arriving from {arrival.source}")
            for arrival in self.moves.arriving
        ]
        address, port = self.place.reached_by()
        return Listing(
            host=self.identity.name,
            address=address,
            port=port,
            guests=lines,
            peers=[PeerLine(peer.name, peer.address, peer.port) for peer in self.book.all()],
        )

    async def _check(self, request: Check) -> Answer:
        link = Link(self.identity, self.book.find(request.host), self.hello)
        return Findings(findings=await host_findings(link))


def _printable(name: str) -> str:
    """A guest's name is its owner's to choose, and goes to a terminal."""
    return name if name.isprintable() else repr(name)


async def _forward(answers: asyncio.Queue[Answer], client: Client) -> None:
    """Sends what the move tells until its end; a client that went away ends nothing."""
    with contextlib.suppress(PeerError):
        while not isinstance(answer := await answers.get(), Ended):
            await client.send(answer)


async def _cancel_on_request(client: Client, running: RunningMove) -> None:
    with contextlib.suppress(PeerError):
        while True:
            # Without a limit: it lasts as long as the move, whose end cancels it.
            if isinstance(await client.receive(None), Cancel):
                running.cancel()
