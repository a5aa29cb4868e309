"""The command line's side of the daemon's local socket (api.py)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

from vmferry import errors
from vmferry.host.api import ANSWERS, MESSAGE_BYTES_MAX, Answer, Failed, Line, Request
from vmferry.host.channel import Frames
from vmferry.host.state import socket_path

ANSWER_LIMIT_S = 120.0
"""For a command that is not a move; the longest is `cancel`, which waits for the undo."""

Daemon = Frames[Request, Answer]


@asynccontextmanager
async def connected(state_dir: Path) -> AsyncGenerator[Daemon]:
    """A connection to the daemon of `state_dir`. Refused when none runs there."""
    path = socket_path(state_dir)
    try:
        reader, writer = await asyncio.open_unix_connection(path)
    except PermissionError as error:
        raise errors.Refused(
            f"the daemon's socket {path} is another user's; run the command as that user"
        ) from error
    except OSError as error:
        raise errors.Refused(
            f"no daemon runs with the state directory {state_dir}; start one with `vmferry host`, "
            "or name its directory with --state"
        ) from error
    frames: Daemon = Frames(reader, writer, ANSWERS, other="the daemon", bound=MESSAGE_BYTES_MAX)
    try:
        yield frames
    finally:
        await frames.close()


def raise_failed(failed: Failed) -> None:
    """Raises what the daemon said as the error it was there."""
    kind = getattr(errors, failed.kind, errors.FerryError)
    raise kind(failed.sentence)


async def ask(state_dir: Path, request: Request, limit_s: float = ANSWER_LIMIT_S) -> Answer:
    """One request and its final answer. FerryError as the daemon says."""
    async with connected(state_dir) as daemon:
        await daemon.send(request)
        while True:
            answer = await daemon.receive(limit_s)
            if isinstance(answer, Failed):
                raise_failed(answer)
            if not isinstance(answer, Line):
                return answer
