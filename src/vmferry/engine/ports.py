"""What the engine asks of its surroundings, and what its surroundings ask of it.

The daemon (`vmferry.host`) implements these; the engine is written against them and knows
neither sockets nor peers' names.
"""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from vmferry._core import Stream
    from vmferry.engine.deadman import DeadMan
    from vmferry.guest.process import GuestProcess
    from vmferry.report.records import Event, Progress
    from vmferry.strategies import Bounds, Method
    from vmferry.wire.messages import PeerMessage


class ChannelLike(Protocol):
    """A control connection to a peer: both ends authenticated, Hello exchanged."""

    async def send(self, message: PeerMessage) -> None:
        """PeerError when the link is broken."""
        ...

    async def receive(self, timeout_s: float) -> PeerMessage:
        """The next message; PeerError when none comes in time, the link ends or it is garbage."""
        ...

    async def close(self) -> None:
        """Twice is harmless."""
        ...


class PeerLink(Protocol):
    """The way to a paired host."""

    name: str

    async def open_control(self) -> ChannelLike:
        """A new control connection, Hello exchanged; PeerError says why there is none."""
        ...

    async def open_streams(self, token: bytes, bulk: int) -> tuple[list[Stream], Stream]:
        """`bulk` page streams and the urgent one, for the move that `token` (16 bytes) names."""
        ...


class StreamDesk(Protocol):
    """Hands the page streams that arrive to the move they belong to."""

    def expect(self, token: bytes, bulk: int) -> Awaitable[tuple[list[Stream], Stream]]:
        """From this call on streams of `token` are let in; the awaitable gives them when `bulk`
        of them and the urgent one have come. Cancelling it closes what came and lets in no more;
        the time limit is the caller's."""
        ...


class Observer(Protocol):
    """Is told what a running move does. Calls are cheap and never raise."""

    def progress(self, progress: Progress) -> None: ...

    def event(self, event: Event) -> None: ...


@dataclass(frozen=True)
class MoveOrder:
    """One move as the user asked for it."""

    guest: GuestProcess
    method: Method
    bounds: Bounds
    verify: bool
    """Compare the whole memory of both sides."""
    source_host: str
    destination_host: str
    state_dir: Path
    deadman: DeadMan


@dataclass(frozen=True)
class DestinationHost:
    """This host as a destination."""

    name: str
    state_dir: Path
    deadman: DeadMan
