"""A QEMU that is started outlives its starter, and says why when it does not start."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vmferry.engine.fence import kill_process
from vmferry.errors import GuestError, Refused
from vmferry.guest.launch import launch
from vmferry.guest.process import GuestProcess, read_process
from vmferry.guest.qemu import Qemu

from .bench import Bench, has_ended

SRC = Path(__file__).parents[2] / "src"


async def start(bench: Bench, argv: list[str], uid: int = 0, gid: int = 0) -> GuestProcess:
    folder, exe = str(bench.folder), str(bench.binary.path)
    return await launch(argv, exe=exe, cwd=folder, uid=uid, gid=gid, log=bench.folder / "log")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-device", "no-such-device"], "no-such-device"),
        (["-frobnicate"], "frobnicate"),
        (["-m", "99999G"], "code 1"),
    ],
)
def test_a_command_line_that_is_wrong(bench: Bench, words: list[str], said: str) -> None:
    with pytest.raises(GuestError, match="ended at its start") as failed:
        asyncio.run(start(bench, bench.argv("pc", *words)))
    assert said in str(failed.value)
    assert not [
        entry
        for entry in Path("/proc").iterdir()
        if entry.name.isdecimal() and _works_in(entry, bench.folder)
    ]


def test_a_program_that_is_not_there(bench: Bench) -> None:
    with pytest.raises(GuestError, match="cannot be started"):
        asyncio.run(
            launch(
                bench.argv("pc"),
                exe="/nowhere/qemu",
                cwd=str(bench.folder),
                uid=0,
                gid=0,
                log=bench.folder / "log",
            )
        )


def test_a_guest_without_a_monitor_is_not_started(bench: Bench) -> None:
    with pytest.raises(Refused, match="without a QMP socket"):
        asyncio.run(start(bench, [str(bench.binary.path), "-S"]))


def test_it_outlives_a_starter_that_is_killed(bench: Bench) -> None:
    script = (
        "import asyncio, os, signal, sys\n"
        "from pathlib import Path\n"
        "from vmferry.guest.launch import launch\n"
        "folder, exe, *argv = sys.argv[1:]\n"
        "started = asyncio.run(launch(argv, exe=exe, cwd=folder, uid=os.geteuid(),\n"
        "    gid=os.getegid(), log=Path(folder, 'log')))\n"
        "print(started.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    words = [str(bench.folder), str(bench.binary.path), *bench.argv("pc")]
    starter = subprocess.run(
        [sys.executable, "-c", script, *words],
        stdout=subprocess.PIPE,
        check=False,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(SRC)},
    )
    assert starter.returncode == -signal.SIGKILL
    process = read_process(int(starter.stdout))

    async def scenario() -> None:
        try:
            guest = await Qemu.attach(process)
            assert await guest.running()
            await guest.close()
        finally:
            await kill_process(process.pid, process.start_time)

    asyncio.run(scenario())


def test_it_is_of_no_ones_session_and_holds_nothing_of_ours(bench: Bench) -> None:
    ours = os.open(bench.folder, os.O_RDONLY)
    os.set_inheritable(ours, True)

    async def scenario() -> None:
        process = await start(bench, bench.argv("pc"))
        try:
            assert os.getsid(process.pid) == process.pid
            descriptors = [e.readlink() for e in Path(f"/proc/{process.pid}/fd").iterdir()]
            assert bench.folder not in descriptors
            assert Path(f"/proc/{process.pid}/fd/0").readlink() == Path("/dev/null")
            assert Path(f"/proc/{process.pid}/fd/2").readlink() == bench.folder / "log"
        finally:
            await kill_process(process.pid, process.start_time)

    try:
        asyncio.run(scenario())
    finally:
        os.close(ours)


def test_it_is_reaped_when_it_ends(bench: Bench) -> None:
    async def scenario() -> None:
        process = await start(bench, bench.argv("pc"))
        await kill_process(process.pid, process.start_time)
        until = time.monotonic() + 10
        while Path(f"/proc/{process.pid}").exists():
            assert time.monotonic() < until
            await asyncio.sleep(0.01)

    asyncio.run(scenario())


def test_it_belongs_to_the_guests_user(bench: Bench) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can start a process of somebody else")
    bench.folder.chmod(0o777)

    async def scenario() -> None:
        process = await start(bench, bench.argv("pc"), 65534, 65533)
        try:
            assert (process.uid, process.gid) == (65534, 65533)
            status = Path(f"/proc/{process.pid}/status").read_text()
            assert "Uid:\t65534\t65534\t65534\t65534" in status
            assert "CapEff:\t0000000000000000" in status
            guest = await Qemu.attach(process)
            # A descriptor reaches a process that could not open the file itself.
            await guest.stop()
            assert (await guest.save_device_state()).startswith(b"QEVM")
            await guest.close()
        finally:
            await kill_process(process.pid, process.start_time)

    asyncio.run(scenario())


def test_a_start_that_is_cancelled_leaves_nothing(bench: Bench) -> None:
    # It waits in its connect before it serves anything.
    argv = bench.argv("pc", "-chardev", f"socket,id=w,path={bench.folder}/w,server=on,wait=on")

    async def scenario() -> int:
        starting = asyncio.create_task(start(bench, argv))
        until = time.monotonic() + 10
        while not (bench.folder / "w").exists():
            assert time.monotonic() < until
            await asyncio.sleep(0.01)
        pid = next(
            int(entry.name)
            for entry in Path("/proc").iterdir()
            if entry.name.isdecimal() and _works_in(entry, bench.folder)
        )
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        return pid

    pid = asyncio.run(scenario())
    assert not Path(f"/proc/{pid}").exists() or has_ended_pid(pid)


def has_ended_pid(pid: int) -> bool:
    return has_ended(GuestProcess(pid, 0, "", [], "", "", 0, 0, ""))


def _works_in(entry: Path, folder: Path) -> bool:
    try:
        return (entry / "cwd").readlink() == folder
    except OSError:
        return False
