"""One guest under a hold: everything that a move asks of its QEMU."""

from __future__ import annotations

import contextlib

from vmferry.errors import GuestError, Refused
from vmferry.guest import devicestate
from vmferry.guest.monitor import CommandFailed, Monitor
from vmferry.guest.nics import read_nics
from vmferry.guest.options import Settings, words
from vmferry.guest.process import GuestProcess
from vmferry.guest.ramblocks import RamBlock, read_ram_blocks

DRAIN_NODE = "vmferry-drain"
DRAIN_LIMIT_S = 30.0
"""A drain takes as long as the slowest disk request that is in flight."""
MOVABLE_STATUS = ("running", "paused")

_DMA_OF_ITS_OWN = {
    "vfio": "passes a host device through, which writes memory that nobody can track",
    "vhost-user": "is served by another process, which writes memory that nobody can track",
    "vhost-vdpa": "is served by a host device, which writes memory that nobody can track",
    "vhost-scsi": "is served by the host's kernel, which writes memory that nobody can track",
}


class Qemu:
    """A connection to a guest's monitor, and what must be undone when it ends."""

    def __init__(
        self,
        process: GuestProcess,
        monitor: Monitor,
        version: str,
        machine: str,
        nics: list[tuple[str, str]],
    ) -> None:
        self.process = process
        self.monitor = monitor
        self.version = version
        """As `10.0.2`."""
        self.machine = machine
        """The versioned type, as `pc-q35-7.2`."""
        self._nics = nics
        self._draining = False
        self._ending = False
        self._blockers: list[str] | None = None
        self._save_slot: devicestate.SaveSlot | None = None
        self._used_slots: list[devicestate.SaveSlot] = []
        self._load_slot: devicestate.LoadSlot | None = None

    @classmethod
    async def attach(cls, process: GuestProcess, qmp: str | None = None) -> Qemu:
        """Connects to the guest's monitor. GuestError when it is held by somebody else or gone."""
        called = f"{process.name} (pid {process.pid})"
        path = qmp or process.qmp
        monitor = await Monitor.connect(path, guest=called)
        try:
            # A second QEMU with the same command line takes the path over without a word; two
            # processes must never be taken for one.
            if monitor.server_pid not in (0, process.pid):
                raise Refused(
                    f"the QMP socket {path} of guest {called} now leads to process "
                    f"{monitor.server_pid}, which was started later with the same path; end one "
                    "of the two"
                )
            version = (await monitor.table("query-version")).get("qemu")
            numbers = version if isinstance(version, dict) else {}
            machine = str(
                await monitor.execute("qom-get", {"path": "/machine", "property": "type"})
            )
            nics = await read_nics(monitor, process.pid)
        except BaseException:
            await monitor.disconnect()
            raise
        return cls(
            process,
            monitor,
            ".".join(str(numbers.get(part, "?")) for part in ("major", "minor", "micro")),
            machine.removesuffix("-machine"),
            nics,
        )

    async def running(self) -> bool:
        """Whether its vCPUs run."""
        return await self.monitor.running()

    async def ram(self) -> list[RamBlock]:
        """Every RAM block; Refused when one cannot be found in the process."""
        return await read_ram_blocks(self.monitor, self.process.pid)

    def nics(self) -> list[tuple[str, str]]:
        """(MAC, tap) of every NIC on a tap, as it was when we attached."""
        return list(self._nics)

    async def blockers(self) -> list[str]:
        """Why this guest cannot be moved, a sentence each; empty when it can."""
        found: list[str] = []
        status = str((await self.monitor.table("query-status")).get("status"))
        if status not in MOVABLE_STATUS:
            found.append(f"its status is {status}: a guest is moved running or paused")
        reasons = (await self.monitor.table("query-migrate")).get("blocked-reasons")
        if isinstance(reasons, list):
            found += [f"QEMU says: {reason}" for reason in reasons]
        with contextlib.suppress(CommandFailed):
            replay = await self.monitor.table("query-replay")
            if replay.get("mode") != "none":
                found.append(f"it is under record/replay (mode {replay.get('mode')})")
        for word in words(self.process.argv):
            if word.name == "snapshot":
                found.append("its disks' writes go to temporary files (-snapshot)")
            elif word.name in ("device", "netdev") and word.value is not None:
                settings = Settings.parse(word.value)
                kind = settings.first("driver" if word.name == "device" else "type")
                found += self._foreign_dma(kind, settings.pairs.get("id", kind))
        found += await self._foreign_devices()
        self._blockers = list(dict.fromkeys(found))
        return list(self._blockers)

    async def _foreign_devices(self) -> list[str]:
        """Those that were plugged in later, too."""
        found: list[str] = []
        for path in ("/machine/peripheral", "/machine/peripheral-anon"):
            with contextlib.suppress(CommandFailed):
                for row in await self.monitor.rows("qom-list", {"path": path}):
                    kind = str(row.get("type", "")).removeprefix("child<").removesuffix(">")
                    name = str(row.get("name", ""))
                    found += self._foreign_dma(kind, kind if name.startswith("device[") else name)
        return found

    def _foreign_dma(self, kind: str, name: str) -> list[str]:
        return [
            f"device {name} ({kind}) {reason}"
            for prefix, reason in _DMA_OF_ITS_OWN.items()
            if kind.startswith(prefix)
        ]

    async def drain(self) -> None:
        """Returns when every disk request that was in flight has landed in memory; the guest runs.

        Through a node of our own: naming one of the guest's disks would deadlock QEMU 7.2 for good
        if that disk has an iothread. Ours sits in the main context, and a flush of it drains all.
        """
        if not self._draining:
            await self._add_drain_node()
        said = await self._flush()
        if "Cannot find" in said:
            # Another of our connections has taken it away.
            await self._add_drain_node()
            said = await self._flush()
        if said:
            raise GuestError(f"guest {self.monitor.guest} could not drain its disks: {said}")

    async def _flush(self) -> str:
        return (await self.monitor.hmp(f"qemu-io {DRAIN_NODE} aio_flush", DRAIN_LIMIT_S)).strip()

    async def _add_drain_node(self) -> None:
        try:
            await self.monitor.execute(
                "blockdev-add", {"driver": "null-co", "node-name": DRAIN_NODE, "size": 4096}
            )
        except CommandFailed as error:
            if "Duplicate" not in error.description:
                raise
        self._draining = True

    async def stop(self) -> int:
        """Stops the guest; when, in ns since the epoch."""
        return await self.monitor.stop()

    async def cont(self) -> int:
        """Runs the guest; when, in ns since the epoch. Takes the disks' locks back."""
        return await self.monitor.cont()

    async def prepare_save(self) -> None:
        """What `save_device_state` can have done before the stop. Refused: see there."""
        if self._blockers is None:
            await self.blockers()
        if self._blockers:
            raise Refused(f"guest {self.monitor.guest} cannot be saved: {self._blockers[0]}")
        if self._save_slot is None:
            self._save_slot = await devicestate.SaveSlot.offer(self.monitor)

    async def save_device_state(self) -> bytes:
        """The device state of the stopped guest; gives its disks' locks up until `cont`.

        Refused when something blocks the move: QEMU would die of saving it.
        """
        await self.prepare_save()
        assert self._save_slot is not None
        slot, self._save_slot = self._save_slot, None
        self._used_slots.append(slot)
        return await slot.save()

    async def prepare_load(self) -> None:
        """What `load_device_state` can have done before the state comes."""
        if self._load_slot is None:
            self._load_slot = await devicestate.LoadSlot.offer(self.monitor)

    async def load_device_state(self, data: bytes, timeout_s: float) -> None:
        """Loads what `save_device_state` gave; the guest is paused then."""
        await self.prepare_load()
        assert self._load_slot is not None
        slot, self._load_slot = self._load_slot, None
        await slot.load(data, self.machine, timeout_s)

    def expect_end(self) -> None:
        """The process is about to be killed by us: nothing is left to be undone in it."""
        self._ending = True

    async def close(self) -> None:
        """Leaves the guest as it was and disconnects. Never raises, twice is harmless."""
        slots = [*self._used_slots, *([self._save_slot] if self._save_slot else [])]
        self._used_slots, self._save_slot = [], None
        if not self._ending:
            for slot in slots:
                await slot.withdraw()
            # Also the node that a dead daemon's move has left.
            with contextlib.suppress(GuestError):
                await self.monitor.execute("blockdev-del", {"node-name": DRAIN_NODE})
        for slot in slots:
            slot.close()
        if self._load_slot is not None:
            self._load_slot.close()
        self._draining = False
        self._ending = True
        await self.monitor.disconnect()
