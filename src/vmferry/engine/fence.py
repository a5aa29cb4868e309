"""The fence: after it the source's guest can never run again, and its memory is still there.

The keeper is a child that shares the QEMU's memory and runs nothing (docs/failure-contract.md).
With it made, the QEMU is killed, and proven unable to run ever again; every page stays readable
and scannable through the keeper's pid until the keeper is let go.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Generator
from pathlib import Path

from vmferry import _core
from vmferry.errors import GuestError
from vmferry.guest.process import GuestProcess

PROOF_LIMIT_S = 10.0
"""A killed QEMU is gone in under a millisecond; only one stuck in the kernel takes longer."""
PROOF_POLL_S = 0.0001
_PF_EXITING = 0x4
"""Flag of field 9 of /proc/PID/task/TID/stat, set by do_exit() before anything else."""


class Fence:
    """The keeper of one guest, and the kill that makes it the only holder of its memory."""

    def __init__(self, process: GuestProcess, keeper: int) -> None:
        self.keeper = keeper
        self._process = process

    @classmethod
    async def prepare(cls, process: GuestProcess) -> Fence:
        """Makes the keeper; the guest itself is not disturbed and may still be continued."""
        try:
            keeper = await asyncio.to_thread(_core.make_keeper, process.pid)
        except (OSError, _core.CoreError) as error:
            raise GuestError(
                f"no keeper could be made for guest {process.name} (pid {process.pid}): {error}"
            ) from error
        _leave_cgroup(keeper)
        return cls(process, keeper)

    async def kill(self) -> None:
        """Kills the guest's process and returns when it can never run again: every thread of it
        is exiting or gone.

        Such a thread never returns to user mode or to KVM_RUN. What is left to it is closing
        files, and closing a tap alone waits some 20 ms for the kernel's network code.
        """
        await asyncio.to_thread(_kill_threads, self._process.pid, self._process.start_time)

    async def release(self) -> None:
        """Frees the memory: the keeper ends."""
        await asyncio.to_thread(
            end_keeper, self._process.pid, self._process.start_time, self.keeper
        )


def _kill_threads(pid: int, start_time: int) -> None:
    with _killed(pid, start_time) as pidfd:
        end = time.monotonic() + PROOF_LIMIT_S
        while pidfd is not None and not all(_exiting(task) for task in _tasks(pid)):
            if time.monotonic() > end:
                raise GuestError(f"pid {pid} was killed and is still not gone")
            time.sleep(PROOF_POLL_S)


@contextlib.contextmanager
def _killed(pid: int, start_time: int) -> Generator[int | None]:
    """Sends SIGKILL and gives the process's pidfd; None when there is no such process (any more).

    A pid that belongs to another process by now (`start_time`, field 22 of /proc/PID/stat) counts
    as gone; the pidfd, once it is known to be the right one, cannot be mistaken.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        yield None
        return
    try:
        if not _is_same(pid, start_time):
            yield None
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        yield pidfd
    finally:
        os.close(pidfd)


def _tasks(pid: int) -> list[Path]:
    try:
        return list(Path(f"/proc/{pid}/task").iterdir())
    except (FileNotFoundError, ProcessLookupError):
        return []


def _exiting(task: Path) -> bool:
    try:
        stat = (task / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    state, *fields = stat.rpartition(")")[2].split()
    return state in "ZX" or bool(int(fields[5]) & _PF_EXITING)


def end_keeper(pid: int, start_time: int, keeper: int) -> None:
    """Ends the keeper of a process, which is its parent and must reap it if it lives on."""
    if _is_same(pid, start_time):
        with contextlib.suppress(OSError, _core.CoreError):
            _core.reap_keeper(pid, keeper)
            return
    with contextlib.suppress(ProcessLookupError):
        os.kill(keeper, signal.SIGKILL)


async def kill_process(pid: int, start_time: int) -> None:
    """SIGKILL, and the proof: returns when the process is gone; GuestError if it will not go."""
    with _killed(pid, start_time) as pidfd:
        if pidfd is None:
            return
        loop = asyncio.get_running_loop()
        gone = loop.create_future()
        loop.add_reader(pidfd, lambda: gone.done() or gone.set_result(None))
        try:
            async with asyncio.timeout(PROOF_LIMIT_S):
                await gone
        except TimeoutError:
            raise GuestError(f"pid {pid} was killed and is still not gone") from None
        finally:
            loop.remove_reader(pidfd)


def has_ended(pid: int, start_time: int) -> bool:
    """Whether a process is gone, or dead and only not reaped yet by its parent."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return True
    return int(fields[19]) != start_time or fields[0] in "ZX"


def _is_same(pid: int, start_time: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return int(stat.rpartition(")")[2].split()[19]) == start_time


def _leave_cgroup(keeper: int) -> None:
    # A service manager that cleans up after a dead QEMU kills everything in its cgroup. A change
    # of cgroup takes 15 ms of the kernel's patience, so it is made only where it changes anything.
    ours = Path("/proc/self/cgroup").read_text()
    if Path(f"/proc/{keeper}/cgroup").read_text() == ours:
        return
    for line in ours.splitlines():
        _, controllers, path = line.split(":", 2)
        root = Path("/sys/fs/cgroup") / controllers.removeprefix("name=")
        with contextlib.suppress(OSError):
            (root / path.lstrip("/") / "cgroup.procs").write_text(str(keeper))
