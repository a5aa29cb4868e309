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
from pathlib import Path

import msgspec

from vmferry.engine.fence import end_keeper, kill_process
from vmferry.errors import FerryError, GuestError

ATTEMPTS = 50
"""A monitor is free again only when the dead daemon's socket has been closed; and a disk's lock
only when the destination's QEMU has gone."""


class GiveBack(msgspec.Struct, frozen=True, tag="give-back"):
    """Source, before the commit: if the guest's QEMU lives, leave it as it was; then let the
    keeper go. If it does not live, the commit has happened: touch nothing."""

    qmp: str
    pid: int
    start_time: int
    resume: bool
    keeper: int = 0


class Discard(msgspec.Struct, frozen=True, tag="discard"):
    """Destination, before it may own the guest: kill the waiting QEMU, remove its files,
    which lie in one directory."""

    pid: int
    start_time: int
    directory: str


class Run(msgspec.Struct, frozen=True, tag="run"):
    """Destination, after the commit: the guest is ours, so it must run."""

    qmp: str
    pid: int
    start_time: int


Action = GiveBack | Discard | Run


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
    for will in wills.values():
        for action in will.actions:
            asyncio.run(_carry_out(action))


async def _carry_out(action: Action) -> None:
    match action:
        case GiveBack():
            await _give_back(action)
        case Discard():
            await kill_process(action.pid, action.start_time)
            shutil.rmtree(action.directory, ignore_errors=True)
        case Run():
            await _until_done(action.qmp, action.pid, action.start_time, resume=True)


async def _give_back(will: GiveBack) -> None:
    if await _until_done(will.qmp, will.pid, will.start_time, resume=will.resume) and will.keeper:
        end_keeper(will.pid, will.start_time, will.keeper)


async def _until_done(qmp: str, pid: int, start_time: int, *, resume: bool) -> bool:
    """Leaves the guest as it was, running if `resume`; False if its process is gone."""
    from vmferry.guest.process import read_process
    from vmferry.guest.qemu import Qemu

    for _ in range(ATTEMPTS):
        try:
            process = read_process(pid)
            if process.start_time != start_time:
                return False
            guest = await Qemu.attach(process, qmp)
        except GuestError:
            await asyncio.sleep(0.1)
            continue
        except FerryError:
            return False
        try:
            if resume and not await guest.running():
                await guest.cont()
            await guest.close()
        except GuestError:
            await asyncio.sleep(0.1)
            continue
        return True
    return False


if __name__ == "__main__":
    main()
