"""The device state of a stopped guest, as bytes: saved without its RAM, loaded beside it.

`xen-save-devices-state` writes the device sections of a migration stream (no Xen is involved).
With the two sections that it leaves out put in, an ordinary QEMU under `-incoming` takes it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
import time

from vmferry.errors import GuestError
from vmferry.guest.monitor import CommandFailed, Monitor

SAVE_LIMIT_S = 30.0
ASK_WHY_EVERY = 8
"""Of so many questions whether it is loaded one is also whether it has failed."""
PAUSE_S = 0.001
"""After each of those, so that a long load does not cost a core."""
_HEADER = b"QEVM" + struct.pack(">I", 3)
_CONFIGURATION = b"\x07"
_DESCRIPTION = b"\x06" + struct.pack(">I", 2) + b"{}"
_END_OF_FILE = b"\x00"
_DESCRIPTOR_NAME = "vmferry-state"
_ROM_NOT_THERE = "kvm-tpr-opt"


class SaveSlot:
    """A file that the guest holds and saves into. Offered before the stop, it leaves one command
    for the downtime."""

    def __init__(self, monitor: Monitor, memory: int, fdset: object) -> None:
        self._monitor = monitor
        self._memory = memory
        self._fdset = fdset

    @classmethod
    async def offer(cls, monitor: Monitor) -> SaveSlot:
        """GuestError when the guest does not take it."""
        memory = os.memfd_create("vmferry-state")
        try:
            # QEMU compares the modes: a descriptor in a set must be open for writing only.
            writable = os.open(f"/proc/self/fd/{memory}", os.O_WRONLY)
            try:
                added = await monitor.execute("add-fd", descriptor=writable)
            finally:
                os.close(writable)
            if not isinstance(added, dict):
                raise GuestError(f"guest {monitor.guest} did not take a descriptor")
        except BaseException:
            os.close(memory)
            raise
        return cls(monitor, memory, added["fdset-id"])

    async def save(self) -> bytes:
        """The device state of the stopped guest; once a slot.

        It also gives up the locks on the disks' images, until the guest is continued. A guest with
        a device that cannot be migrated dies of it: ask for blockers before.
        """
        await self._monitor.execute(
            "xen-save-devices-state", {"filename": f"/dev/fdset/{self._fdset}"}, SAVE_LIMIT_S
        )
        state = os.pread(self._memory, os.fstat(self._memory).st_size, 0)
        if not state.startswith(_HEADER) or not state.endswith(_END_OF_FILE):
            raise GuestError(
                f"guest {self._monitor.guest} saved {len(state)} bytes that are no device state"
            )
        return state

    async def withdraw(self) -> None:
        """Takes it back from a guest that lives on. Never raises."""
        with contextlib.suppress(GuestError):
            await self._monitor.execute("remove-fd", {"fdset-id": self._fdset})

    def close(self) -> None:
        """Closes our end; twice is harmless."""
        if self._memory >= 0:
            os.close(self._memory)
            self._memory = -1


def splice(state: bytes, machine: str) -> bytes:
    """The same as a whole migration stream: with the machine's type, which the load compares, and
    an empty description at the end."""
    name = machine.encode()
    configuration = _CONFIGURATION + struct.pack(">I", len(name)) + name
    return _HEADER + configuration + state[len(_HEADER) :] + _DESCRIPTION


class LoadSlot:
    """A file that the waiting guest holds and will load from; filled when the state has come."""

    def __init__(self, monitor: Monitor, memory: int) -> None:
        self._monitor = monitor
        self._memory = memory

    @classmethod
    async def offer(cls, monitor: Monitor) -> LoadSlot:
        """For a guest that waits under `-incoming defer -S`. GuestError."""
        with contextlib.suppress(CommandFailed):
            # Otherwise the end of the load takes the disks' locks, before anyone has said `cont`.
            await monitor.execute(
                "migrate-set-capabilities",
                {"capabilities": [{"capability": "late-block-activate", "state": True}]},
            )
        memory = os.memfd_create("vmferry-state")
        try:
            readable = os.open(f"/proc/self/fd/{memory}", os.O_RDONLY)
            try:
                await monitor.execute("getfd", {"fdname": _DESCRIPTOR_NAME}, descriptor=readable)
            finally:
                os.close(readable)
        except BaseException:
            os.close(memory)
            raise
        return cls(monitor, memory)

    async def load(self, state: bytes, machine: str, timeout_s: float) -> None:
        """Returns when it is loaded; once a slot, which is closed with it.

        The guest's RAM must be in place or be served: the load reads it. GuestError with QEMU's own
        reason.
        """
        _write(self._memory, splice(state, machine))
        self.close()
        await _begin(self._monitor, timeout_s)
        await _wait_loaded(self._monitor, timeout_s)

    def close(self) -> None:
        """Closes our end; twice is harmless."""
        if self._memory >= 0:
            os.close(self._memory)
            self._memory = -1


def _write(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


async def _begin(monitor: Monitor, timeout_s: float) -> None:
    arguments: dict[str, object] = {"uri": f"fd:{_DESCRIPTOR_NAME}"}
    try:
        # Keeps a QEMU whose load fails alive, so that it can say why (from 9.1 on).
        await monitor.execute("migrate-incoming", arguments | {"exit-on-error": False}, timeout_s)
    except CommandFailed as error:
        if "exit-on-error" not in error.description:
            raise
        await monitor.execute("migrate-incoming", arguments, timeout_s)


async def _wait_loaded(monitor: Monitor, timeout_s: float) -> None:
    """Asks until it is: the event for it would need a capability to be set within the downtime.

    With pages missing the main loop itself may wait for one, and so may an answer.
    """
    until = time.monotonic() + timeout_s
    asked = 0
    while (left := until - time.monotonic()) > 0:
        try:
            status = await monitor.execute("query-status", timeout_s=left)
            if isinstance(status, dict) and status.get("status") != "inmigrate":
                return
            asked += 1
            if asked % ASK_WHY_EVERY:
                # The guest stands still meanwhile: only a failed load can wait to be noticed.
                continue
            load = await monitor.execute("query-migrate", timeout_s=left)
        except CommandFailed:
            raise
        except GuestError as error:
            raise GuestError(
                f"guest {monitor.guest} did not load the device state: its QEMU ended or hangs"
            ) from error
        if isinstance(load, dict) and load.get("status") == "failed":
            raise GuestError(_failure(monitor.guest, str(load.get("error-desc", "no reason"))))
        await asyncio.sleep(PAUSE_S)
    raise GuestError(f"guest {monitor.guest} did not load its device state in {timeout_s:g} s")


def _failure(guest: str, reason: str) -> str:
    hint = " (its firmware's RAM is not in place)" if _ROM_NOT_THERE in reason else ""
    return f"guest {guest} cannot load the device state: {reason}{hint}"
