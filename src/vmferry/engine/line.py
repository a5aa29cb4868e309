"""The control connection of one move: a channel joined to the protocol's state machine.

A pump reads all the time, so that an abort or a broken link is noticed at once, whatever the move
is doing at that moment.
"""

from __future__ import annotations

import asyncio
from typing import TypeVar

from vmferry.engine.ports import ChannelLike
from vmferry.errors import FerryError, MoveFailed, PeerError, Refused
from vmferry.wire import messages as m
from vmferry.wire.protocol import Conversation, ProtocolViolation, Side

M = TypeVar("M", bound=m.Message)

QUIET_S = 1e7
"""A move may go on for long without a control message; a dead peer is the channel's to notice."""


class Line:
    """Says and hears the messages of one move; refuses what its state does not allow."""

    def __init__(self, channel: ChannelLike, side: Side, peer: str) -> None:
        self.conversation = Conversation(side)
        self.peer = peer
        self._channel = channel
        self._inbox: asyncio.Queue[m.PeerMessage] = asyncio.Queue()
        self._broken: asyncio.Future[FerryError] = asyncio.get_running_loop().create_future()
        self._pump_task = asyncio.create_task(self._pump())

    def hold(self, message: m.PeerMessage) -> None:
        """Feeds a message that was read before this line existed (the Offer)."""
        self.conversation.hear(message)

    async def say(self, message: m.PeerMessage) -> None:
        """Sends; ProtocolViolation if the state forbids it, PeerError if the link is broken."""
        self.conversation.send(message)
        await self._channel.send(message)

    async def hear(self, kind: type[M], timeout_s: float) -> M:
        """The next message, which must be of this kind.

        Raises Refused or MoveFailed with the peer's reason when it gives up instead, PeerError
        when the link breaks or nothing comes in time.
        """
        try:
            async with asyncio.timeout(timeout_s):
                message = await self.next()
        except TimeoutError:
            raise PeerError(
                f"{self.peer} did not answer within {timeout_s:.0f} s (waiting for "
                f"`{kind.__struct_config__.tag}`)"
            ) from None
        if isinstance(message, m.Refuse):
            raise Refused(message.reason)
        if isinstance(message, m.LoadFailed | m.Abort):
            raise MoveFailed(message.reason)
        if not isinstance(message, kind):
            raise PeerError(f"{self.peer} sent a message out of turn")
        return message

    async def next(self) -> m.PeerMessage:
        """The next message of any kind; raises what broke the line when nothing is left to read."""
        if self._inbox.empty() and not self._broken.done():
            getter = asyncio.ensure_future(self._inbox.get())
            try:
                await asyncio.wait({getter, self._broken}, return_when=asyncio.FIRST_COMPLETED)
                if getter.done():
                    return getter.result()
            finally:
                getter.cancel()
        if not self._inbox.empty():
            return self._inbox.get_nowait()
        raise self._broken.result()

    @property
    def broken(self) -> FerryError | None:
        """What ended this line, if it has ended: a broken link or the peer's abort."""
        return self._broken.result() if self._broken.done() else None

    async def wait_broken(self) -> FerryError:
        """Returns when the line has ended, with the reason."""
        return await asyncio.shield(self._broken)

    async def close(self) -> None:
        """Ends the pump and the channel."""
        self._pump_task.cancel()
        await asyncio.gather(self._pump_task, return_exceptions=True)
        await self._channel.close()

    async def _pump(self) -> None:
        while True:
            try:
                message = await self._channel.receive(QUIET_S)
                if not self.conversation.hear(message):
                    continue
            except PeerError as error:
                self._end(error)
                return
            except ProtocolViolation as error:
                self._end(PeerError(f"{self.peer} broke the protocol: {error}"))
                return
            self._inbox.put_nowait(message)
            if isinstance(message, m.Abort):
                self._end(MoveFailed(message.reason))

    def _end(self, reason: FerryError) -> None:
        if not self._broken.done():
            self._broken.set_result(reason)
