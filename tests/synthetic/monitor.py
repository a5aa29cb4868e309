"""The monitor of a synthetic guest as its tests use it, and a copy of its memory by hand."""

from __future__ import annotations

import contextlib
import os
import re
import struct
from collections.abc import AsyncGenerator

from qemu.qmp import QMPClient

from vmferry.lab import synthetic

PAGE = 4096
CONFIGURATION = b"\x07" + struct.pack(">I", 9) + b"synthetic"
DESCRIPTION = b"\x06" + struct.pack(">I", 2) + b"{}"


@contextlib.asynccontextmanager
async def monitor(guest: synthetic.SyntheticGuest) -> AsyncGenerator[QMPClient]:
    client = QMPClient(guest.qmp_path.name)
    await client.connect(str(guest.qmp_path))
    try:
        yield client
    finally:
        await client.disconnect()


async def blocks(client: QMPClient) -> dict[str, tuple[int, int]]:
    """Name to (address, length), by the pattern that reads QEMU 10.0's."""
    answer = await client.execute("x-query-ramblock")
    assert isinstance(answer, dict)
    row = re.compile(r"\s*(\S+)\s+4 KiB\s+0x\w+\s+(0x\w+)\s+(0x\w+)\s+(0x\w+)\s+(rw|ro)$")
    found = {}
    for line in answer["human-readable-text"].splitlines()[1:]:
        match = row.match(line)
        assert match, line
        assert match[2] == match[3]
        found[match[1]] = (int(match[4], 16), int(match[3], 16))
    return found


async def save(client: QMPClient) -> bytes:
    state = os.memfd_create("state")
    for_writing = os.open(f"/proc/self/fd/{state}", os.O_WRONLY)
    try:
        client.send_fd_scm(for_writing)
        await client.execute("add-fd", {"fdset-id": 7})
        await client.execute("xen-save-devices-state", {"filename": "/dev/fdset/7"})
        await client.execute("remove-fd", {"fdset-id": 7})
        return os.pread(state, 1 << 24, 0)
    finally:
        os.close(for_writing)
        os.close(state)


async def load(client: QMPClient, state: bytes, **options: bool) -> None:
    descriptor = os.memfd_create("state")
    os.write(descriptor, state)
    os.lseek(descriptor, 0, os.SEEK_SET)
    client.send_fd_scm(descriptor)
    os.close(descriptor)
    await client.execute("getfd", {"fdname": "state"})
    await client.execute("migrate-incoming", {"uri": "fd:state", **options})


def splice(state: bytes) -> bytes:
    """As QEMU wants it, whose stream has no configuration section here."""
    assert state.startswith(b"QEVM\0\0\0\3")
    assert state.endswith(b"\0")
    return state[:8] + CONFIGURATION + state[8:] + DESCRIPTION


async def copy_memory(
    pid: int,
    mine: dict[str, tuple[int, int]],
    target: synthetic.SyntheticGuest,
    skip: tuple[str, int] | None = None,
) -> None:
    """All pages that are not zero, out of a process with these blocks; `skip` names one (block,
    page) to forget."""
    async with monitor(target) as client:
        theirs = await blocks(client)
    reader = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
    writer = os.open(f"/proc/{target.pid}/mem", os.O_WRONLY)
    try:
        for name, (address, length) in mine.items():
            content = os.pread(reader, length, address)
            assert len(content) == length
            for page in range(length // PAGE):
                piece = content[page * PAGE : (page + 1) * PAGE]
                if (name, page) != skip and piece.count(0) != PAGE:
                    os.pwrite(writer, piece, theirs[name][0] + page * PAGE)
    finally:
        os.close(reader)
        os.close(writer)
