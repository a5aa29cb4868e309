"""The lab's guests: a Linux in a QEMU with plain private RAM, started without a thought of
migration."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vmferry.errors import GuestError, Refused
from vmferry.guest.launch import last_words
from vmferry.guest.options import Settings, words
from vmferry.guest.process import GuestProcess, read_process
from vmferry.lab.guestimage import GuestImage
from vmferry.lab.network import HOSTS, HostName, Topology
from vmferry.lab.qemus import QemuBinary

BOOT_LIMIT_S = 120.0
TICK_LIMIT_S = 30.0
_POLL_S = 0.02
CONSOLE = "console"


@dataclass(frozen=True)
class Load:
    """What the guest's program does to its memory: random pages of an area rewritten at a rate,
    each checked before it is rewritten."""

    area_mib: int = 128
    megabytes_per_s: int = 40
    content: Literal["text", "incompressible", "zeros"] = "text"

    def __str__(self) -> str:
        return f"{self.area_mib},{self.megabytes_per_s},{self.content}"


IDLE = Load(0, 0)
WORKING = Load()


@dataclass(frozen=True)
class GuestSpec:
    """How a guest is made; the same words give the same guest on either host."""

    name: str
    number: int
    """Tells guests of one lab apart: address, MAC and tap."""
    binary: QemuBinary
    image: GuestImage
    disk: Path
    load: Load
    disk_load: bool
    machine: str = "q35"
    memory_mib: int = 512
    extra: tuple[str, ...] = ()

    @property
    def address(self) -> str:
        return f"10.77.0.{10 + self.number}"

    @property
    def mac(self) -> str:
        return f"52:54:00:77:00:{0x10 + self.number:02x}"

    @property
    def tap(self) -> str:
        return f"vmtap{self.number}"

    def command(self, qmp: Path, console: Path) -> list[str]:
        """The command line. QEMU makes the tap itself, so that it ends with QEMU."""
        kernel_words = [
            "console=ttyS0 quiet loglevel=3 panic=-1 mitigations=off",
            f"vmferry.address={self.address}/24 vmferry.load={self.load}",
            "vmferry.disk=/dev/vda" if self.disk_load else "",
        ]
        disk = f"file={self.disk},format=qcow2,if=none,id=disk0,cache=none"
        return [
            *self.binary.command,
            *("-name", f"guest={self.name}", "-machine", self.machine, "-m", str(self.memory_mib)),
            *("-accel", "tcg,thread=multi", "-display", "none", "-nodefaults", "-vga", "std"),
            *("-kernel", str(self.image.kernel), "-initrd", str(self.image.initrd)),
            *("-append", " ".join(kernel_words)),
            *("-chardev", f"file,id={CONSOLE},path={console},append=on"),
            *("-serial", f"chardev:{CONSOLE}"),
            *("-netdev", f"tap,id=net0,ifname={self.tap},script=no,downscript=no"),
            *("-device", f"virtio-net-pci,netdev=net0,mac={self.mac}"),
            *("-drive", disk, "-device", "virtio-blk-pci,drive=disk0"),
            *("-device", "virtio-balloon-pci"),
            *("-qmp", f"unix:{qmp},server=on,wait=off"),
            *self.extra,
        ]


@dataclass(frozen=True)
class GuestCounts:
    """What the guest says of itself, counted since its boot wherever it ran."""

    ticks: int
    pages_written: int
    corrupt: int
    """Pages that were not as the guest had written them."""
    disk_operations: int = 0
    disk_bad: int = 0
    died: int = 0
    """Processes that ended in the guest; none should."""


@dataclass
class LabGuest:
    """A running guest of the lab, wherever it is by now."""

    spec: GuestSpec
    topology: Topology
    booted_s: float = 0.0
    """From the start of QEMU to the load being ready."""

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def address(self) -> str:
        return self.spec.address

    def locate(self) -> tuple[HostName, GuestProcess]:
        """Its host and its QEMU. GuestError when it is on neither host, or on both."""
        found = list(self._everywhere())
        if len(found) == 1:
            return found[0]
        where = "on neither host" if not found else "running on more than one QEMU"
        raise GuestError(f"Guest {self.name} is {where}.")

    def console(self) -> str:
        """What its console has written where it runs now."""
        _, process = self.locate()
        return _console_path(process).read_text(errors="replace")

    async def counts(self, timeout_s: float = TICK_LIMIT_S) -> GuestCounts:
        """The next counts that it prints: proof that it runs. GuestError when it prints none."""
        _, process = self.locate()
        path = _console_path(process)
        begin = path.stat().st_size
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    # There is no event for a line in a file.
                    await asyncio.sleep(_POLL_S)
                    if _whole_tick(path, begin):
                        break
        except TimeoutError:
            raise GuestError(
                f"Guest {self.name} has printed nothing for {timeout_s:g} s; its console ends: "
                f"{path.read_text(errors='replace')[-300:]!r}"
            ) from None
        return read_counts(path.read_text(errors="replace"))

    def _everywhere(self) -> list[tuple[HostName, GuestProcess]]:
        found: list[tuple[HostName, GuestProcess]] = []
        for host in HOSTS:
            for pid in self.topology.processes(host):
                try:
                    process = read_process(pid)
                except (GuestError, Refused):
                    continue
                if process.name == self.name:
                    found.append((host, process))
        return found


async def wait_ready(process: GuestProcess, console: Path, log: Path) -> None:
    """Returns when the guest's load is ready. GuestError when QEMU ends or time is up."""
    try:
        async with asyncio.timeout(BOOT_LIMIT_S):
            while not (console.exists() and "LOAD-READY" in console.read_text(errors="replace")):
                if not Path("/proc", str(process.pid), "exe").exists():
                    raise GuestError(
                        f"The QEMU of guest {process.name} ended while it booted: {last_words(log)}"
                    )
                await asyncio.sleep(_POLL_S)
    except TimeoutError:
        said = console.read_text(errors="replace")[-300:] if console.exists() else ""
        raise GuestError(
            f"Guest {process.name} was not ready within {BOOT_LIMIT_S:g} s; its console ends: "
            f"{said!r}"
        ) from None


