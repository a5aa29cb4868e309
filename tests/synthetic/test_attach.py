"""The core on the synthetic guest: found, tracked, copied and kept as a QEMU is."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
from pathlib import Path

import pytest

from vmferry import _core
from vmferry.lab import synthetic

from .monitor import blocks, copy_memory, load, monitor, save, splice

needs_userfaultfd = pytest.mark.skipif(
    not Path("/dev/userfaultfd").exists() or os.geteuid() != 0,
    reason="needs root and a kernel with userfaultfd",
)


async def memory_of(guest: synthetic.SyntheticGuest) -> _core.Memory:
    async with monitor(guest) as client:
        found = await blocks(client)
    return _core.Memory(
        guest.pid, [_core.Block(name, address, size) for name, (address, size) in found.items()]
    )


def test_ram_is_marked_as_qemus_is(tmp_path: Path) -> None:
    """`dc` (MADV_DONTFORK) in /proc/PID/smaps tells RAM blocks from the heap: exactly those."""

    async def run() -> None:
        guest = await synthetic.start(tmp_path, area_mib=1)
        try:
            async with monitor(guest) as client:
                expected = {(address, size) for address, size in (await blocks(client)).values()}
            marked, here = set(), (0, 0)
            for line in Path(f"/proc/{guest.pid}/smaps").read_text().splitlines():
                if line.startswith("VmFlags:") and "dc" in line.split():
                    marked.add(here)
                elif (parts := line.split()) and "-" in parts[0] and ":" not in parts[0]:
                    start, stop = (int(part, 16) for part in parts[0].split("-"))
                    here = (start, stop - start)
            assert marked == expected
        finally:
            await guest.end()

    asyncio.run(run())


@needs_userfaultfd
@pytest.mark.parametrize("pattern", ["text", "zero"])
def test_rounds_of_the_core_move_it_while_it_writes(tmp_path: Path, pattern: str) -> None:
    """Scan, copy, again, stop, the rest: by the core's tracker on the writing guest."""

    async def run() -> None:
        start = functools.partial(
            synthetic.start, tmp_path, area_mib=8, memory_mib=40, vcpus=2, pattern=pattern
        )
        source = await start(name="a")
        target = await start(name="b", incoming=True)
        try:
            mine, theirs = await memory_of(source), await memory_of(target)
            number, _ = _core.inject_userfaultfd(source.pid, user_mode_only=True, keep_open=False)
            tracker = _core.Tracker(mine, number)
            first = tracker.scan()
            assert len(first) >= 8 * 256 + 12
            assert first.ranges(0)[-1][1] <= 8 * 256 + 512, "never-touched RAM is not reported"
            copy(mine, theirs, first)
            for _ in range(3):
                copy(mine, theirs, tracker.scan())
            async with monitor(source) as client:
                await client.execute("stop")
                copy(mine, theirs, tracker.scan())
                assert not tracker.scan()
                state = await save(client)
            tracker.close()
            assert _core.find_userfaultfd(source.pid) == []
            assert _core.count_differing(mine.digests(), theirs.digests()) == 0
            async with monitor(target) as client:
                await load(client, splice(state))
                await client.execute("cont")
            verdict = await synthetic.check(target.check_path, sweep=True)
            assert (verdict.corrupt, verdict.differing) == (0, 0)
        finally:
            await source.end()
            await target.end()

    asyncio.run(run())


@needs_userfaultfd
def test_the_keeper_holds_its_memory_when_it_is_dead(tmp_path: Path) -> None:
    async def run() -> None:
        source = await synthetic.start(tmp_path, name="a", area_mib=4, memory_mib=8)
        target = await synthetic.start(tmp_path, name="b", area_mib=4, memory_mib=8, incoming=True)
        keeper = 0
        try:
            async with monitor(source) as client:
                await client.execute("stop")
                state = await save(client)
                found = await blocks(client)
            before = (await memory_of(source)).digests()
            keeper = _core.make_keeper(source.pid)
            await source.end()
            kept = _core.Memory(
                keeper, [_core.Block(name, *place) for name, place in found.items()]
            )
            assert kept.digests() == before
            await copy_memory(keeper, found, target)
            async with monitor(target) as client:
                await load(client, splice(state))
                await client.execute("cont")
            verdict = await synthetic.check(target.check_path, sweep=True)
            assert (verdict.corrupt, verdict.differing) == (0, 0)
        finally:
            if keeper:
                os.kill(keeper, signal.SIGKILL)
            await source.end()
            await target.end()

    asyncio.run(run())


def copy(source: _core.Memory, target: _core.Memory, pages: _core.PageSet) -> None:
    for block in range(len(source.shape)):
        for start, stop in pages.ranges(block):
            offset, length = start * _core.PAGE_SIZE, (stop - start) * _core.PAGE_SIZE
            target.write(block, offset, source.read(block, offset, length))
