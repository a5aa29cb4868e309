"""The synthetic guest, spoken to as a QEMU is and moved by hand."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
from qemu.qmp import EventListener, ExecuteError, QMPClient

from vmferry.lab import synthetic

from .monitor import blocks, copy_memory, load, monitor, save, splice


@contextlib.asynccontextmanager
async def pair(
    directory: Path, *extra: str, pattern: str = "text", vcpus: int = 2
) -> AsyncGenerator[tuple[synthetic.SyntheticGuest, synthetic.SyntheticGuest]]:
    source = await synthetic.start(
        directory, name="a", area_mib=4, memory_mib=8, vcpus=vcpus, pattern=pattern, extra=extra
    )
    target = await synthetic.start(
        directory,
        name="b",
        area_mib=4,
        memory_mib=8,
        vcpus=vcpus,
        pattern=pattern,
        incoming=True,
        extra=extra,
    )
    try:
        yield source, target
    finally:
        await source.end()
        await target.end()


async def copy_all(
    source: synthetic.SyntheticGuest,
    target: synthetic.SyntheticGuest,
    skip: tuple[str, int] | None = None,
) -> None:
    async with monitor(source) as client:
        mine = await blocks(client)
    await copy_memory(source.pid, mine, target, skip)


async def writes_reach(path: Path, count: int) -> synthetic.Check:
    """The guest's own progress is the event: it rewrites some 10,000 pages a second."""
    async with asyncio.timeout(30):
        while (verdict := await synthetic.check(path)).writes < count:
            pass
    return verdict


@pytest.mark.parametrize("pattern", ["text", "random", "zero"])
def test_a_whole_copy_runs_on_without_a_corrupt_page(tmp_path: Path, pattern: str) -> None:
    async def move() -> None:
        async with pair(tmp_path, pattern=pattern) as (source, target):
            await writes_reach(source.check_path, 2000)
            async with monitor(source) as client:
                await client.execute("stop")
                state = await save(client)
            before = await synthetic.check(source.check_path)
            await copy_all(source, target)
            async with monitor(target) as client:
                with client.listener("RESUME") as resumes:
                    await load(client, splice(state))
                    assert await client.execute("query-status") == {
                        "status": "paused",
                        "running": False,
                    }
                    await client.execute("cont")
                    await resumes.get()
            after = await writes_reach(target.check_path, before.writes + 2000)
            swept = await synthetic.check(target.check_path, sweep=True)
            assert (after.corrupt, swept.corrupt, swept.differing) == (0, 0, 0)
            assert swept.swept > 1024
            assert target.log_path.read_text() == ""

    asyncio.run(move())


@pytest.mark.parametrize("lost", [("synthetic.ram", 17), ("synthetic.rom", 3)])
def test_a_forgotten_page_is_reported(tmp_path: Path, lost: tuple[str, int]) -> None:
    async def move() -> None:
        async with pair(tmp_path) as (source, target):
            async with monitor(source) as client:
                await client.execute("stop")
                state = await save(client)
            await copy_all(source, target, skip=lost)
            async with monitor(target) as client:
                await load(client, splice(state))
            verdict = await synthetic.check(target.check_path, sweep=True)
            assert verdict.differing == 1
            said = target.log_path.read_text()
            assert re.match(rf"CORRUPT (rom )?page {lost[1]} generation \d+: .*found zeros", said)
            # The vCPUs come by it as well.
            async with monitor(target) as client:
                await client.execute("cont")
            async with asyncio.timeout(60):
                while (await synthetic.check(target.check_path)).corrupt == 0:
                    pass

    asyncio.run(move())


def test_a_stale_page_is_reported(tmp_path: Path) -> None:
    async def move() -> None:
        async with pair(tmp_path) as (source, target):
            await copy_all(source, target)
            verdict = await synthetic.check(source.check_path)
            await writes_reach(source.check_path, verdict.writes + 100)
            async with monitor(source) as client:
                await client.execute("stop")
                state = await save(client)
            async with monitor(target) as client:
                await load(client, splice(state))
            assert (await synthetic.check(target.check_path, sweep=True)).differing > 0

    asyncio.run(move())


def test_stop_halts_every_vcpu_and_events_carry_times(tmp_path: Path) -> None:
    async def run() -> None:
        guest = await synthetic.start(tmp_path, vcpus=3, area_mib=2)
        listener = EventListener(["STOP", "RESUME"])
        try:
            async with monitor(guest) as client:
                client.register_listener(listener)
                await client.execute("stop")
                first = await client.execute("x-synthetic-check", {"sweep": True})
                assert await client.execute("x-synthetic-check", {"sweep": True}) == first
                await client.execute("cont")
                names = [(await listener.get()) for _ in range(2)]
                assert [event["event"] for event in names] == ["STOP", "RESUME"]
                for event in names:
                    at = event["timestamp"]
                    assert isinstance(at, dict)
                    assert set(at) == {"seconds", "microseconds"}
        finally:
            await guest.end()

    asyncio.run(run())


