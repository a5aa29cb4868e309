"""The dead man's switch of a daemon: a process of its own that undoes its moves when it dies.

A daemon killed while a guest is stopped could continue it no more. So a small process holds the
read end of a pipe. The daemon writes its will for a move there before every step that changes what
must be undone; when the pipe ends, the last will of every move not dismissed is carried out.

What needs no will: the userfaultfd at the source is the daemon's alone, so the kernel itself takes
the write protection away when it dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import traceback
from pathlib import Path

import msgspec

from vmferry.engine import doubt, verdict
from vmferry.engine.doubt import Doubt
from vmferry.engine.fence import end_keeper, has_ended, kill_process
from vmferry.engine.giveback import leave_as_it_was
from vmferry.engine.verdict import Owed
from vmferry.guest.process import start_time_of


class GiveBack(msgspec.Struct, frozen=True, tag="give-back"):
    """Source, before the commit: if the guest's QEMU lives, leave it as it was, let the keeper go,
    and owe the destination the word that it is not the guest's host.

    If it does not live, the commit has happened: the keeper stays, and with `committing` the
    destination is owed the commit.
    """

    move: str
    peer: str
    verdicts: str
    qmp: str
    pid: int
    start_time: int
    resume: bool
    keeper: int = 0
    committing: bool = False
    """The kill is about to begin, and no page is missing at the destination."""


class Discard(msgspec.Struct, frozen=True, tag="discard"):
    """Destination, before it may own the guest: kill the waiting QEMU, remove its files,
    which lie in one directory."""

    pid: int
    start_time: int
    directory: str


class Keep(msgspec.Struct, frozen=True, tag="keep"):
    """Destination, from Loaded on: the next daemon answers for the guest; if the commit has been
    heard, it is ours and is run now."""

    doubts: str
    doubt: Doubt


Action = GiveBack | Discard | Keep


class Will(msgspec.Struct, frozen=True):
    """What is to be done for one move; no actions: nothing any more."""

    move: str
    actions: list[Action]


class DeadMan:
    """The daemon's end of the switch: one for all its moves."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def arm(cls, state_dir: Path) -> DeadMan:
        """Starts the process; it does nothing until there is a will."""
        with (state_dir / "deadman.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "vmferry.engine.deadman",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
            )
        return cls(process)

    def will(self, move: str, *actions: Action) -> None:
        """Replaces the will for one move. Shorter than PIPE_BUF and written at once by the
        transport while its buffer is empty: it is whole or absent."""
        pipe = self._process.stdin
        assert pipe is not None
        if not pipe.is_closing():
            pipe.write(msgspec.json.encode(Will(move, list(actions))) + b"\n")

    def dismiss(self, move: str) -> None:
        """The move is over and nothing of it is left to undo."""
        self.will(move)

    async def close(self) -> None:
        """Ends the process. Whatever will is left is carried out: a daemon that ends in order
        has dismissed its moves before."""
        pipe = self._process.stdin
        assert pipe is not None
        with contextlib.suppress(ConnectionError):
            pipe.close()
            await pipe.wait_closed()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(5):
                await self._process.wait()


def main() -> None:
    """Reads wills until the pipe ends, then carries out those that are left."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    wills: dict[str, Will] = {}
    rest = b""
    while chunk := os.read(0, 65536):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            will = msgspec.json.decode(line, type=Will)
            wills[will.move] = will
    asyncio.run(_carry_out_all([action for will in wills.values() for action in will.actions]))


async def _carry_out_all(actions: list[Action]) -> None:
    """At the same time, so that a guest that does not answer keeps no other one waiting."""
    for result in await asyncio.gather(*map(_carry_out, actions), return_exceptions=True):
        if isinstance(result, BaseException):
            traceback.print_exception(result)


async def _carry_out(action: Action) -> None:
    match action:
        case GiveBack():
            await _give_back(action)
        case Discard():
            await kill_process(action.pid, action.start_time)
            shutil.rmtree(action.directory, ignore_errors=True)
        case Keep():
            doubt.keep(Path(action.doubts), action.doubt)
            if action.doubt.committed:
                guest = action.doubt
                await leave_as_it_was(guest.qmp, guest.pid, guest.start_time, resume=guest.resume)


async def _give_back(will: GiveBack) -> None:
    if await leave_as_it_was(will.qmp, will.pid, will.start_time, resume=will.resume):
        if will.keeper:
            end_keeper(will.pid, will.start_time, will.keeper)
        verdict.owe(Path(will.verdicts), Owed(will.move, will.peer, committed=False))
    elif will.committing and has_ended(will.pid, will.start_time):
        owed = Owed(will.move, will.peer, True, will.keeper, start_time_of(will.keeper))
        verdict.owe(Path(will.verdicts), owed)


if __name__ == "__main__":
    main()
