"""`vmferry move` against a daemon that plays its part by a script: progress, Ctrl-C, reports."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from tests.cli.host_processes import COMMAND

from vmferry.host.api import (
    MESSAGE_BYTES_MAX,
    REQUESTS,
    SOCKET_NAME,
    Answer,
    Cancel,
    Ended,
    Failed,
    Moment,
    Move,
    Request,
)
from vmferry.host.channel import Frames
from vmferry.report.records import Progress, Report

Script = Callable[["Frames[Answer, Request]", Move], Awaitable[None]]
LIMIT_S = 30.0


def _report(outcome: str = "moved", error: str = "") -> Report:
    return Report(
        guest="g",
        source="a",
        destination="b",
        strategy="pre-copy",
        outcome=outcome,
        error=error,
        downtime_ms=12.3,
        total_s=4.5,
    )


def _moment(remaining: int) -> Moment:
    return Moment(progress=Progress("round 1", 0.5, 1000, remaining, 4096000, 123e6, 2.0))


@asynccontextmanager
async def _daemon(folder: Path, script: Script) -> AsyncGenerator[None]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        frames: Frames[Answer, Request] = Frames(
            reader, writer, REQUESTS, other="the command", bound=MESSAGE_BYTES_MAX
        )
        request = await frames.receive(LIMIT_S)
        assert isinstance(request, Move)
        await script(frames, request)
        await frames.close()

    async with await asyncio.start_unix_server(serve, folder / SOCKET_NAME):
        yield


async def _start(
    folder: Path, *arguments: str, err: int = asyncio.subprocess.PIPE
) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *COMMAND,
        "move",
        "g",
        "b",
        "--state",
        str(folder),
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=err,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    )


async def _finish(process: asyncio.subprocess.Process) -> tuple[int, str, str]:
    async with asyncio.timeout(LIMIT_S):
        out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), (err or b"").decode()


async def _line(process: asyncio.subprocess.Process, having: str) -> None:
    """Waits for a line on stderr."""
    assert process.stderr is not None
    async with asyncio.timeout(LIMIT_S):
        while having not in (line := (await process.stderr.readline()).decode()):
            assert line, f"stderr ended without {having!r}"


def test_a_move_shows_progress_and_ends_with_its_report(tmp_path: Path) -> None:
    async def script(frames: Frames[Answer, Request], request: Move) -> None:
        assert request == Move(
            guest="g", host="b", strategy="post-copy", max_downtime_s=0.3, verify=True
        )
        for remaining in range(500, 0, -1):
            await frames.send(_moment(remaining))
        await frames.send(Ended(report=_report()))

    async def scenario() -> None:
        async with _daemon(tmp_path, script):
            options = ["--strategy", "post-copy", "--max-downtime", "300ms", "--verify"]
            code, out, err = await _finish(await _start(tmp_path, *options))
        assert code == 0
        assert "12.3" in out
        lines = err.splitlines()
        # A line a second at most: 500 moments in far less than some seconds.
        assert 1 <= len(lines) < 20
        assert "round 1" in lines[0]
        assert "123 MB/s" in lines[0]
        assert "500 left" in lines[0]

    asyncio.run(scenario())


def test_json_is_one_object_alone_on_stdout(tmp_path: Path) -> None:
    async def script(frames: Frames[Answer, Request], request: Move) -> None:
        await frames.send(_moment(5))
        await frames.send(Ended(report=_report()))

    async def scenario() -> None:
        async with _daemon(tmp_path, script):
            code, out, _ = await _finish(await _start(tmp_path, "--json"))
        assert code == 0
        assert msgspec.json.decode(out, type=Report) == _report()
        assert out.count("\n") == 1

    asyncio.run(scenario())


@pytest.mark.parametrize(("outcome", "expected"), [("failed", 1), ("cancelled", 130)])
def test_how_it_did_not_move_is_a_sentence(tmp_path: Path, outcome: str, expected: int) -> None:
    async def script(frames: Frames[Answer, Request], request: Move) -> None:
        await frames.send(Ended(report=_report(outcome, "the link broke; g runs on at a")))

    async def scenario() -> None:
        async with _daemon(tmp_path, script):
            code, out, err = await _finish(await _start(tmp_path))
        assert (code, out) == (expected, "")
        assert err == "vmferry: the link broke; g runs on at a.\n"

    asyncio.run(scenario())


def test_a_refusal_is_a_report_too(tmp_path: Path) -> None:
    async def script(frames: Frames[Answer, Request], request: Move) -> None:
        await frames.send(Failed(kind="Refused", sentence="guest g has a passed-through device"))

    async def scenario() -> None:
        async with _daemon(tmp_path, script):
            code, out, err = await _finish(await _start(tmp_path, "--json"))
        assert code == 1
        assert json.loads(out)["error"] == "guest g has a passed-through device"
        assert err == "vmferry: guest g has a passed-through device.\n"

    asyncio.run(scenario())


def test_a_daemon_that_dies_leaves_a_sentence(tmp_path: Path) -> None:
    async def script(frames: Frames[Answer, Request], request: Move) -> None:
        await frames.send(_moment(5))

    async def scenario() -> None:
        async with _daemon(tmp_path, script):
            code, out, err = await _finish(await _start(tmp_path, "--quiet"))
        assert (code, out) == (1, "")
        assert "look at `vmferry ls`" in err
        assert len(err.splitlines()) == 1

    asyncio.run(scenario())


def test_ctrl_c_cancels_and_waits_until_the_guest_is_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        asked = asyncio.Event()
        undone = asyncio.Event()

        async def script(frames: Frames[Answer, Request], request: Move) -> None:
            await frames.send(_moment(5))
            assert isinstance(await frames.receive(LIMIT_S), Cancel)
            asked.set()
            await undone.wait()
            await frames.send(Ended(report=_report("cancelled", "the move was cancelled")))

        async with _daemon(tmp_path, script):
            process = await _start(tmp_path)
            await _line(process, "round 1")
            process.send_signal(signal.SIGINT)
            await _line(process, "Cancelling")
            async with asyncio.timeout(LIMIT_S):
                await asked.wait()
            process.send_signal(signal.SIGINT)
            await _line(process, "goes on undoing")
            assert process.returncode is None
            undone.set()
            code, _, err = await _finish(process)
        assert (code, err) == (130, "vmferry: the move was cancelled.\n")

    asyncio.run(scenario())


def test_a_third_ctrl_c_leaves(tmp_path: Path) -> None:
    async def scenario() -> None:
        left = asyncio.Event()

        async def script(frames: Frames[Answer, Request], request: Move) -> None:
            await frames.send(_moment(5))
            await left.wait()

        async with _daemon(tmp_path, script):
            process = await _start(tmp_path)
            for line in ("round 1", "Cancelling", "goes on undoing"):
                await _line(process, line)
                process.send_signal(signal.SIGINT)
            code, out, err = await _finish(process)
            left.set()
        assert (code, out) == (130, "")
        assert "Traceback" not in err

    asyncio.run(scenario())


def test_a_terminal_sees_a_bar(tmp_path: Path) -> None:
    async def scenario() -> None:
        shown = asyncio.Event()

        async def script(frames: Frames[Answer, Request], request: Move) -> None:
            await frames.send(_moment(100))
            await frames.send(_moment(40))
            await shown.wait()
            await frames.send(Ended(report=_report()))

        ours, theirs = pty.openpty()
        loop = asyncio.get_running_loop()
        screen = bytearray()

        def on_output() -> None:
            try:
                screen.extend(os.read(ours, 4096))
            except OSError:
                loop.remove_reader(ours)
            if b"40 pages left" in screen:
                shown.set()

        loop.add_reader(ours, on_output)
        async with _daemon(tmp_path, script):
            process = await _start(tmp_path, err=theirs)
            os.close(theirs)
            code, out, _ = await _finish(process)
        loop.remove_reader(ours)
        os.close(ours)
        assert code == 0
        assert "moved in" in out
        assert "━".encode() in screen
        assert b"123 MB/s" in screen
        assert b"2.0 s left" in screen

    asyncio.run(scenario())
