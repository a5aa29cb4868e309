"""The QEMU that waits at the destination: started, looked at, made ready, or taken away again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import uuid
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vmferry import _core
from vmferry._core import Memory
from vmferry.engine.fence import kill_process
from vmferry.engine.ports import DestinationHost
from vmferry.errors import GuestError, Refused
from vmferry.guest.commandline import Places, Rewritten, rewrite
from vmferry.guest.launch import last_words, launch
from vmferry.guest.process import GuestProcess
from vmferry.guest.qemu import Qemu
from vmferry.guest.tree import differences, object_tree
from vmferry.network.cards import Card, DestinationNetwork
from vmferry.wire import messages as m

FAULT_DEVICE = Path("/dev/userfaultfd")
QEMU_LOG = "qemu.log"


@dataclass
class Waiting:
    """A destination's QEMU between its start and its guest's independence."""

    process: GuestProcess
    guest: Qemu
    memory: Memory
    network: DestinationNetwork
    changes: list[str]
    directory: Path
    files: list[Path]
    died: asyncio.Future[None]
    """Done when the process has ended."""
    pidfd: int
    userfaultfd: int | None = None
    userfaultfd_there: int = -1
    """Its number inside the QEMU, where it stays open until the guest is independent: with the
    last descriptor the kernel would give waiting accesses pages of zeros."""
    problems: list[str] = field(default_factory=list)

    def take_userfaultfd(self) -> int:
        """Hands the descriptor to its server."""
        assert self.userfaultfd is not None
        descriptor, self.userfaultfd = self.userfaultfd, None
        return descriptor

    def draw_network(self, cards: Sequence[m.NetworkCard]) -> None:
        """Draws the traffic of every NIC here; what does not work is kept for the timeline."""
        for card in cards:
            self.problems += self.network.draw(card.mac, card.addresses)

    def last_words(self) -> str:
        """What the QEMU said last."""
        return last_words(self.directory / QEMU_LOG)

    async def independent(self) -> None:
        """The guest needs us no more: closes what we held in it, and our monitor."""
        if self.userfaultfd_there >= 0:
            with contextlib.suppress(OSError, _core.CoreError):
                await asyncio.to_thread(
                    _core.inject_close, self.process.pid, self.userfaultfd_there
                )
        await self.let_go()

    async def let_go(self) -> None:
        """Leaves the QEMU as it is, and disconnects."""
        self.network.close()
        await self.guest.close()
        self._forget()

    async def discard(self) -> None:
        """Kills the QEMU, and removes what it and we have made."""
        self.guest.expect_end()
        await kill_process(self.process.pid, self.process.start_time)
        self.network.close()
        await self.guest.close()
        self._forget()
        _remove(self.directory, self.files)

    def _forget(self) -> None:
        if self.userfaultfd is not None:
            os.close(self.take_userfaultfd())
        if self.pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self.pidfd)
            os.close(self.pidfd)
            self.pidfd = -1


async def prepare(offer: m.Offer, host: DestinationHost) -> Waiting:
    """Starts the destination's QEMU for an offer; Refused, with nothing left, when it cannot be."""
    await DestinationNetwork.refuse_if_missing(_cards(offer))
    _refuse_if_short(offer, host)
    directory = host.state_dir / "guests" / f"{_safe(offer.guest)}-{uuid.uuid4().hex[:8]}"
    directory.mkdir(parents=True, mode=0o700)
    os.chown(directory, offer.process.uid, offer.process.gid)
    files: list[Path] = []
    process: GuestProcess | None = None
    try:
        if not os.access(offer.process.exe, os.X_OK):
            raise Refused(
                f"guest {offer.guest} runs {offer.process.exe}, and {host.name} has no such "
                "program; install the same QEMU there"
            )
        rewritten = rewrite(
            offer.process.argv,
            Places(directory, {card.mac: card.tap for card in offer.cards}, offer.machine),
        )
        files = rewritten.files
        with _fault_device(offer.demand_paging) as device:
            try:
                process = await launch(
                    rewritten.argv,
                    exe=offer.process.exe,
                    cwd=offer.process.cwd,
                    uid=offer.process.uid,
                    gid=offer.process.gid,
                    log=directory / QEMU_LOG,
                    pass_fds=() if device is None else (device,),
                )
            except GuestError as error:
                raise Refused(f"the destination's QEMU does not start: {error}") from error
            return await _look(offer, process, directory, rewritten, device)
    except BaseException:
        if process is not None:
            await kill_process(process.pid, process.start_time)
        _remove(directory, files)
        raise


