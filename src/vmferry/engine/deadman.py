"""The dead man's switch of a move: a process of its own that undoes it when the daemon dies.

A daemon killed while the guest is stopped could continue it no more. So each move has a small
process that holds the read end of a pipe. The daemon writes its will there before every step that
changes what must be undone; when the pipe ends without a dismissal, the last will is carried out.

What needs no will: the userfaultfd at the source is the daemon's alone, so the kernel itself takes
the write protection away when it dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path

import msgspec

from vmferry.engine.fence import kill_process
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
    """Destination, before it may own the guest: kill the waiting QEMU, remove its files."""

    pid: int
    start_time: int
    files: list[str]


class Run(msgspec.Struct, frozen=True, tag="run"):
    """Destination, after the commit: the guest is ours, so it must run."""

    qmp: str
    pid: int
    start_time: int


Action = GiveBack | Discard | Run


class DeadMan:
    """The daemon's end of the switch."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def arm(cls, log: Path) -> DeadMan:
        """Starts the process; it does nothing until there is a will."""
        with log.open("ab") as stream:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "vmferry.engine.deadman",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=stream,
                start_new_session=True,
            )
        return cls(process)

    def will(self, *actions: Action) -> None:
        """Replaces the will. Shorter than PIPE_BUF and written at once: it is whole or absent."""
        pipe = self._process.stdin
        if pipe is None or pipe.is_closing():
            return
        pipe.write(msgspec.json.encode(list(actions)) + b"\n")

    async def dismiss(self) -> None:
        """The move is over and nothing is left to undo."""
        self.will()
        pipe = self._process.stdin
        if pipe is not None:
            with contextlib.suppress(ConnectionError):
                await pipe.drain()
                pipe.close()
                await pipe.wait_closed()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(5):
                await self._process.wait()


def main() -> None:
    """Reads wills until the pipe ends, then carries out the last."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    last = b"[]"
    rest = b""
    while chunk := os.read(0, 65536):
        *lines, rest = (rest + chunk).split(b"\n")
        last = lines[-1] if lines else last
    for action in msgspec.json.decode(last, type=list[Action]):
        asyncio.run(_carry_out(action))


async def _carry_out(action: Action) -> None:
    match action:
        case GiveBack():
            await _give_back(action)
        case Discard():
            await kill_process(action.pid, action.start_time)
            for file in action.files:
                Path(file).unlink(missing_ok=True)
        case Run():
            await _until_done(action.qmp, action.pid, action.start_time, resume=True)


async def _give_back(will: GiveBack) -> None:
    if await _until_done(will.qmp, will.pid, will.start_time, resume=will.resume) and will.keeper:
        with contextlib.suppress(ProcessLookupError):
            os.kill(will.keeper, signal.SIGKILL)


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
