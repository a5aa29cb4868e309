"""Starting a QEMU that outlives us."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

from vmferry.errors import FerryError, GuestError, Refused
from vmferry.guest.monitor import Monitor, peer_pid
from vmferry.guest.options import qmp_sockets
from vmferry.guest.process import GuestProcess, read_process

START_LIMIT_S = 30.0
END_LIMIT_S = 2.0
"""For a process that has closed its monitor to be gone."""
POLL_S = 0.003
LAST_WORDS_BYTES = 2000


async def launch(
    argv: Sequence[str],
    *,
    exe: str,
    cwd: str,
    uid: int,
    gid: int,
    log: Path,
    pass_fds: Sequence[int] = (),
) -> GuestProcess:
    """Starts the program `exe` and returns when its last QMP socket greets.

    It runs in a session of its own as `uid`:`gid`, with /dev/null as its input and `log` as its
    output, and depends on nothing of ours. GuestError with its last words when it does not start;
    nothing is left of it then.
    """
    sockets = qmp_sockets(argv)
    if not sockets:
        raise Refused("a guest without a QMP socket cannot be started: add -qmp unix:PATH,server")
    started = await asyncio.to_thread(
        _start, list(argv), exe=exe, cwd=cwd, user=(uid, gid), log=log, pass_fds=pass_fds
    )
    try:
        path = Path(cwd, sockets[-1])
        await _wait_listening(started, path, log)
        await _wait_greeting(started, path, log)
        process = read_process(started.pid)
    except BaseException as error:
        started.kill()
        await asyncio.to_thread(started.wait)
        if isinstance(error, FerryError) and not isinstance(error, GuestError):
            raise GuestError(f"the new QEMU did not start: {error}") from error
        raise
    return process


def last_words(log: Path) -> str:
    """The end of what a QEMU has written, in one line."""
    try:
        with log.open("rb") as stream:
            stream.seek(0, os.SEEK_END)
            stream.seek(max(0, stream.tell() - LAST_WORDS_BYTES))
            text = stream.read().decode(errors="replace")
    except OSError:
        return "it said nothing"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-5:]) or "it said nothing"


def _start(
    argv: list[str],
    *,
    exe: str,
    cwd: str,
    user: tuple[int, int],
    log: Path,
    pass_fds: Sequence[int],
) -> subprocess.Popen[bytes]:
    # Not asyncio's: its transport kills the process when the loop that made it is closed.
    uid, gid = user
    changes = os.geteuid() == 0 and user != (os.geteuid(), os.getegid())
    # A QEMU told to change its user by itself was started by another one.
    by_itself = any(word.lstrip("-") == "runas" for word in argv)
    become = changes and not by_itself
    try:
        with log.open("ab") as output:
            process = subprocess.Popen(
                argv,
                executable=exe,
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                pass_fds=list(pass_fds),
                user=uid if become else None,
                group=gid if become else None,
                extra_groups=_groups(uid, gid) if become else None,
            )
    except OSError as error:
        raise GuestError(f"{exe} cannot be started in {cwd}: {error.strerror}") from error
    # Reaps it whenever it ends; a daemon thread keeps nobody from exiting.
    threading.Thread(target=process.wait, name=f"reap-{process.pid}", daemon=True).start()
    return process


def _groups(uid: int, gid: int) -> list[int]:
    """A guest's user is often in the group `kvm`."""
    import pwd

    try:
        return os.getgrouplist(pwd.getpwuid(uid).pw_name, gid)
    except KeyError:
        return [gid]


async def _wait_listening(started: subprocess.Popen[bytes], path: Path, log: Path) -> None:
    try:
        async with asyncio.timeout(START_LIMIT_S):
            # There is no event for a socket that begins to listen.
            while not _serves(started.pid, path):
                if started.poll() is not None:
                    raise _ended(started, log)
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise GuestError(
            f"the new QEMU opened no monitor at {path} within {START_LIMIT_S:g} s: "
            f"{last_words(log)}"
        ) from None


async def _wait_greeting(started: subprocess.Popen[bytes], path: Path, log: Path) -> None:
    """QEMU listens before it makes its devices, and greets after: most wrong options end it in
    between."""
    try:
        monitor = await Monitor.connect(str(path), START_LIMIT_S, f"pid {started.pid}")
    except GuestError as error:
        try:
            await asyncio.to_thread(started.wait, END_LIMIT_S)
        except subprocess.TimeoutExpired:
            raise error from None
        raise _ended(started, log) from error
    await monitor.disconnect()


def _ended(started: subprocess.Popen[bytes], log: Path) -> GuestError:
    return GuestError(
        f"the new QEMU ended at its start (code {started.returncode}): {last_words(log)}"
    )


def _serves(pid: int, path: Path) -> bool:
    """Whether this very process listens there: an older one of the same path may do so, too."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return peer_pid(probe) in (0, pid)
