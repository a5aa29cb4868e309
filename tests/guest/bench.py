"""A real QEMU of one version to look at, and what its guest does."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from vmferry import _core
from vmferry.engine.fence import kill_process
from vmferry.guest.launch import launch
from vmferry.guest.process import GuestProcess
from vmferry.guest.qemu import Qemu
from vmferry.lab import qemus

BOOT_LIMIT_S = 60.0
COUNTER = 0x9000
"""Where the guest's program counts."""

_PROGRAM = bytes.fromhex(
    "31c0"  # xor ax, ax
    "8ed8"  # mov ds, ax
    "66ff060090"  # inc dword [COUNTER]
    "ebf9"  # jmp to the inc
)

READS_DISK = bytes.fromhex(
    "31c0 8ed8 8ed0 bc007c"  # ds = ss = 0, sp = 0x7c00
    "66ff060090"  # inc dword [COUNTER]
    "be307c b442 b281 cd13"  # reads by BIOS from disk 0x81, as the packet at 0x7c30 says
    "ebf0"  # jmp to the inc
).ljust(0x30, b"\0") + bytes.fromhex("1000 0100 0080 0000").ljust(16, b"\0")
"""Reads the first sector of the second disk for ever, one request at a time."""


@dataclass(frozen=True)
class Bench:
    """A QEMU of one version, and a folder with short paths to run it in."""

    binary: qemus.QemuBinary
    folder: Path

    @property
    def old(self) -> bool:
        """Prints no host addresses of RAM blocks, and ends when a load fails."""
        return self.binary.version < (8,)

    @property
    def name(self) -> str:
        """Of the guest under test: no two runs of the tests at once share it."""
        return f"subject-{self.folder.name}"

    def disk(self, program: bytes = _PROGRAM) -> Path:
        """An image whose boot sector counts for ever, or does something else."""
        raw, image = self.folder / "boot.raw", self.folder / "boot.qcow2"
        sector = program.ljust(510, b"\0") + b"\x55\xaa"
        raw.write_bytes(sector.ljust(1 << 20, b"\0"))
        subprocess.run(
            ["qemu-img", "convert", "-q", "-O", "qcow2", raw, image], check=True, timeout=60
        )
        return image

    def argv(self, machine: str, *more: str, name: str = "") -> list[str]:
        """A bare machine with a QMP socket."""
        name = name or self.name
        return [
            *self.binary.command,
            *("-name", f"guest={name},debug-threads=on", "-M", machine, "-m", "64"),
            *("-accel", "tcg", "-display", "none", "-nodefaults", "-vga", "std"),
            *more,
            *("-qmp", f"unix:{self.folder}/{name}.qmp,server=on,wait=off"),
        ]

    def furnished(self, machine: str, disk: Path, name: str = "") -> list[str]:
        """A machine with the devices that most guests have; it counts once it has booted."""
        return self.argv(
            machine,
            *("-netdev", "user,id=n0", "-device", "virtio-net-pci,netdev=n0"),
            *("-blockdev", f"driver=file,filename={disk},node-name=f0"),
            *("-blockdev", "driver=qcow2,file=f0,node-name=d0"),
            *("-device", "virtio-blk-pci,drive=d0,bootindex=0"),
            *("-device", "virtio-balloon-pci"),
            name=name,
        )

    @asynccontextmanager
    async def started(self, argv: list[str], log: str = "log") -> AsyncGenerator[GuestProcess]:
        """The process of a command line, killed at the end."""
        process = await launch(
            argv,
            exe=str(self.binary.path),
            cwd=str(self.folder),
            uid=0,
            gid=0,
            log=self.folder / log,
        )
        try:
            yield process
        finally:
            await kill_process(process.pid, process.start_time)


async def memory_of(guest: Qemu, process: GuestProcess) -> _core.Memory:
    """The RAM of a guest."""
    return _core.Memory(process.pid, [ram.block for ram in await guest.ram()])


def counted(memory: _core.Memory) -> int:
    """How far the guest has counted."""
    index = next(i for i, b in enumerate(memory.blocks) if b.name == "pc.ram")
    return int.from_bytes(memory.read(index, COUNTER, 4), "little")


async def counts_beyond(memory: _core.Memory, number: int) -> int:
    """Waits until the guest has counted further than that; how far it is then."""
    async with asyncio.timeout(BOOT_LIMIT_S):
        while True:
            now = counted(memory)
            if now > number:
                return now
            await asyncio.sleep(0.01)


def copy(source: _core.Memory, target: _core.Memory) -> None:
    """All that is populated, block by block."""
    pages = source.populated()
    for block in range(len(source.shape)):
        for start, stop in pages.ranges(block):
            offset, length = start * _core.PAGE_SIZE, (stop - start) * _core.PAGE_SIZE
            target.write(block, offset, source.read(block, offset, length))


def has_ended(process: GuestProcess) -> bool:
    """Whether the process is gone or only waits to be reaped."""
    try:
        state = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state == "Z"