def read_counts(text: str) -> GuestCounts:
    """The last counts in a console's text."""
    text = text.replace("\r", "")
    tick = _last(r"^TICK (\d+) written (\d+) corrupt (\d+)$", text)
    disk = _last(r"^DISK operations (\d+) bad (\d+)$", text)
    died = len(re.findall(r"^(?:DIED|LOAD-FAILED|DISK-FAILED) ", text, re.MULTILINE))
    ticks, written, corrupt = tick or (0, 0, 0)
    operations, bad = disk or (0, 0)
    # Counts come once a second; a line of complaint may be newer than they are.
    corrupt = max(corrupt, len(re.findall(r"^CORRUPT ", text, re.MULTILINE)))
    bad = max(bad, len(re.findall(r"^DISKBAD ", text, re.MULTILINE)))
    return GuestCounts(ticks, written, corrupt, operations, bad, died)


def _last(pattern: str, text: str) -> Sequence[int] | None:
    found = re.findall(pattern, text, re.MULTILINE)
    return [int(field) for field in found[-1]] if found else None


def _whole_tick(path: Path, begin: int) -> bool:
    with path.open("rb") as stream:
        stream.seek(begin)
        return re.search(rb"(^|\n)TICK [^\n]*\n", stream.read()) is not None


def _console_path(process: GuestProcess) -> Path:
    for word in words(process.argv):
        if word.name == "chardev" and word.value:
            settings = Settings.parse(word.value)
            if settings.pairs.get("id") == CONSOLE:
                return Path(process.cwd, settings.pairs["path"])
    raise GuestError(f"Guest {process.name} has no console of the lab's in its command line.")
