"""Ends what a lab has started, and finds labs whose process has died.

A lab holds a lock on its directory as long as it lives, so one without it is dead. Whatever runs
in its namespaces was started by it, at whatever remove: nothing else can be in there.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import shutil
import signal
from pathlib import Path

from vmferry.errors import FerryError
from vmferry.lab.network import Topology

LABS = Path("/var/tmp/vmferry-lab")
"""Not /tmp: that is often a tmpfs, and guests write their disks here with O_DIRECT."""
LOCK = "lock"
PREFIX = "vf-"
_END_LIMIT_S = 10.0


def clean() -> list[str]:
    """Removes every dead lab; returns their names."""
    removed = []
    for directory in sorted(LABS.iterdir()) if LABS.is_dir() else ():
        with contextlib.suppress(BlockingIOError):
            lock = take_lock(directory)
            try:
                remove(directory)
            finally:
                os.close(lock)
            removed.append(directory.name)
    with contextlib.suppress(OSError):
        LABS.rmdir()
    return removed


def take_lock(directory: Path) -> int:
    """The descriptor that holds the lock. BlockingIOError: the lab lives."""
    descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def remove(directory: Path) -> None:
    """Ends all processes of a lab and removes its namespaces and files. FerryError when one of its
    processes does not end."""
    topology = Topology(PREFIX + directory.name)
    end_processes(topology)
    topology.remove()
    shutil.rmtree(directory)


def end_processes(topology: Topology) -> None:
    """Kills everything in the namespaces and waits until it is gone."""
    # Twice: what is killed may have been about to fork.
    for _ in range(2):
        handles = []
        for pid in topology.processes():
            with contextlib.suppress(ProcessLookupError):
                handle = os.pidfd_open(pid)
                handles.append((pid, handle))
        try:
            for pid, handle in handles:
                # The number may have gone to another process since: look again, then kill.
                if pid in topology.processes():
                    with contextlib.suppress(ProcessLookupError):
                        signal.pidfd_send_signal(handle, signal.SIGKILL)
            for pid, handle in handles:
                if not _gone(handle):
                    raise FerryError(f"Process {pid} of the lab does not end.")
        finally:
            for _, handle in handles:
                os.close(handle)


def kill(pid: int, timeout_s: float = _END_LIMIT_S) -> None:
    """Kills one process and waits until it is gone. FerryError when it does not end."""
    handle = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        if not _gone(handle, timeout_s):
            raise FerryError(f"Process {pid} of the lab does not end.")
    finally:
        os.close(handle)


def _gone(handle: int, timeout_s: float = _END_LIMIT_S) -> bool:
    poller = select.poll()
    poller.register(handle, select.POLLIN)
    return bool(poller.poll(timeout_s * 1000))
