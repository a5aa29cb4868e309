"""The NICs of a guest that end in a tap of its host."""

from __future__ import annotations

import re
from pathlib import Path

from vmferry.guest.monitor import Monitor

_MAC = re.compile(r"macaddr=([0-9a-fA-F:]{17})")
_IFNAME = re.compile(r"ifname=([^,\s]+)")
_DESCRIPTOR = re.compile(r"\bfd=(\d+)")


async def read_nics(monitor: Monitor, pid: int) -> list[tuple[str, str]]:
    """(MAC, interface) of every NIC whose backend is a tap, hot-plugged ones included."""
    return parse_nics(await monitor.hmp("info network"), pid)


def parse_nics(text: str, pid: int) -> list[tuple[str, str]]:
    """Out of `info network`: a NIC's line, then those of its backends indented.

    A tap that was handed over as a descriptor shows its number: the kernel knows its interface.
    """
    found: list[tuple[str, str]] = []
    mac = ""
    for line in text.splitlines():
        if "type=nic" in line:
            match = _MAC.search(line)
            mac = match[1].lower() if match else ""
        elif mac and "type=tap" in line:
            name = _IFNAME.search(line)
            descriptor = _DESCRIPTOR.search(line)
            tap = name[1] if name else interface_of(pid, int(descriptor[1])) if descriptor else ""
            if tap and (mac, tap) not in found:
                found.append((mac, tap))
    return found


def interface_of(pid: int, descriptor: int) -> str:
    """The interface of a tap open in a process; empty when it is none."""
    try:
        lines = Path("/proc", str(pid), "fdinfo", str(descriptor)).read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        if line.startswith("iff:"):
            return line.partition(":")[2].strip()
    return ""
