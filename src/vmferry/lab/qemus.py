"""The QEMUs of this machine: the system's and those unpacked in the cache."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from vmferry.errors import FerryError
from vmferry.lab.cache import cache_dir

SYSTEM_BINARY = "qemu-system-x86_64"
_DATA_DIRS = ("usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu")


@dataclass(frozen=True)
class QemuBinary:
    """A QEMU that runs here."""

    version: tuple[int, ...]
    path: Path
    data_dirs: tuple[Path, ...] = ()
    """Where its firmware lies, if not where it was built to look."""

    @property
    def name(self) -> str:
        return ".".join(map(str, self.version))

    @property
    def command(self) -> list[str]:
        """The words that every command line of it begins with."""
        return [str(self.path), *(w for d in self.data_dirs for w in ("-L", str(d)))]


def available() -> list[QemuBinary]:
    """All that run, newest first, one a version."""
    found: dict[tuple[int, ...], QemuBinary] = {}
    system = shutil.which(SYSTEM_BINARY)
    if system is not None:
        _look(Path(system), (), found)
    for tree in sorted(cache_dir().glob("qemu/*")):
        data_dirs = tuple(tree / d for d in _DATA_DIRS if (tree / d).is_dir())
        _look(tree / "usr/bin" / SYSTEM_BINARY, data_dirs, found)
    return sorted(found.values(), key=lambda b: b.version, reverse=True)


def newest() -> QemuBinary:
    """FerryError when there is none."""
    binaries = available()
    if not binaries:
        raise FerryError("There is no QEMU here; run `make demo` once, which installs one.")
    return binaries[0]


def _look(
    path: Path, data_dirs: tuple[Path, ...], found: dict[tuple[int, ...], QemuBinary]
) -> None:
    try:
        done = subprocess.run(
            [path, "--version"], capture_output=True, text=True, check=False, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return
    matched = re.search(r"version (\d+(?:\.\d+)+)", done.stdout)
    if done.returncode == 0 and matched is not None:
        version = tuple(int(n) for n in matched[1].split("."))
        found.setdefault(version, QemuBinary(version, path, data_dirs))
