"""Starting the synthetic guest (core/synthetic) and asking it about its self-check."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from qemu.qmp import QMPClient

from vmferry.errors import GuestError

BINARY = "ferry-synthetic"
START_LIMIT_S = 10.0
"""Filling the area takes 0.3 s a GiB."""
ANSWER_LIMIT_S = 30.0
"""A sweep of the whole area takes about a second a GiB."""


class Check(msgspec.Struct, frozen=True):
    """The guest's own verdict on its memory."""

    writes: int
    """Pages rewritten since its first start, wherever it ran."""
    checked: int
    corrupt: int
    """Pages found wrong by its vCPUs before they rewrote them."""
    swept: int = 0
    differing: int = 0
    """Pages that differ now (only with a sweep)."""


@dataclass(frozen=True)
class SyntheticGuest:
    """A running synthetic guest."""

    process: asyncio.subprocess.Process
    qmp_path: Path
    check_path: Path
    """A second monitor, since like QEMU's each serves one client at a time. It comes first on the
    command line: a mover takes the last one."""
    log_path: Path
    """Its standard error."""

    @property
    def pid(self) -> int:
        return self.process.pid

    async def end(self) -> None:
        """Kills it if it still runs, and waits for its end."""
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()


def binary() -> Path:
    """Where the program lies: VMFERRY_SYNTHETIC, this tree's build, or PATH; else GuestError."""
    built = Path(__file__).parents[3] / "target" / "release" / BINARY
    for candidate in (os.environ.get("VMFERRY_SYNTHETIC"), built, shutil.which(BINARY)):
        if candidate is not None and Path(candidate).is_file():
            return Path(candidate)
    raise GuestError(
        f"The synthetic guest is not built; run `cargo build --release -p {BINARY}` first."
    )


async def start(
    directory: Path,
    *,
    name: str = "synthetic",
    memory_mib: int = 64,
    area_mib: int = 32,
    rate: float = 40.0,
    vcpus: int = 1,
    pattern: str = "text",
    incoming: bool = False,
    extra: Sequence[str] = (),
) -> SyntheticGuest:
    """Starts one whose sockets and log lie in `directory`; returns when its monitors listen.

    `rate` is in MB (10^6 bytes) a second over all vCPUs, 0 for an idle guest; `pattern` is `text`,
    `random` or `zero` (pages that turn to zeros and back). `incoming` starts it empty and stopped.
    """
    qmp_path, check_path = directory / f"{name}.qmp", directory / f"{name}.check"
    log_path = directory / f"{name}.log"
    arguments = ["-name", f"guest={name}", "-m", str(memory_mib), "-smp", str(vcpus)]
    for path in (check_path, qmp_path):
        arguments += ["-qmp", f"unix:{path},server=on,wait=off"]
    arguments += ["-area", str(area_mib), "-rate", str(rate), "-pattern", pattern]
    arguments += ["-incoming", "defer", "-S"] if incoming else []
    with log_path.open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            binary(), *arguments, *extra, stdout=asyncio.subprocess.PIPE, stderr=log
        )
    guest = SyntheticGuest(process, qmp_path, check_path, log_path)
    assert process.stdout is not None
    try:
        async with asyncio.timeout(START_LIMIT_S):
            line = await process.stdout.readline()
    except BaseException:
        await guest.end()
        raise
    if line != b"listening\n":
        await guest.end()
        said = log_path.read_text(errors="replace").strip()
        raise GuestError(f"The synthetic guest {name} did not start: {said}")
    return guest


async def check(path: Path, *, sweep: bool = False) -> Check:
    """Asks for the self-check on a free monitor; `sweep` compares every page now."""
    client = QMPClient("synthetic-check")
    async with asyncio.timeout(ANSWER_LIMIT_S):
        await client.connect(str(path))
        try:
            answer = await client.execute("x-synthetic-check", {"sweep": sweep})
        finally:
            await client.disconnect()
    return msgspec.convert(answer, Check)
