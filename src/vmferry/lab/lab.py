"""Two hosts and an outside client on one machine: for the demo, the tests and the bench."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import msgspec

from vmferry.errors import FerryError, GuestError, MoveFailed
from vmferry.guest.launch import launch
from vmferry.guest.monitor import Monitor
from vmferry.guest.process import GuestProcess
from vmferry.lab import baseline, downloads, guestimage, leftovers, qemus
from vmferry.lab.baseline import QemuMigration, QemuMode
from vmferry.lab.client import OutsideClient, Window
from vmferry.lab.guests import WORKING, GuestSpec, LabGuest, Load, wait_ready
from vmferry.lab.hosts import LabHost, host_name, pair
from vmferry.lab.network import HOSTS, MIGRATION_ADDRESS, HostName, Topology
from vmferry.lab.qemus import QemuBinary
from vmferry.report.records import Report

DISK_MIB = 64
SETTLE_S = 2.0
"""How long after a move the client is still watched: announcements come for 0.8 s."""
_IMAGE_LIMIT_S = 30.0
_QUIT_LIMIT_S = 30.0


@dataclass(frozen=True)
class QemuOutcome:
    """QEMU's own migration, and what the client and the link saw of it."""

    migration: QemuMigration
    start_s: float
    """Start of the destination's QEMU, before the migration; a move's total includes it."""
    window: Window | None
    link_bytes: int


@dataclass(frozen=True)
class MoveOutcome:
    """A move by vmferry, and what the client and the link saw of it."""

    report: Report
    window: Window | None
    link_bytes: int