def test_a_save_of_the_running_guest_stops_and_restarts_it(tmp_path: Path) -> None:
    async def run() -> None:
        guest = await synthetic.start(tmp_path, area_mib=2)
        try:
            async with monitor(guest) as client:
                listener = EventListener(["STOP", "RESUME"])
                client.register_listener(listener)
                await save(client)
                assert [(await listener.get())["event"] for _ in range(2)] == ["STOP", "RESUME"]
                status = await client.execute("query-status")
                assert status == {"status": "running", "running": True}
        finally:
            await guest.end()

    asyncio.run(run())


def test_errors_are_qemus(tmp_path: Path) -> None:
    cases: list[tuple[str, dict[str, object], str]] = [
        ("no-such-command", {}, "The command no-such-command has not been found"),
        ("stop", {"now": 1}, "Parameter 'now' is unexpected"),
        ("getfd", {"fdname": "x"}, "No file descriptor supplied via SCM_RIGHTS"),
        ("getfd", {}, "Parameter 'fdname' is missing"),
        ("closefd", {"fdname": 3}, "Invalid parameter type for 'fdname', expected: string"),
        ("remove-fd", {"fdset-id": 3}, "File descriptor named 'fdset-id:3' not found"),
        ("blockdev-del", {"node-name": "x"}, "Failed to find node with node-name='x'"),
        (
            "migrate-incoming",
            {"uri": "fd:x"},
            "'-incoming' was not specified on the command line",
        ),
        (
            "xen-save-devices-state",
            {"filename": "/dev/fdset/9"},
            "Could not open '/dev/fdset/9': No such file or directory",
        ),
    ]

    async def run() -> None:
        guest = await synthetic.start(tmp_path, area_mib=1)
        try:
            async with monitor(guest) as client:
                for command, arguments, text in cases:
                    with pytest.raises(ExecuteError) as caught:
                        await client.execute(command, arguments)
                    assert str(caught.value) == text
                await client.execute("blockdev-add", {"driver": "null-co", "node-name": "n"})
                line = {"command-line": "qemu-io n aio_flush"}
                assert await client.execute("human-monitor-command", line) == ""
                await client.execute("blockdev-del", {"node-name": "n"})
                assert "Cannot find" in str(await client.execute("human-monitor-command", line))
        finally:
            await guest.end()

    asyncio.run(run())


def test_bad_input_never_ends_it(tmp_path: Path) -> None:
    lines = [
        b"{]\n",
        b"[1]\n",
        b'{"execute": 1}\n',
        b'{"execute": "stop", "arguments": 3}\n',
        b'{"run": "stop"}\n',
        b'{"execute": "query-name"}' * 3,
        b"\xff\xfe\n",
        b"[" * 500 + b"\n",
        b'{"execute": "xen-save-devices-state", "arguments": {"filename": "/no/such/dir/f"}}\n',
        b'{"execute": "blockdev-add", "arguments": {"driver": {}}}\n',
        b'{"execute": "add-fd", "arguments": {"fdset-id": -1}}\n',
    ]

    async def run() -> None:
        guest = await synthetic.start(tmp_path, area_mib=1)
        try:
            reader, writer = await asyncio.open_unix_connection(guest.qmp_path)
            await reader.readline()
            writer.write(b'{"execute": "qmp_capabilities"}\n')
            await reader.readline()
            for line in lines:
                writer.write(line + b'\n{"execute": "query-uuid", "id": "end"}\n')
                async with asyncio.timeout(5):
                    while json.loads(await reader.readline()).get("id") != "end":
                        pass
            writer.write(b'{"execute": "' + b"x" * (2 << 20))
            async with asyncio.timeout(5):
                with contextlib.suppress(ConnectionError):
                    await reader.read()
            writer.close()
            assert (await synthetic.check(guest.check_path)).corrupt == 0
        finally:
            await guest.end()

    asyncio.run(run())


def test_a_refused_state_ends_it_unless_told_otherwise(tmp_path: Path) -> None:
    async def run() -> None:
        async with pair(tmp_path) as (source, target):
            async with monitor(source) as client:
                await client.execute("stop")
                state = await save(client)
            async with monitor(target) as client:
                await load(client, state, **{"exit-on-error": False})
                answer = await client.execute("query-migrate")
                assert answer == {
                    "status": "failed",
                    "error-desc": "Configuration section missing",
                }
            other = await synthetic.start(
                tmp_path, name="c", area_mib=2, memory_mib=8, incoming=True
            )
            client = QMPClient()
            await client.connect(str(other.qmp_path))
            await load(client, splice(state))
            assert await other.process.wait() == 1
            assert "differ from the source's" in other.log_path.read_text()
            with contextlib.suppress(EOFError):
                await client.disconnect()

    asyncio.run(run())


def test_it_refuses_to_move_when_blocked(tmp_path: Path) -> None:
    async def run() -> None:
        guest = await synthetic.start(tmp_path, area_mib=1, extra=("-blocked", "a device says no"))
        try:
            async with monitor(guest) as client:
                answer = await client.execute("query-migrate")
                assert answer == {"blocked-reasons": ["a device says no"]}
        finally:
            await guest.end()

    asyncio.run(run())


def test_a_wrong_command_line_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="-bogus: invalid option"):
        asyncio.run(synthetic.start(tmp_path, extra=("-bogus", "1")))
