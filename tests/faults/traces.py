"""What a move that was undone must not leave in a guest's process, beside it or elsewhere."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from vmferry import _core
from vmferry.guest.process import GuestProcess
from vmferry.lab.network import HostName, Topology

_REGISTERED = ("uw", "um", "ui")
"""VmFlags of a mapping that a userfaultfd watches: write-protect, missing, minor."""


def processes_called(topology: Topology, host: HostName, name: str) -> list[int]:
    """Whatever bears a guest's command line in a host: its QEMU, a keeper, a wrapper."""
    found = []
    for pid in topology.processes(host):
        with contextlib.suppress(OSError):
            argv = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if f"guest={name}".encode() in argv:
                found.append(pid)
    return found


def in_process(process: GuestProcess) -> Iterator[str]:
    """What is left in and beneath a guest's QEMU, a phrase each."""
    pid = process.pid
    if found := _core.find_userfaultfd(pid):
        yield f"userfaultfds {found} are open in the QEMU"
    flags = re.findall(r"^VmFlags: (.*)$", Path(f"/proc/{pid}/smaps").read_text(), re.MULTILINE)
    if any(flag in line.split() for line in flags for flag in _REGISTERED):
        yield "a mapping is still registered with a userfaultfd"
    if children := _children(pid):
        yield f"the QEMU has children {children}"
    if tracer := _status(pid, "TracerPid"):
        yield f"process {tracer} traces the QEMU"


def _children(pid: int) -> list[int]:
    # Not `task/*/children`, which a zombie may be missing from.
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                stat = (entry / "stat").read_text()
                if int(stat.rpartition(")")[2].split()[1]) == pid:
                    found.append(int(entry.name))
    return found


def _status(pid: int, key: str) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    match = re.search(rf"^{key}:\s+(\d+)$", text, re.MULTILINE)
    assert match is not None
    return int(match[1])
