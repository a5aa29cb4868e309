"""Guests that a destination's daemon has left behind when it could not settle their moves.

From Loaded on this side may not decide (verdict.py), and from the commit on the source may still
ask. When the daemon dies or lets go there, the guest's whereabouts stay in a file, from which the
next daemon answers.
"""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import msgspec

from vmferry.engine.fence import has_ended, kill_process
from vmferry.engine.giveback import leave_as_it_was
from vmferry.engine.verdict import keep_file
from vmferry.wire import messages as m


class Doubt(msgspec.Struct, frozen=True):
    """A guest that waits here, or runs here already if `committed`."""

    move: str
    qmp: str
    pid: int
    start_time: int
    directory: str
    """Of its files; removed with it."""
    resume: bool
    """Whether it is to run after the commit: it ran before."""
    committed: bool = False


def folder(state_dir: Path) -> Path:
    """Where doubts lie."""
    return state_dir / "doubts"


def keep(directory: Path, doubt: Doubt) -> None:
    """Keeps a doubt for the next daemon. OSError."""
    keep_file(directory / doubt.move, msgspec.json.encode(doubt))


def forget_the_dead(directory: Path) -> None:
    """Removes doubts about processes that have ended."""
    for path in directory.glob("*") if directory.is_dir() else ():
        doubt = _read(path)
        if doubt is None or has_ended(doubt.pid, doubt.start_time):
            path.unlink(missing_ok=True)


async def settle(directory: Path, verdict: m.Verdict) -> m.Resumed | m.Aborted | m.Refuse:
    """Carries a verdict out on a guest that an earlier daemon has left, and answers."""
    path = directory / verdict.move
    doubt = await asyncio.to_thread(_read, path) if verdict.move.isalnum() else None
    if doubt is None or doubt.committed > verdict.committed:
        return m.Refuse(reason="no such move waits for a verdict here")
    if not verdict.committed:
        await kill_process(doubt.pid, doubt.start_time)
        await asyncio.to_thread(shutil.rmtree, doubt.directory, ignore_errors=True)
        path.unlink(missing_ok=True)
        return m.Aborted()
    # Its file stays: the answer may be lost, and be asked for again.
    if not await leave_as_it_was(doubt.qmp, doubt.pid, doubt.start_time, resume=doubt.resume):
        return m.Refuse(reason="the guest that waited here for a verdict does not run")
    return m.Resumed(ago_s=0.0, start_s=0.0)


def _read(path: Path) -> Doubt | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Doubt)
    except (OSError, msgspec.MsgspecError):
        return None
