"""The outside client: what a user of the guest notices of a move (programs/client/outside.c)."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Self

import msgspec

from vmferry.errors import FerryError
from vmferry.lab.cache import cache_dir, cache_lock
from vmferry.lab.guestimage import PROGRAMS, compile_c, content_hash

READY_LIMIT_S = 30.0
ANSWER_LIMIT_S = 30.0
LATE_ANSWERS_S = 1.0
"""An echo that is not back after so long counts as lost: frames wait in a tap, nowhere else."""


class Window(msgspec.Struct, frozen=True):
    """What the client saw in one window of time. TCP counts but `tcp_replies` are since its
    start: the promise is that the last four are 0, 0, 1 and 0."""

    blackout_ms: float
    """The longest time without an echo."""
    echoes_sent: int
    echoes_lost: int
    lost_after_ms: float
    """From the window's begin to the sending of the first lost echo; 0 without one."""
    lost_span_ms: float
    """From the first lost echo's sending to the last one's."""
    echoes_doubled: int
    round_trip_ms_median: float
    round_trip_ms_max: float
    send_gap_ms: float
    """The longest time without a request: how far this machine disturbed the client itself."""
    tcp_replies: int
    tcp_gap_ms: float
    """The longest time without a TCP reply."""
    tcp_wrong: int
    tcp_doubled: int
    tcp_connections: int
    tcp_losses: int

    @property
    def tcp_intact(self) -> bool:
        """One connection all the time, each request answered once and rightly."""
        return (
            self.tcp_wrong == self.tcp_doubled == self.tcp_losses == 0 and self.tcp_connections == 1
        )


class OutsideClient:
    """One client for one guest. `mark()` before something and `window(mark)` after it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._turn = asyncio.Lock()

    @classmethod
    async def start(cls, namespace_command: list[str], address: str, log: Path) -> Self:
        """Returns when the guest answers on UDP and TCP. FerryError when it does not."""
        program = await asyncio.to_thread(_built)
        with log.open("ab") as stderr:
            process = await asyncio.create_subprocess_exec(
                *namespace_command,
                str(program),
                address,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=stderr,
            )
        client = cls(process)
        try:
            line = await client._line(READY_LIMIT_S)
        except BaseException:
            await client.close()
            raise
        if line != b"ready\n":
            await client.close()
            raise FerryError(f"The outside client did not start: {log.read_text()[-300:]}")
        return client

    @property
    def pid(self) -> int:
        return self._process.pid

    @staticmethod
    def mark() -> int:
        """Now, on the client's clock (CLOCK_MONOTONIC, ns)."""
        return time.monotonic_ns()

    async def window(self, begin: int, end: int | None = None) -> Window:
        """What was seen from one mark to another (or to now), late answers included."""
        end = self.mark() if end is None else end
        # An echo under way at the end of the window is not lost yet.
        late = end / 1e9 + LATE_ANSWERS_S - time.monotonic()
        if late > 0:
            await asyncio.sleep(late)
        async with self._turn:
            assert self._process.stdin is not None
            self._process.stdin.write(f"window {begin} {end}\n".encode())
            return msgspec.json.decode(await self._line(ANSWER_LIMIT_S), type=Window)

    async def close(self) -> None:
        """Ends the program; twice is harmless."""
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()

    async def _line(self, timeout_s: float) -> bytes:
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(timeout_s):
                line = await self._process.stdout.readline()
        except TimeoutError:
            raise FerryError(
                f"The outside client heard nothing from the guest for {timeout_s:g} s."
            ) from None
        if not line:
            raise FerryError(f"The outside client ended (code {await self._process.wait()}).")
        return line


def _built() -> Path:
    sources = sorted((PROGRAMS / "client").iterdir())
    program = cache_dir() / "client" / f"outside-{content_hash(sources)}"
    with cache_lock():
        if not program.exists():
            program.parent.mkdir(exist_ok=True)
            fresh = program.with_suffix(".new")
            compile_c(sources, fresh, ["-pthread"])
            fresh.rename(program)
    return program
