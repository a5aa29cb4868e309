"""Guests without a kernel, started as somebody else would start them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from vmferry.guest.process import GuestProcess, read_process
from vmferry.lab.qemus import QemuBinary

START_LIMIT_S = 30.0
MONITOR = ("-qmp", "unix:m.sock,server=on,wait=off")


class Guests:
    """The guests of one test, each in a directory of its own."""

    def __init__(self, qemu: QemuBinary, directory: Path) -> None:
        self.qemu = qemu
        self.directory = directory
        self._children: list[subprocess.Popen[bytes]] = []

    def start(
        self,
        *extra: str,
        name: str = "",
        monitor: Sequence[str] = MONITOR,
        pass_fds: Sequence[int] = (),
    ) -> GuestProcess:
        """Starts one and waits until a `.sock` of its directory listens."""
        name = name or f"subject-{self.directory.name}"
        child = self.spawn(*monitor, *extra, name=name, pass_fds=pass_fds)
        home = self._home(child)
        until = time.monotonic() + START_LIMIT_S
        while not any(_listens(path) for path in home.glob("*.sock")):
            assert child.poll() is None, (home / "log").read_text()
            assert time.monotonic() < until
            time.sleep(0.01)
        return read_process(child.pid)

    def spawn(
        self, *extra: str, name: str, pass_fds: Sequence[int] = ()
    ) -> subprocess.Popen[bytes]:
        """Starts one and waits for nothing."""
        home = self.directory / str(len(self._children))
        home.mkdir()
        words = [*self.qemu.command, "-name", name, "-m", "32", "-display", "none"]
        with (home / "log").open("wb") as log:
            child = subprocess.Popen(
                [*words, "-nodefaults", *extra],
                cwd=home,
                stdin=subprocess.DEVNULL,
                stderr=log,
                pass_fds=pass_fds,
            )
        self._children.append(child)
        return child

    def kill(self, guest: GuestProcess) -> None:
        """Kills this one and waits until it has gone."""
        child = next(child for child in self._children if child.pid == guest.pid)
        child.send_signal(signal.SIGKILL)
        child.wait()

    def end(self) -> None:
        for child in self._children:
            child.kill()
            child.wait()

    def _home(self, child: subprocess.Popen[bytes]) -> Path:
        return self.directory / str(self._children.index(child))


def open_descriptors(pid: int) -> list[str]:
    """What a process has open, less its connections."""
    targets = [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()]  # noqa: PTH115
    return sorted(target for target in targets if not target.startswith("socket:"))


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True
