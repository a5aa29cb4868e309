"""A lab comes up, a guest boots, the client measures, QEMU migrates it, and nothing is left."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vmferry.errors import GuestError
from vmferry.lab import leftovers
from vmferry.lab.baseline import QemuMode
from vmferry.lab.guests import Load
from vmferry.lab.lab import Lab
from vmferry.lab.network import NAMESPACES, ROLES, Topology
from vmferry.lab.qemus import QemuBinary

SMALL = Load(area_mib=32, megabytes_per_s=20)


def left_of(lab: Lab) -> list[str]:
    """Namespaces, files and processes that are still there."""
    names = [lab.topology.namespace(role) for role in ROLES]
    left = [name for name in names if (NAMESPACES / name).exists()]
    if lab.directory.exists():
        left.append(str(lab.directory))
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and entry.name != str(os.getpid()):
            try:
                words = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if lab.topology.prefix in words or str(lab.directory) in words:
                left.append(words)
    return left


@pytest.mark.usefixtures("machine")
def test_an_empty_lab_leaves_nothing_and_several_may_live() -> None:
    async def scenario() -> list[Lab]:
        async with Lab() as first, Lab() as second:
            assert first.id != second.id
            assert (NAMESPACES / first.topology.namespace("s")).exists()
            assert first.id not in await asyncio.to_thread(leftovers.clean), "it lives"
            await first.shape(1000)
            await first.shape(100)
            await first.shape(None)
            await first.shape(None)
        return [first, second]

    for lab in asyncio.run(scenario()):
        assert left_of(lab) == []


def test_qemu_migrates_a_guest_under_load_both_ways(binary: QemuBinary) -> None:
    async def scenario() -> Lab:
        async with Lab() as lab:
            guest = await lab.boot_guest(binary=binary, load=SMALL)
            client = await lab.start_client(guest)
            begin = client.mark()
            before = await guest.counts()
            quiet = await client.window(begin)
            assert quiet.echoes_lost == 0
            assert quiet.echoes_sent > 0
            assert quiet.tcp_replies > 0
            modes: tuple[QemuMode, QemuMode] = ("pre-copy", "post-copy")
            for mode, host in zip(modes, ("b", "a"), strict=True):
                outcome = await lab.migrate_with_qemu(guest, mode, client=client)
                assert guest.locate()[0] == host
                assert 0 < outcome.migration.downtime_ms < outcome.migration.total_s * 1000
                assert outcome.link_bytes >= outcome.migration.pages_transferred * 4096
                assert outcome.window is not None
                assert outcome.window.blackout_ms > 0
                assert outcome.window.tcp_intact
                after = await guest.counts()
                assert after.ticks > before.ticks
                assert after.pages_written > before.pages_written
                assert after.disk_operations > before.disk_operations
                assert (after.corrupt, after.disk_bad, after.died) == (0, 0, 0)
                before = after
        return lab

    assert left_of(asyncio.run(scenario())) == []


def test_the_load_and_the_client_notice_what_is_wrong(machine: None) -> None:
    """A page written from outside is CORRUPT; a guest that stands still is a blackout."""

    async def scenario() -> None:
        async with Lab() as lab:
            guest = await lab.boot_guest(load=SMALL, machine="pc", disk_load=False)
            client = await lab.start_client(guest)
            assert (await guest.counts()).corrupt == 0
            _, process = guest.locate()

            begin = client.mark()
            os.kill(process.pid, signal.SIGSTOP)
            await asyncio.sleep(0.5)
            os.kill(process.pid, signal.SIGCONT)
            assert (await client.window(begin)).blackout_ms >= 400

            spoil_a_load_page(process.pid)
            while (await guest.counts()).corrupt == 0:
                pass
            await lab.end_guest(guest)
            with pytest.raises(GuestError, match="on neither host"):
                guest.locate()

    asyncio.run(scenario())


def spoil_a_load_page(pid: int) -> None:
    """Changes one byte of each of 64 pages of the load's area (they hold syllables)."""
    spoiled = 0
    with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            first, _, last = line.split()[0].partition("-")
            start, end = int(first, 16), int(last, 16)
            if end - start != 512 << 20:
                continue
            for page in range(start + (200 << 20), end, 4096):
                memory.seek(page)
                content = memory.read(4096)
                if content.count(b"the ") > 20 and content[8:16] > bytes(8):
                    memory.seek(page + 2000)
                    memory.write(bytes([content[2000] ^ 1]))
                    spoiled += 1
                    if spoiled == 64:
                        return
    assert spoiled > 0, "the load's pages were not found"


@pytest.mark.usefixtures("machine")
def test_what_a_killed_lab_leaves_is_removed() -> None:
    script = (
        "import asyncio\n"
        "from vmferry.lab.lab import Lab\n"
        "from vmferry.lab.guests import IDLE\n"
        "async def main():\n"
        "    lab = await Lab().__aenter__()\n"
        "    await lab.boot_guest(load=IDLE)\n"
        "    print(lab.id, flush=True)\n"
        "    await asyncio.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        lab_id = process.stdout.readline().decode().strip()
        process.kill()
    topology = Topology(leftovers.PREFIX + lab_id)
    assert topology.processes(), "the guest outlived its lab"
    assert lab_id in leftovers.clean()
    assert topology.processes() == []
    assert not (NAMESPACES / topology.namespace("a")).exists()
    assert not (leftovers.LABS / lab_id).exists()
