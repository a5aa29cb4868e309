"""The checks of this folder can fail."""

from __future__ import annotations

import asyncio
import os
import shutil

import pytest
from tests.faults import traces
from tests.faults.conftest import Play
from tests.faults.stage import Stage
from tests.faults.witness import Witness

from vmferry import _core
from vmferry.guest.launch import launch
from vmferry.guest.monitor import Monitor
from vmferry.guest.process import GuestProcess
from vmferry.lab.network import HostName


async def _bare_qemu(stage: Stage, host: HostName, name: str) -> GuestProcess:
    folder = stage.lab.directory
    words = ["-name", f"guest={name}", "-M", "none", "-display", "none", "-S"]
    for number in range(2):
        words += ["-qmp", f"unix:{folder}/{name}-{host}-{number},server=on,wait=off"]
    return await launch(
        [*stage.lab.topology.command(host), *stage.guest.spec.binary.command, *words],
        exe=shutil.which("nsenter") or "/usr/bin/nsenter",
        cwd=str(folder),
        uid=os.geteuid(),
        gid=os.getegid(),
        log=folder / "bare.log",
    )


def test_the_witness_sees_two_that_run_at_a_time(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        pair = [await _bare_qemu(stage, host, "twin") for host in ("a", "b")]
        async with Witness(stage.lab.topology, "twin") as witness:
            assert await witness.look() == []
            for ran, process in enumerate(pair):
                assert len(await witness.look()) == ran
                monitor = await Monitor.connect(process.qmp)
                await monitor.cont()
                await monitor.disconnect()
            assert await witness.look() == sorted(process.pid for process in pair)
            while not witness.sightings:  # noqa: ASYNC110 - a task of its own fills it
                await asyncio.sleep(0)
        for process in pair:
            os.kill(process.pid, 9)

    play(scene)


def test_traces_are_seen(play: Play) -> None:
    """A keeper, a userfaultfd and a process at the other host, while a move is held."""

    async def scene(stage: Stage) -> None:
        async with stage.attempt("post-copy", "source:stopped") as attempt:
            found = list(traces.in_process(attempt.process))
            assert any("registered" in trace for trace in found)
            assert any("children" in trace for trace in found)
            (there,) = attempt.arriving()
            assert _core.find_userfaultfd(there) != []
            with pytest.raises(AssertionError, match="does not run"):
                await attempt.assert_goes_on(limit_s=1)
            folder = attempt.destination.state_dir / "guests"
            assert [path for path in folder.iterdir() if path not in attempt.left] != []
            attempt.interrupt()
            await attempt.end()
            await attempt.assert_untouched()

    play(scene)
