"""Where a guest's RAM lies in its process: every RAM block, firmware and video memory included."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping as Table
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vmferry._core import PAGE_SIZE, Block
from vmferry.errors import GuestError, Refused
from vmferry.guest.monitor import Monitor

_ROW = re.compile(
    r"\s*(?P<name>\S.*?)\s+(?P<size>\d+) (?P<unit>[KMGT]?i?B)\s+(?P<offset>0x[0-9a-f]+)"
    r"\s+(?P<used>0x[0-9a-f]+)\s+(?P<total>0x[0-9a-f]+)(?:\s+(?P<hva>0x[0-9a-f]+))?"
)
_MAIN = re.compile(r"for 0x0 \((?P<name>[^)]+)\) is (?P<hva>0x[0-9a-f]+)")
_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


@dataclass(frozen=True)
class RamBlock:
    """One RAM block."""

    block: Block
    used: int
    """Bytes in use of a resizable block; equal on both sides of a move."""


@dataclass(frozen=True)
class _Row:
    """A line of `info ramblock`."""

    name: str
    page_size: int
    offset: int
    used: int
    length: int
    address: int | None


@dataclass(frozen=True)
class Mapping:
    """A line of /proc/PID/maps; `ram` says whether it is marked as a RAM block."""

    start: int
    stop: int
    shared: bool
    ram: bool


async def read_ram_blocks(monitor: Monitor, pid: int) -> list[RamBlock]:
    """All RAM blocks in QEMU's order. Refused when one cannot be found in the process.

    QEMU 8 and later print the address; for older ones it is worked out of the process's mappings.
    """
    answer = await monitor.table("x-query-ramblock")
    rows = parse_ram_blocks(str(answer.get("human-readable-text", "")))
    if not rows:
        raise GuestError(f"guest {monitor.guest} lists no RAM blocks")
    addresses = {row.name: row.address for row in rows if row.address is not None}
    by_address = len(addresses) == len(rows)
    mappings = _read_mappings(pid, with_flags=not by_address)
    if not by_address:
        addresses = place(rows, mappings)
        check_main_memory(await monitor.hmp("gpa2hva 0"), addresses, monitor.guest)
    found: list[RamBlock] = []
    for row in rows:
        address = addresses.get(row.name)
        mapping = next((m for m in mappings if address and m.start <= address < m.stop), None)
        if address is None or mapping is None:
            raise Refused(
                f"RAM block {row.name} ({row.length} bytes) of guest {monitor.guest} was not found "
                f"in the memory of process {pid}"
            )
        block = Block(row.name, address, row.length, row.page_size, mapping.shared)
        found.append(RamBlock(block, row.used))
    return found


def parse_ram_blocks(text: str) -> list[_Row]:
    """The table of `info ramblock` (QEMU 7.2 and 10.0)."""
    rows: list[_Row] = []
    for line in text.splitlines()[1:]:
        match = _ROW.match(line)
        if match is None:
            continue
        total = int(match["total"], 16)
        hva = int(match["hva"], 16) if match["hva"] else None
        rows.append(
            _Row(
                name=match["name"],
                page_size=int(match["size"]) * _UNITS[match["unit"]],
                offset=int(match["offset"], 16),
                used=int(match["used"], 16),
                length=-(-total // PAGE_SIZE) * PAGE_SIZE,
                address=hva or None,
            )
        )
    return rows


def place(rows: Sequence[_Row], mappings: Sequence[Mapping]) -> dict[str, int]:
    """Addresses by block name, from mappings that are marked as RAM.

    QEMU marks RAM blocks and nothing else MADV_DONTFORK (`dc` in smaps), each in a mapping of its
    own size. Blocks of one size lie from high to low addresses in the order of their offsets,
    because mmap goes down and offsets go up. A size with more or fewer mappings than blocks is
    left out.
    """
    blocks = Counter(row.length for row in rows)
    places = {
        length: sorted(m.start for m in mappings if m.ram and m.stop - m.start == length)
        for length in blocks
    }
    addresses: dict[str, int] = {}
    for row in sorted(rows, key=lambda row: row.offset):
        if len(places[row.length]) >= 1 and blocks[row.length] == len(places[row.length]):
            addresses[row.name] = places[row.length].pop()
            blocks[row.length] -= 1
    return addresses


def check_main_memory(said: str, addresses: Table[str, int], guest: str) -> None:
    """Refused when QEMU says by `gpa2hva 0` that main memory lies elsewhere than worked out."""
    match = _MAIN.search(said)
    if match is None:
        return
    name, address = match["name"].removeprefix("/objects/"), int(match["hva"], 16)
    if addresses.get(name, address) != address:
        raise Refused(
            f"RAM block {name} of guest {guest} was looked for at {addresses[name]:#x} in its "
            f"process, but its QEMU says {address:#x}: an unknown layout, so it is left alone"
        )


def _read_mappings(pid: int, *, with_flags: bool) -> list[Mapping]:
    # smaps walks the page tables, which maps does not: only where its flags are needed.
    source = Path("/proc", str(pid), "smaps" if with_flags else "maps")
    try:
        lines = source.read_text(errors="replace").splitlines()
    except PermissionError as error:
        raise Refused(
            f"the memory of process {pid} may not be looked at: run the daemon as root"
        ) from error
    except OSError as error:
        raise GuestError(f"process {pid} is gone") from error
    mappings: list[Mapping] = []
    for line in lines:
        first = line.split(maxsplit=2)
        if first and first[0] == "VmFlags:":
            last = mappings[-1]
            if "dc" in line.split():
                mappings[-1] = Mapping(last.start, last.stop, last.shared, True)
        elif first and "-" in first[0] and not first[0].endswith(":"):
            start, _, stop = first[0].partition("-")
            mappings.append(Mapping(int(start, 16), int(stop, 16), first[1][3] == "s", False))
    return mappings
