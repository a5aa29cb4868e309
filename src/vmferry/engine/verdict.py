"""How a move ended, told on a new connection when the move's own connection broke near the commit.

The destination, once it has said Loaded, may not decide alone: the source may have been fenced a
moment later. It holds the guest paused, without a lock on anything, until the verdict comes. What
the source owes lies in a file until it has been delivered, so that neither a cut link nor the
death of the daemon loses it: the dead man's switch writes it then, and the next daemon delivers.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import msgspec

from vmferry.engine.fence import kill_process
from vmferry.engine.ports import PeerLink
from vmferry.errors import FerryError, PeerError
from vmferry.wire import messages as m

PERSISTENCE_S = 600.0
"""For how long a source that has committed waits for the answer before it reports doubt."""
RETRY_S = 0.5
ANSWER_LIMIT_S = 30.0


class Owed(msgspec.Struct, frozen=True):
    """A verdict that has not been delivered, and what is to be let go of when it has been."""

    move: str
    peer: str
    committed: bool
    keeper: int = 0
    keeper_start_time: int = 0


def folder(state_dir: Path) -> Path:
    """Where undelivered verdicts lie."""
    return state_dir / "verdicts"


def owe(directory: Path, owed: Owed) -> None:
    """Keeps a verdict until it is delivered. OSError."""
    keep_file(directory / owed.move, msgspec.json.encode(owed))


def keep_file(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all. OSError."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    fresh = path.with_suffix(f".{os.getpid()}.new")
    fresh.write_bytes(content)
    fresh.replace(path)


async def deliver_verdict(peer: PeerLink, move: str, *, committed: bool) -> m.Resumed | None:
    """Tries until the destination has answered; None when it did not, or knows of no such move."""
    loop = asyncio.get_running_loop()
    end = loop.time() + PERSISTENCE_S
    while loop.time() < end:
        try:
            answer = await _ask(peer, move, committed=committed)
        except FerryError:
            await asyncio.sleep(RETRY_S)
            continue
        return answer if isinstance(answer, m.Resumed) else None
    return None


async def deliver_owed(state_dir: Path, link: Callable[[str], PeerLink]) -> None:
    """Delivers what is owed, for as long as the daemon lives.

    `link` gives the way to a paired host, Refused when there is none of that name. A commit that
    the destination knows nothing of stays owed, with its keeper, until somebody has looked.
    """
    refused: set[str] = set()
    while True:
        paths = sorted(folder(state_dir).glob("[0-9a-f]*")) if folder(state_dir).is_dir() else []
        due = [path for path in paths if not path.suffix and path.name not in refused]
        results = await asyncio.gather(*(_deliver(path, link) for path in due))
        refused.update(path.name for path, done in zip(due, results, strict=True) if done is False)
        # A killed daemon's switch writes some while after the next daemon has begun.
        await asyncio.sleep(RETRY_S)


async def _deliver(path: Path, link: Callable[[str], PeerLink]) -> bool | None:
    """Whether the destination took the verdict; None when it could not be asked."""
    try:
        owed = msgspec.json.decode(path.read_bytes(), type=Owed)
        answer = await _ask(link(owed.peer), owed.move, committed=owed.committed)
    except (FerryError, OSError, msgspec.MsgspecError):
        return None
    if owed.committed:
        if not isinstance(answer, m.Resumed):
            return False
        if owed.keeper:
            await kill_process(owed.keeper, owed.keeper_start_time)
    path.unlink(missing_ok=True)
    return True


async def _ask(peer: PeerLink, move: str, *, committed: bool) -> m.PeerMessage:
    channel = await peer.open_control()
    try:
        await channel.send(m.Verdict(move=move, committed=committed))
        answer = await channel.receive(ANSWER_LIMIT_S)
    finally:
        with contextlib.suppress(PeerError):
            await channel.close()
    if not isinstance(answer, m.Resumed | m.Aborted | m.Refuse):
        raise PeerError(f"{peer.name} answered a verdict with something else")
    return answer
