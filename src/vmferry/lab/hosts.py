"""The two daemons of a lab, as a user would start and pair them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from vmferry.errors import FerryError, PeerError
from vmferry.lab.network import MIGRATION_ADDRESS, HostName, Topology

PORT = 7450
COMMAND = [sys.executable, "-m", "vmferry.cli.main"]
_START_LIMIT_S = 30.0
_END_LIMIT_S = 20.0
_COMMAND_LIMIT_S = 60.0


@dataclass(frozen=True)
class CommandOutcome:
    """How a command of vmferry ended."""

    code: int
    out: str
    err: str


class LabHost:
    """One running daemon in its host's namespace."""

    def __init__(
        self,
        topology: Topology,
        host: HostName,
        state_dir: Path,
        process: asyncio.subprocess.Process,
    ) -> None:
        self.host = host
        self.state_dir = state_dir
        self.process = process
        self._topology = topology

    @property
    def name(self) -> str:
        """What the other host calls it."""
        return host_name(self.host)

    @property
    def log(self) -> Path:
        return self.state_dir.with_suffix(".log")

    @classmethod
    async def start(
        cls,
        topology: Topology,
        host: HostName,
        state_dir: Path,
        environment: Mapping[str, str] | None = None,
    ) -> Self:
        """Returns when it listens. PeerError with the end of its log when it does not.

        `environment` comes on top of this process's own.
        """
        address = f"{MIGRATION_ADDRESS[host]}:{PORT}"
        with state_dir.with_suffix(".log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *topology.command(host),
                *COMMAND,
                *("host", "--listen", address, "--state", str(state_dir)),
                *("--name", host_name(host)),
                env={**os.environ, **(environment or {})},
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                # A Ctrl-C at the terminal is the lab's: daemons end when it says so.
                start_new_session=True,
            )
        daemon = cls(topology, host, state_dir, process)
        assert process.stdout is not None
        try:
            async with asyncio.timeout(_START_LIMIT_S):
                line = await process.stdout.readline()
        except BaseException as error:
            await daemon.kill()
            if isinstance(error, TimeoutError):
                raise PeerError(f"The daemon of {daemon.name} did not start in time.") from None
            raise
        if not line:
            await daemon.kill()
            raise PeerError(
                f"The daemon of {daemon.name} did not start: {daemon.log.read_text()[-500:]}"
            )
        return daemon

    async def run(self, *arguments: str) -> CommandOutcome:
        """Runs a command of vmferry on this host to its end."""
        process = await self.begin(*arguments)
        try:
            async with asyncio.timeout(_COMMAND_LIMIT_S):
                out, err = await process.communicate()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            raise
        assert process.returncode is not None
        return CommandOutcome(process.returncode, out.decode(), err.decode())

    async def begin(
        self, *arguments: str, show_progress: bool = False
    ) -> asyncio.subprocess.Process:
        """Starts a command; its stderr, where progress is shown, may go to the terminal."""
        return await asyncio.create_subprocess_exec(
            *self._topology.command(self.host),
            *COMMAND,
            *arguments,
            env={**os.environ, "VMFERRY_STATE": str(self.state_dir)},
            stdout=asyncio.subprocess.PIPE,
            stderr=None if show_progress else asyncio.subprocess.PIPE,
        )

    async def end(self) -> None:
        """Asks it to end, and kills it when it does not."""
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()
        try:
            async with asyncio.timeout(_END_LIMIT_S):
                await self.process.wait()
        except TimeoutError:
            await self.kill()

    async def kill(self) -> None:
        """Ends it as a crash would; twice is harmless."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()


def host_name(host: HostName) -> str:
    return f"host-{host}"


async def pair(first: LabHost, second: LabHost) -> None:
    """Makes the two trust each other. FerryError says what the commands said."""
    invited = await first.run("invite")
    token = invited.out.strip()
    if invited.code != 0 or not token:
        raise FerryError(f"{first.name} gave no invitation: {invited.err.strip()}")
    paired = await second.run("pair", token)
    if paired.code != 0:
        raise FerryError(f"{second.name} could not be paired: {paired.err.strip()}")