async def _look(
    offer: m.Offer,
    process: GuestProcess,
    directory: Path,
    rewritten: Rewritten,
    device: int | None,
) -> Waiting:
    guest = await Qemu.attach(process)
    try:
        blocks = {ram.block.name: ram for ram in await guest.ram()}
        sizes = {name: (ram.block.length, ram.used) for name, ram in blocks.items()}
        _refuse_if_unlike(offer, sizes, differences(offer.tree, await object_tree(guest.monitor)))
        memory = Memory(process.pid, [blocks[shape.name].block for shape in offer.blocks])
        network = await DestinationNetwork.join(_cards(offer))
    except BaseException:
        guest.expect_end()
        await guest.close()
        raise
    pidfd = os.pidfd_open(process.pid)
    loop = asyncio.get_running_loop()
    died: asyncio.Future[None] = loop.create_future()
    loop.add_reader(pidfd, lambda: died.done() or died.set_result(None))
    waiting = Waiting(
        process=process,
        guest=guest,
        memory=memory,
        network=network,
        changes=rewritten.changes,
        directory=directory,
        files=rewritten.files,
        died=died,
        pidfd=pidfd,
    )
    try:
        await asyncio.to_thread(_empty, waiting)
        await guest.prepare_load()
        if offer.demand_paging:
            ours, there = await asyncio.to_thread(_inject, process.pid, device)
            waiting.userfaultfd, waiting.userfaultfd_there = ours, there
    except BaseException as error:
        await waiting.discard()
        if isinstance(error, OSError | _core.CoreError):
            raise Refused(
                f"the destination cannot page guest {offer.guest} on demand: {error}; "
                "`vmferry check` there says what it lacks, and pre-copy does without"
            ) from error
        raise
    return waiting


def _cards(offer: m.Offer) -> list[Card]:
    return [Card(card.mac, card.tap, card.bridge) for card in offer.cards]


def _empty(waiting: Waiting) -> None:
    # What its firmware has put into RAM is not the guest's: a page that is a hole at the source
    # must read as zeros, and a page that is there would never fault.
    populated = waiting.memory.populated()
    for index, block in enumerate(waiting.memory.blocks):
        if populated.count(index) and not block.shared:
            _core.inject_discard(waiting.process.pid, block.address, block.length)


def _inject(pid: int, device: int | None) -> tuple[int, int]:
    if device is None:
        return _core.inject_userfaultfd(pid, user_mode_only=False, keep_open=True)
    ours = _core.inject_userfaultfd_from(pid, device, keep_open=True)
    _core.inject_close(pid, device)
    return ours


@contextlib.contextmanager
def _fault_device(wanted: bool) -> Generator[int | None]:
    """/dev/userfaultfd gives descriptors that take kernel-mode faults to a QEMU without privilege;
    KVM stops the guest without them."""
    if not wanted or not FAULT_DEVICE.exists():
        yield None
        return
    try:
        descriptor = os.open(FAULT_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def clear_departed(process: GuestProcess, state_dir: Path) -> None:
    """Removes what a guest that came here once and has left again needs no more: sockets and empty
    files. What its devices have written (a serial console's log) stays."""
    directory = Path(process.qmp).parent
    if directory.parent != state_dir / "guests":
        return
    for path in directory.iterdir():
        if path.is_socket() or path.name == QEMU_LOG or not path.stat().st_size:
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        directory.rmdir()


def _refuse_if_unlike(
    offer: m.Offer, blocks: dict[str, tuple[int, int]], unlike: list[str]
) -> None:
    if unlike:
        raise Refused(
            f"guest {offer.guest} is not what its command line says, so the destination's QEMU is "
            f"another machine ({'; '.join(unlike)}): take out what was plugged in after its start"
        )
    differing = [
        shape.name for shape in offer.blocks if blocks.get(shape.name) != (shape.length, shape.used)
    ]
    extra = sorted(blocks.keys() - {shape.name for shape in offer.blocks})
    if differing or extra:
        raise Refused(
            f"the destination's QEMU has other memory than guest {offer.guest} (RAM blocks "
            f"{', '.join(differing + extra)}): a device was plugged in or out after the start, or "
            "the firmware differs"
        )


def _refuse_if_short(offer: m.Offer, host: DestinationHost) -> None:
    needed = sum(shape.length for shape in offer.blocks)
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) << 10
            if needed > available:
                raise Refused(
                    f"guest {offer.guest} needs {needed >> 20} MiB, and {host.name} has "
                    f"{available >> 20} MiB available"
                )


def _remove(directory: Path, files: Sequence[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)


def _safe(name: str) -> str:
    """A guest's name as part of a path; short, since a socket's path has 107 bytes."""
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in name)[:20] or "guest"