class Lab:
    """`async with Lab() as lab:`; nothing of it is left when the block ends.

    Several may live at a time. What a dead one has left is removed at the next start.
    """

    def __init__(self, say: Callable[[str], None] = lambda _: None) -> None:
        """`say` is told what is under way, a line each."""
        self._say = say
        self.id = secrets.token_hex(3)
        self.directory = leftovers.LABS / self.id
        self.topology = Topology(leftovers.PREFIX + self.id)
        self.hosts: dict[HostName, LabHost] = {}
        self._lock: int | None = None
        self._clients: list[OutsideClient] = []
        self._guests = 0
        self._starts = 0

    async def __aenter__(self) -> Self:
        """FerryError when the machine lacks something."""
        if os.geteuid() != 0:
            raise FerryError("The lab needs root: it makes network namespaces, bridges and taps.")
        for name in await asyncio.to_thread(leftovers.clean):
            self._say(f"removed what lab {name} had left")
        await asyncio.to_thread(downloads.fetch, self._say)
        self.directory.mkdir(parents=True)
        self._lock = leftovers.take_lock(self.directory)
        try:
            await asyncio.to_thread(self.topology.build)
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends every process and removes every namespace and file; twice is harmless."""
        if self._lock is None:
            return
        for client in self._clients:
            await client.close()
        await asyncio.gather(*(host.end() for host in self.hosts.values()))
        self.hosts = {}
        await asyncio.to_thread(leftovers.remove, self.directory)
        os.close(self._lock)
        self._lock = None
        with contextlib.suppress(OSError):
            leftovers.LABS.rmdir()

    async def boot_guest(
        self,
        *,
        host: HostName = "a",
        load: Load = WORKING,
        binary: QemuBinary | None = None,
        machine: str = "q35",
        memory_mib: int = 512,
        disk_load: bool = True,
        name: str = "",
        extra: Sequence[str] = (),
    ) -> LabGuest:
        """Boots a guest and returns when its load is ready (some seconds).

        Its name is unique on this machine, so that a daemon cannot mistake it. GuestError when it
        does not boot.
        """
        number, self._guests = self._guests, self._guests + 1
        disk = self.directory / f"disk{number}.qcow2"
        await _make_disk(disk)
        spec = GuestSpec(
            name=name or f"lab-{self.id}-{number}",
            number=number,
            binary=binary or qemus.newest(),
            image=await asyncio.to_thread(guestimage.build),
            disk=disk,
            load=load,
            disk_load=disk_load,
            machine=machine,
            memory_mib=memory_mib,
            extra=tuple(extra),
        )
        begin = time.monotonic()
        process, console, log = await self._start_qemu(spec, host)
        await wait_ready(process, console, log)
        return LabGuest(spec, self.topology, time.monotonic() - begin)

    async def start_client(self, guest: LabGuest) -> OutsideClient:
        """An outside client of this guest; it ends with the lab at the latest."""
        client = await OutsideClient.start(
            self.topology.command("c"), guest.address, self.directory / "client.log"
        )
        self._clients.append(client)
        return client

    async def start_hosts(self) -> None:
        """Starts vmferry's daemon on both hosts and pairs them."""
        for host in HOSTS:
            await self.start_host(host)
        await pair(self.hosts["a"], self.hosts["b"])

    async def start_host(
        self, host: HostName, environment: Mapping[str, str] | None = None
    ) -> LabHost:
        """Starts the daemon of one host (again): its state and its pairing are kept."""
        state_dir = self.directory / f"state-{host}"
        self.hosts[host] = await LabHost.start(self.topology, host, state_dir, environment)
        return self.hosts[host]

    async def shape(self, rate_mbit: int | None) -> None:
        """Bounds the migration link both ways, or takes the bound away."""
        await asyncio.to_thread(self.topology.shape, rate_mbit)

    async def move(
        self,
        guest: LabGuest,
        strategy: str,
        *,
        verify: bool = False,
        client: OutsideClient | None = None,
        show_progress: bool = False,
        options: Sequence[str] = (),
    ) -> MoveOutcome:
        """`vmferry move` to the other host. MoveFailed with what the command said."""
        here, _ = guest.locate()
        arguments = ["move", guest.name, host_name(other(here)), "--strategy", strategy, "--json"]
        arguments += [*(["--verify"] if verify else []), *options]
        begin, link_bytes = OutsideClient.mark(), self.topology.migration_bytes
        before = await asyncio.to_thread(link_bytes)
        process = await self.hosts[here].begin(*arguments, show_progress=show_progress)
        try:
            out, err = await process.communicate()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            raise
        if process.returncode != 0:
            said = (err or b"").decode().strip() or out.decode().strip()
            raise MoveFailed(f"vmferry did not move guest {guest.name}: {said}")
        after = await asyncio.to_thread(link_bytes)
        window = await _settled(client, begin)
        report = msgspec.json.decode(out, type=Report)
        if window is not None:
            # The comparison of both memories stops the guest for longer than the move does.
            compared = report.verification
            inside = compared.seconds * 1e3 if compared and not report.recover_s else 0.0
            blackout_ms = max(window.blackout_ms - inside, 0.0)
            report = msgspec.structs.replace(report, blackout_ms=blackout_ms)
        return MoveOutcome(report, window, after - before)

    async def migrate_with_qemu(
        self, guest: LabGuest, mode: QemuMode, *, client: OutsideClient | None = None
    ) -> QemuOutcome:
        """Moves the guest to the other host by QEMU's own migration. GuestError when it fails."""
        here, process = guest.locate()
        there = other(here)
        started = time.monotonic()
        waiting, _, _ = await self._start_qemu(guest.spec, there, ("-incoming", "defer"))
        start_s = time.monotonic() - started
        sides: list[baseline.Side] = []
        try:
            for path in (process.qmp, waiting.qmp):
                sides.append(await baseline.Side.connect(path))
            link_bytes = self.topology.migration_bytes
            before = await asyncio.to_thread(link_bytes)
            begin = OutsideClient.mark()
            migration = await baseline.migrate(*sides, mode, MIGRATION_ADDRESS[there])
            after = await asyncio.to_thread(link_bytes)
            window = await _settled(client, begin)
        except BaseException:
            await asyncio.to_thread(_kill, waiting)
            raise
        finally:
            for side in sides:
                await side.disconnect()
        await asyncio.to_thread(_kill, process)
        return QemuOutcome(migration, start_s, window, after - before)

    async def end_guest(self, guest: LabGuest) -> None:
        """Kills its QEMU, wherever it is."""
        _, process = guest.locate()
        await asyncio.to_thread(_kill, process)

    async def _start_qemu(
        self, spec: GuestSpec, host: HostName, more: Sequence[str] = ()
    ) -> tuple[GuestProcess, Path, Path]:
        """Its process, its console and its log. Every start has files of its own."""
        number, self._starts = self._starts, self._starts + 1
        stem = self.directory / f"qemu{number}"
        console, log = stem.with_suffix(".console"), stem.with_suffix(".log")
        command = self.topology.command(host)
        command += [*spec.command(stem.with_suffix(".qmp"), console), *more]
        process = await launch(
            command,
            exe=shutil.which("nsenter") or "/usr/bin/nsenter",
            cwd=str(self.directory),
            uid=os.geteuid(),
            gid=os.getegid(),
            log=log,
        )
        # The socket listens before the tap is made; the greeting comes when all is made.
        monitor = await Monitor.connect(process.qmp, guest=spec.name)
        await monitor.disconnect()
        await asyncio.to_thread(self.topology.join, host, spec.tap)
        return process, console, log


def other(host: HostName) -> HostName:
    """The other one of the two hosts."""
    return "b" if host == "a" else "a"


async def _settled(client: OutsideClient | None, begin: int) -> Window | None:
    if client is None:
        return None
    await asyncio.sleep(SETTLE_S)
    return await client.window(begin)


async def _make_disk(path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        *("qemu-img", "create", "-q", "-f", "qcow2", str(path), f"{DISK_MIB}M"),
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(_IMAGE_LIMIT_S):
        _, err = await process.communicate()
    if process.returncode != 0:
        raise GuestError(f"The guest's disk could not be made: {err.decode().strip()}.")


def _kill(process: GuestProcess) -> None:
    with contextlib.suppress(ProcessLookupError):
        leftovers.kill(process.pid, _QUIT_LIMIT_S)
